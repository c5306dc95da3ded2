"""All errors about a value have the same form: where it was found, its field, what was expected and what was got."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def fail(where: object, field: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{where}: {field}: expected {expected}, got {got}")


def expect(good: bool, where: object, field: str, expected: str, got: object) -> None:
    """Raises a ValueError unless `good`; `where` is an operator, a function or a file."""
    if not good:
        fail(where, field, expected, got)


def expect_value(good: bool, where: object, field: str, expected: str, got: object) -> None:
    """Like `expect`, for a value from a file. Text is quoted, so that '4' and 4 look different."""
    if not good:
        fail(where, field, expected, repr(got))


def checker(where: object) -> Callable[[bool, str, str, object], None]:
    """`expect_value` for one file: a function of (good, field, expected, got)."""

    def check(good: bool, field: str, expected: str, got: object) -> None:
        expect_value(good, where, field, expected, got)

    return check

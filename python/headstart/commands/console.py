"""What the reports of `headstart demo` and `headstart inspect` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Item = TypeVar("Item")


class Steps(Progress):
    @contextmanager
    def step(self, name: str, total: int = 2) -> Iterator[Callable[[], None]]:
        task = self.add_task(name, total=total)
        yield lambda: self.advance(task)


def progress() -> Steps:
    return Steps(SpinnerColumn(), TextColumn("{task.description:22}"), BarColumn(), TimeElapsedColumn())


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, or all if they are fewer, at even distances from the first to the last."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]

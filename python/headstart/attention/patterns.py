"""The sparse patterns that a head may have, and their parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class _Parameter:
    default: Any
    expected: str
    accepts: Callable[[Any], bool]


def _tokens(default: int, least: int = 1) -> _Parameter:
    return _Parameter(default, f"an integer, at least {least}", lambda x: type(x) is int and x >= least)


_cap = _Parameter(None, "an integer, at least 1, or none", lambda x: x is None or (type(x) is int and x >= 1))
_share = _Parameter(0.93, "a number above 0 and up to 1", lambda x: type(x) in (int, float) and 0 < x <= 1)
_stride = _Parameter(16, "4, 8, 16 or 32", lambda x: type(x) is int and x in (4, 8, 16, 32))

# With the defaults, SmolLM2-135M computes between 20 % and 35 % of its attention at 8,192 tokens.
# docs/measurements/attention.md has the curve from which adaptive's threshold was chosen.
PATTERNS: dict[str, dict[str, _Parameter]] = {
    "dense": {},
    "a_shape": {"sink": _tokens(128, 0), "local": _tokens(1024, 0)},
    "vertical_slash": {
        "vertical_size": _tokens(1000),
        "slash_size": _tokens(1024),
        "last_q": _tokens(64),
        "sink": _tokens(30, 0),
        "local": _tokens(100, 0),
    },
    "block_topk": {"top_k": _tokens(24), "sink": _tokens(1, 0), "local": _tokens(1, 0)},
    "adaptive": {
        "threshold": _share,
        "stride": _stride,
        "sink": _tokens(1, 0),
        "local": _tokens(1, 0),
        "max_blocks": _cap,
        "samples": _Parameter(4, "an integer from 0 to 64", lambda x: type(x) is int and 0 <= x <= 64),
    },
}


def _measured(expected: str, least: float, most: float) -> _Parameter:
    return _Parameter(None, expected, lambda x: x is None or (type(x) in (int, float) and least <= x <= most))


# The numbers that a search measures for the pattern of a head.
MEASURED: dict[str, _Parameter] = {
    "score": _measured("a finite number", -sys.float_info.max, sys.float_info.max),
    "error": _measured("a finite number, at least 0", 0, sys.float_info.max),
    "density": _measured("a number from 0 to 1", 0, 1),
}


class PlanError(ValueError):
    """A value that a plan cannot have. `field` says where in the plan it is."""

    def __init__(self, field: str, expected: str, got: object):
        super().__init__(f"PrefillPlan: {field}: expected {expected}, got {got!r}")
        self.field, self.expected, self.got = field, expected, got


@dataclass(frozen=True)
class HeadPattern:
    """One head's pattern, made by `of`, for example ``HeadPattern.of("a_shape", sink=64)``.

    A search adds what it measured: ``score`` (as in MInference's files), ``error``, the relative error of the head's
    output, and ``density``, the share of the attention that the head computes. These do not change what is computed,
    and patterns that differ only in them are equal.
    """

    name: str
    params: tuple[tuple[str, Any], ...]
    score: float | None = field(default=None, compare=False)
    error: float | None = field(default=None, compare=False)
    density: float | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        pattern: str,
        *,
        score: float | None = None,
        error: float | None = None,
        density: float | None = None,
        **params,
    ) -> HeadPattern:
        """A pattern by its name, a key of `PATTERNS`. Parameters that are not given have their defaults.

        Raises a PlanError (a ValueError) if the name, a parameter or its value is wrong.
        """
        if not isinstance(pattern, str) or pattern not in PATTERNS:
            raise PlanError("pattern", f"one of {', '.join(PATTERNS)}", pattern)
        known = PATTERNS[pattern]
        for name, value in params.items():
            if name not in known:
                raise PlanError(name, f"a parameter of {pattern} ({', '.join(known) or 'it has none'})", name)
            if not known[name].accepts(value):
                raise PlanError(name, known[name].expected, value)
        return cls(
            pattern, tuple((name, params.get(name, p.default)) for name, p in known.items()), score, error, density
        )

    @property
    def family(self) -> HeadPattern:
        """The pattern without the parameter that may differ between heads. One call builds all heads of a family."""
        return HeadPattern.of("adaptive", **dict(self.params) | {"threshold": 1}) if self.name == "adaptive" else self

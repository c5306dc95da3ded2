"""What a case is made of: its shape, and the works that take turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

ERROR_BAR = {"bf16": 2e-2, "fp32": 1e-4}  # as a share of the largest exact value; see baselines.relative_error
GROUP = 128
INT4_GEMM = "int4_gemm"
INT8_ACTIVATIONS = "int4_gemm, int8 activations"
INT8_SMALL_GROUPS = "int4_gemm, int8 activations, group 32"
SMALL_GROUP, SMALL_GROUP_ROWS = 32, 256
BITMAP, BITMAP_GEMM = "bitmap", "bitmap_gemm"
BITMAP_VALUES = {"same": "bf16 values", "int8": "int8 values", "int4": "int4 values"}
COMPRESS = "compress"
ZEROS = 0.5  # the share of a pruned weight's values


@dataclasses.dataclass(frozen=True)
class Shape:
    hq: int
    hkv: int
    d: int

    def __str__(self) -> str:
        return f"{self.hq}x{self.hkv}x{self.d}"

    @property
    def words(self) -> str:
        return f"{self.hq} heads on {self.hkv} KV heads, D {self.d}"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A linear layer's weight, out by in."""

    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"

    @property
    def words(self) -> str:
        return f"{self.n:,} × {self.k:,}"


@dataclasses.dataclass
class Work:
    """One call to time, and the work that the call must do."""

    name: str
    call: Callable[[], object]
    baseline: str | None = None  # the baseline's name, if this is one
    of: str | None = None  # the work that this is a baseline or another tier of; a baseline without it is for the group
    flops: float = 0  # 4 D for each attended pair, 2 for each weight and row
    bytes: float = 0  # must move between memory and the cores
    cycle_bytes: float = 0  # move until the same data come again; if they fit into the caches, memory is no limit
    limit: str | None = None  # "multiply", "read" or "copy": what bounds it on this machine
    density: float | None = None
    check: Callable[[object], float] | None = None  # returns the error of a result
    error_bar: float = 0
    tier: str | None = None  # the tier that the call forces

"""Shapes of attention for the tests, and the inputs and indices made from them.

They are what breaks kernels: lengths that fill no block, head dims that fill no register, ratios of heads that share
nothing. The benchmarks' sizes are in `bench/cases.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headstart import BlockIndex

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Entries of an index past the count are ignored, whatever they hold: a hostile id, and a far one.
UNUSED = (-1, 2**20)


@dataclass(frozen=True)
class Shape:
    """One attention problem: q [batch, heads_q, nq, head_dim], k and v [batch, heads_kv, nk, head_dim]."""

    batch: int
    heads_q: int
    heads_kv: int
    nq: int
    nk: int
    head_dim: int
    heads_index: int = 1
    block_q: int = 64
    block_k: int = 64
    columns: str = "none"  # "none", "shared" (one list for all rows of a head), "own" (a list a row)
    kv_start: tuple[int, ...] | None = None
    causal: bool = True
    window: int | None = None
    share: float = 0.4  # of the blocks, in `random_index`

    def __str__(self) -> str:
        name = f"b{self.batch}-h{self.heads_q}.{self.heads_kv}.{self.heads_index}-n{self.nq}.{self.nk}-d{self.head_dim}"
        name += f"-bl{self.block_q}.{self.block_k}" if (self.block_q, self.block_k) != (64, 64) else ""
        name += f"-{self.columns}" if self.columns != "none" else ""
        name += f"-pad{'.'.join(map(str, self.kv_start))}" if self.kv_start else ""
        name += f"-w{self.window}" if self.window is not None else ""
        name += f"-share{self.share}" if self.share != 0.4 else ""
        return name + ("" if self.causal else "-full")

    @property
    def rows(self) -> int:
        return -(-self.nq // self.block_q)

    @property
    def blocks(self) -> int:
        return -(-self.nk // self.block_k)

    def with_(self, **changes) -> Shape:
        return replace(self, **changes)

    def qkv(self, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normal random q, k, v. Seed torch before, for the same numbers."""
        q = torch.randn(self.batch, self.heads_q, self.nq, self.head_dim)
        k, v = torch.randn(2, self.batch, self.heads_kv, self.nk, self.head_dim)
        return tuple(x.to(device, dtype) for x in (q, k, v))

    def start(self, device: str = "cpu") -> torch.Tensor | None:
        return None if self.kv_start is None else torch.tensor(self.kv_start, dtype=torch.int32, device=device)

    def all_blocks(self, device: str = "cpu") -> BlockIndex:
        """Every block selected: dense attention."""
        ids = torch.arange(self.blocks, dtype=torch.int32, device=device)
        count = torch.full((1, 1, self.rows), self.blocks, dtype=torch.int32, device=device)
        return BlockIndex(count, ids.repeat(1, 1, self.rows, 1), block_q=self.block_q, block_k=self.block_k)

    def random_index(self, share: float | None = None) -> BlockIndex:
        """Blocks with probability `share` and, as `columns` says, up to 100 single keys; garbage past the counts.

        Rows without a block, and lists without a column, come up by chance and are welcome.
        """
        lead = (self.batch, self.heads_index)
        share = self.share if share is None else share
        blocks = random_lists((*lead, self.rows), self.blocks, share)
        columns = (None, None)
        if self.columns != "none":
            rows = 1 if self.columns == "shared" else self.rows
            columns = random_lists((*lead, rows), self.nk, min(0.5, 100 / max(self.nk, 1)))
        return BlockIndex(*blocks, *columns, block_q=self.block_q, block_k=self.block_k)


def random_lists(lead: tuple[int, ...], limit: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(count [*lead], ids [*lead, T]), each id in [0, limit) with probability `share`, ascending."""
    chosen = torch.rand(*lead, limit) < share
    count = chosen.sum(-1, dtype=torch.int32)
    capacity = int(count.max()) + 2 if count.numel() else 2
    ids = torch.tensor(UNUSED, dtype=torch.int32).repeat(*lead, capacity)[..., :capacity].contiguous()
    for at in torch.cartesian_prod(*(torch.arange(n) for n in lead)).tolist():
        found = chosen[tuple(at)].nonzero().flatten().to(torch.int32)
        ids[tuple(at)][: len(found)] = found
    return count, ids


# --- for tests -------------------------------------------------------------------------------------------------------

_base = Shape(1, 4, 2, 200, 200, 64)

HEAD_DIMS = [_base.with_(head_dim=d, columns="own") for d in (8, 64, 72, 80, 96, 128, 256)]
HEAD_RATIOS = [
    _base.with_(heads_q=hq, heads_kv=hkv, heads_index=hi, nq=130, nk=150, head_dim=16, columns="shared")
    for hq, hkv, hi in (
        (9, 3, 1), (9, 3, 3), (9, 3, 9), (6, 2, 3), (6, 2, 6), (4, 1, 2), (4, 1, 4), (12, 6, 4), (12, 6, 1), (5, 5, 5),
    )
]  # fmt: skip
LENGTHS = [
    _base.with_(nq=nq, nk=nk, columns=columns, heads_index=2)
    for nq, nk, columns in (
        (1, 1, "none"), (1, 65, "own"), (1, 700, "shared"), (3, 130, "own"), (4, 67, "none"), (8, 300, "shared"),
        (9, 300, "own"), (17, 129, "shared"), (63, 64, "none"), (64, 64, "own"), (65, 127, "none"), (100, 321, "own"),
        (129, 129, "shared"), (257, 300, "none"),
    )
]  # fmt: skip
BLOCK_SIZES = [
    _base.with_(block_q=bq, block_k=bk, nq=nq, nk=333, columns=columns)
    for bq, bk in ((64, 128), (128, 64), (128, 128))
    for nq, columns in ((2, "shared"), (300, "own"))
]
PADDED = [
    _base.with_(batch=3, nk=210, nq=nq, kv_start=start, columns=columns, heads_index=2)
    for nq, start, columns in (
        (210, (0, 65, 210), "own"), (210, (64, 1, 209), "shared"), (100, (127, 0, 150), "none"),
        (1, (209, 210, 13), "shared"), (5, (207, 0, 64), "own"),
    )
]  # fmt: skip
FULL = [
    _base.with_(nq=nq, nk=nk, causal=False, columns=columns)
    for nq, nk, columns in ((200, 130, "own"), (3, 100, "shared"), (90, 90, "none"), (150, 20, "none"))
]
WINDOWED = [
    _base.with_(window=window, nq=nq, nk=nk, heads_index=2, columns=columns, **options)
    for window, nq, nk, columns, options in (
        (1, 200, 200, "own", {}), (64, 257, 257, "none", {}), (63, 130, 321, "shared", {}), (100, 300, 700, "own", {}),
        (199, 200, 200, "none", {}), (200, 200, 200, "shared", {}), (2**40, 70, 90, "own", {}),
        (65, 300, 420, "shared", dict(block_q=128, block_k=128)), (130, 300, 333, "own", dict(block_k=128)),
        (90, 210, 210, "shared", dict(batch=3, kv_start=(0, 65, 150))),
        (30, 100, 210, "own", dict(batch=2, kv_start=(127, 190))),
        (50, 150, 130, "own", dict(causal=False)), (70, 100, 300, "none", dict(causal=False)),
        (1, 1, 700, "shared", {}), (100, 1, 700, "own", {}), (65, 5, 300, "shared", {}), (3, 4, 129, "none", {}),
        (40, 2, 210, "own", dict(batch=2, kv_start=(200, 13))), (20, 3, 90, "shared", dict(causal=False)),
    )
]  # fmt: skip
ATTENTION = HEAD_DIMS + HEAD_RATIOS + LENGTHS + BLOCK_SIZES + PADDED + FULL

# Index builders take q and k alone; heads of the index are heads of q.
BUILDERS = [
    Shape(1, 2, 1, 512, 512, 64),
    Shape(1, 3, 3, 300, 333, 72),
    Shape(2, 4, 2, 130, 700, 16),
    Shape(1, 2, 2, 1, 400, 32),
    Shape(1, 2, 2, 17, 70, 8),
    Shape(1, 2, 1, 500, 500, 16, block_q=128, block_k=128),
    Shape(1, 2, 1, 500, 520, 16, block_q=64, block_k=128),
    Shape(1, 2, 1, 470, 500, 16, block_q=128, block_k=64),
    Shape(3, 2, 1, 400, 400, 16, kv_start=(0, 100, 400)),
    Shape(2, 2, 1, 100, 333, 16, kv_start=(64, 300)),
]

"""What the reports of `headstart demo` and `headstart inspect` share: progress bars, attended blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .reference.sparse_attention import scatter_blocks

if TYPE_CHECKING:
    from .engine.attention import Recorded

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


# --- attended blocks -----------------------------------------------------------------------------------------------


class Attended(NamedTuple):
    """What the first sequence of a batch attends, of every index head, by blocks."""

    blocks: torch.Tensor  # bool [heads, query blocks, key blocks]
    columns: torch.Tensor | None  # float32 [heads, query blocks or 1, key blocks]: the share of single keys


def attended(entry: Recorded) -> Attended:
    index = entry.index
    key_blocks = -(-entry.nk // index.block_k)
    blocks = scatter_blocks(index.block_count[0], index.block_index[0], key_blocks)
    blocks &= visible_blocks(entry.nq, entry.nk, index.block_q, index.block_k).to(blocks.device)
    if index.column_count is None:
        return Attended(blocks, None)
    keys = scatter_blocks(index.column_count[0], index.column_index[0], key_blocks * index.block_k)
    size = torch.tensor([min(index.block_k, entry.nk - first) for first in range(0, entry.nk, index.block_k)])
    return Attended(blocks, keys.unflatten(-1, (key_blocks, index.block_k)).sum(-1) / size.to(keys.device))


def visible_blocks(nq: int, nk: int, block_q: int, block_k: int) -> torch.Tensor:
    """bool [query blocks, key blocks]: whether causality lets a query of the row see a key of the block."""
    last_query = (torch.arange(-(-nq // block_q)) * block_q + block_q).clamp(max=nq) - 1 + nk - nq
    return torch.arange(-(-nk // block_k)) * block_k <= last_query[:, None]


def attended_share(entry: Recorded) -> torch.Tensor:
    """float [heads, query blocks, key blocks]: the share of a key block that a row attends."""
    blocks, columns = attended(entry)
    if columns is None:
        return blocks.float()
    visible = visible_blocks(entry.nq, entry.nk, entry.index.block_q, entry.index.block_k).to(blocks.device)
    return torch.maximum(blocks.float(), columns * visible)

"""Records what a forward attended: the indices of its layers, their last queries, and the blocks of an index.

A recording collects only the forwards of the thread that began it. Other threads may run forwards at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..ops.sparse_attention import BlockIndex
from ..reference.sparse_attention import scatter_blocks


class Recorded(NamedTuple):
    """One attention call of a layer: its index, its numbers of queries and keys, the path it took, and its window."""

    layer: int
    index: BlockIndex
    nq: int
    nk: int
    path: str
    window: int | None = None


@dataclass(frozen=True, eq=False)
class QueryRecording:
    """A running `record_queries`."""

    layers: frozenset[torch.nn.Module]
    count: int
    advance: Callable[[], object]
    queries: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, module: torch.nn.Module, query: torch.Tensor) -> None:
        if module in self.layers:
            self.queries[module.layer_idx] = query[:, :, -self.count :].clone()
            self.advance()


# Each thread has its own recordings, so a forward of another thread is not in them.
_recordings: ContextVar[tuple[list[Recorded], ...]] = ContextVar("headstart_recordings", default=())
_query_recordings: ContextVar[tuple[QueryRecording, ...]] = ContextVar("headstart_query_recordings", default=())


def add(layer: int, index: BlockIndex, nq: int, nk: int, path: str, window: int | None = None) -> None:
    for entries in _recordings.get():
        entries.append(Recorded(layer, index, nq, nk, path, window))


def add_queries(module: torch.nn.Module, query: torch.Tensor) -> None:
    for recording in _query_recordings.get():
        recording.take(module, query)


@contextmanager
def record() -> Iterator[list[Recorded]]:
    """Collects the indices of all layers that headstart's attention runs in this thread, in order."""
    entries: list[Recorded] = []
    token = _recordings.set((*_recordings.get(), entries))
    try:
        yield entries
    finally:
        _recordings.reset(token)


@contextmanager
def record_queries(
    layers: Iterable[torch.nn.Module], count: int, advance: Callable[[], object] = lambda: None
) -> Iterator[dict[int, torch.Tensor]]:
    """Collects the last `count` queries [B, Hq, count, D] of some attention modules of a patched model.

    It collects them, by layer number, while this thread runs these modules, and calls `advance` for each. Other models
    that run at the same time are not recorded.
    """
    recording = QueryRecording(frozenset(layers), count, advance)
    token = _query_recordings.set((*_query_recordings.get(), recording))
    try:
        yield recording.queries
    finally:
        _query_recordings.reset(token)


# --- attended blocks -----------------------------------------------------------------------------------------------


class Attended(NamedTuple):
    """The blocks that the first sequence of a batch attends, for each head of the index."""

    blocks: torch.Tensor  # bool [heads, query blocks, key blocks]
    columns: torch.Tensor | None  # float32 [heads, query blocks or 1, key blocks]: the share that single keys cover


def attended(entry: Recorded) -> Attended:
    """The blocks that a recorded call attended. Blocks that causality hides are left out."""
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
    """bool [query blocks, key blocks]: whether some query of the row may see some key of the block."""
    last_query = (torch.arange(-(-nq // block_q)) * block_q + block_q).clamp(max=nq) - 1 + nk - nq
    return torch.arange(-(-nk // block_k)) * block_k <= last_query[:, None]


def attended_share(entry: Recorded) -> torch.Tensor:
    """float [heads, query blocks, key blocks]: the share of a key block that a row attends."""
    blocks, columns = attended(entry)
    if columns is None:
        return blocks.float()
    visible = visible_blocks(entry.nq, entry.nk, entry.index.block_q, entry.index.block_k).to(blocks.device)
    return torch.maximum(blocks.float(), columns * visible)

"""The index of a layer: the blocks of keys that its queries attend under the patterns of its heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..ops.prefill_index import a_shape_index, adaptive_block_index, block_topk_index, vertical_slash_index
from ..ops.sparse_attention import BlockIndex
from .patterns import HeadPattern


@functools.lru_cache(maxsize=16)
def full_index(nq: int, nk: int, device: torch.device) -> BlockIndex:
    """All key blocks that a query block sees under causality. One index head serves all heads and sequences."""
    rows, blocks = -(-nq // 64), -(-nk // 64)
    last_query = torch.arange(1, rows + 1, device=device).mul(64).clamp(max=nq) - 1
    count = ((last_query + nk - nq) // 64 + 1).to(torch.int32)
    ids = torch.arange(blocks, dtype=torch.int32, device=device)
    return BlockIndex(count[None, None], ids.expand(1, 1, rows, blocks))


@functools.lru_cache(maxsize=16)
def _shared_a_shape(nq: int, nk: int, sink: int, local: int, device: torch.device) -> BlockIndex:
    return a_shape_index(nq, nk, sink=sink, local=local, device=device)


def window_index(nq: int, nk: int, window: int, device: torch.device) -> BlockIndex:
    """All key blocks that a query block sees in a sliding window. One index head serves all heads and sequences."""
    return _shared_a_shape(nq, nk, 0, window, device)


def pattern_index(patterns: Sequence[HeadPattern], q, k, kv_start, scale) -> BlockIndex:
    """The index of heads of one family, whose patterns differ only in their thresholds."""
    name, params = patterns[0].name, dict(patterns[0].params)
    nq, nk = q.shape[2], k.shape[2]
    if name == "dense":
        return full_index(nq, nk, q.device)
    if name == "a_shape" and kv_start is None:
        return _shared_a_shape(nq, nk, params["sink"], params["local"], q.device)
    if name == "a_shape":
        return a_shape_index(nq, nk, **params, kv_start=kv_start)
    if name == "vertical_slash":
        return vertical_slash_index(q, k, **params, kv_start=kv_start, scale=scale)
    if name == "block_topk":
        return block_topk_index(q, k, **params, kv_start=kv_start)
    thresholds = [dict(pattern.params)["threshold"] for pattern in patterns]
    if len(set(thresholds)) > 1:
        params["head_threshold"] = torch.tensor(thresholds, dtype=torch.float32, device=q.device)
    return adaptive_block_index(q, k, **params, kv_start=kv_start, scale=scale)


def stitch(parts: Sequence[tuple[Sequence[int], BlockIndex]], batch: int) -> BlockIndex:
    """Combines several indices to one. Each part is a list of heads and their index. No head is in two parts."""
    order = torch.tensor([head for heads, _ in parts for head in heads]).argsort().tolist()
    capacity = max(index.block_index.shape[-1] for _, index in parts)
    counts = [index.block_count.expand(batch, len(heads), -1) for heads, index in parts]
    blocks = [
        F.pad(index.block_index, (0, capacity - index.block_index.shape[-1])).expand(batch, len(heads), -1, -1)
        for heads, index in parts
    ]
    columns = [(index.column_count, index.column_index) for _, index in parts]
    given = [ids for _, ids in columns if ids is not None]
    column_count = column_index = None
    if given:
        rows, width = max(ids.shape[2] for ids in given), max(ids.shape[3] for ids in given)
        column_counts, column_ids = [], []
        for (heads, index), (count, ids) in zip(parts, columns, strict=True):
            if ids is None:
                count = index.block_count.new_zeros(1, 1, 1)
                ids = index.block_index.new_zeros(1, 1, 1, 0)
            column_counts.append(count.expand(batch, len(heads), rows))
            column_ids.append(F.pad(ids, (0, width - ids.shape[3])).expand(batch, len(heads), rows, -1))
        column_count = torch.cat(column_counts, 1)[:, order]
        column_index = torch.cat(column_ids, 1)[:, order]
    return BlockIndex(torch.cat(counts, 1)[:, order], torch.cat(blocks, 1)[:, order], column_count, column_index)

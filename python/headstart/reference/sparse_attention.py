"""Sparse attention in plain torch: what the kernels must compute, written to be read.

Scores and sums are float32. For float64 inputs, which the tests use as the truth, they are float64. Queries are
processed in chunks, so that no Nq × Nk tensor of all heads exists at once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def scatter_blocks(count: torch.Tensor, index: torch.Tensor, blocks: int) -> torch.Tensor:
    """(count [...], ids [..., T]) to bool [..., blocks], True where an id is listed. Ids outside it are ignored."""
    slots = torch.arange(index.shape[-1], device=index.device)
    used = (slots < count.unsqueeze(-1)) & (index >= 0) & (index < blocks)
    listed = torch.zeros(*index.shape[:-1], blocks + 1, dtype=torch.bool, device=index.device)
    listed.scatter_(-1, torch.where(used, index, blocks).long(), True)
    return listed[..., :blocks]


def compact(selected: torch.Tensor, capacity: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [..., N] to (count int32 [...], ids int32 [..., capacity]). Ids are ascending, and unused entries are 0."""
    n = selected.shape[-1]
    capacity = n if capacity is None else capacity
    count = selected.sum(-1, dtype=torch.int32)
    ids = torch.arange(n, device=selected.device, dtype=torch.int32)
    order = torch.where(selected, ids, n).sort(-1).values[..., :capacity]
    return count, torch.where(order < n, order, 0).to(torch.int32)


def pool_mask(mask: torch.Tensor, block_q: int, block_k: int) -> torch.Tensor:
    """bool [B, H, Nq, Nk] to bool [B, H, R, T], True where a block holds any True."""
    nq, nk = mask.shape[-2:]
    padded = F.pad(mask, (0, -nk % block_k, 0, -nq % block_q))
    return padded.unflatten(-1, (-1, block_k)).any(-1).unflatten(-2, (-1, block_q)).any(-2)


def visible(
    rows: torch.Tensor,
    nq: int,
    nk: int,
    causal: bool,
    kv_start: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """bool [B or 1, 1, len(rows), nk]: the keys that causality, window and left padding let the queries `rows` see."""
    keys = torch.arange(nk, device=rows.device)
    positions = (rows + nk - nq).unsqueeze(-1)
    seen = torch.ones(len(rows), nk, dtype=torch.bool, device=rows.device)
    if causal:
        seen = keys <= positions
    if window is not None:
        seen = seen & (keys > positions - window)
    seen = seen[None, None]
    if kv_start is not None:
        seen = seen & (keys >= kv_start[:, None, None, None])
    return seen


def index_to_mask(
    block_count,
    block_index,
    column_count,
    column_index,
    kv_start=None,
    *,
    nq: int,
    nk: int,
    causal: bool,
    block_q: int,
    block_k: int,
    rows: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """bool [B, Hi, len(rows), nk], True where a query attends a key; `rows` defaults to all nq queries."""
    if rows is None:
        rows = torch.arange(nq, device=block_count.device)
    blocks = scatter_blocks(block_count, block_index, -(-nk // block_k))
    attended = blocks.repeat_interleave(block_k, -1)[..., :nk]
    if column_count is not None:
        attended = attended | scatter_blocks(column_count, column_index, nk)
    return attended[:, :, rows // block_q] & visible(rows, nq, nk, causal, kv_start, window)


def sparse_attention(
    q,
    k,
    v,
    block_count,
    block_index,
    column_count=None,
    column_index=None,
    kv_start=None,
    *,
    causal: bool = True,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    window: int | None = None,
):
    b, hq, nq, d = q.shape
    hkv, nk = k.shape[1], k.shape[2]
    scale = 1 / math.sqrt(d) if scale is None else scale
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.to(work).repeat_interleave(hq // hkv, 1)
    v = v.to(work).repeat_interleave(hq // hkv, 1)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=work)
    # The index is expanded for one chunk of queries at a time. A chunk is one block of queries, or as many as keep its
    # float32 scores within 16 MiB a head.
    chunk = max(block_q, (2**22 // max(nk, 1)) // block_q * block_q)
    for first in range(0, nq, chunk):
        rows = torch.arange(first, min(first + chunk, nq), device=q.device)
        mask = index_to_mask(
            block_count,
            block_index,
            column_count,
            column_index,
            kv_start,
            nq=nq,
            nk=nk,
            causal=causal,
            block_q=block_q,
            block_k=block_k,
            rows=rows,
            window=window,
        ).repeat_interleave(hq // block_count.shape[1], 1)
        scores = (q[:, :, first : first + chunk].to(work) @ k.mT) * scale
        scores = scores.masked_fill(~mask, -math.inf)
        row_lse = scores.logsumexp(-1)
        weights = torch.exp(scores - row_lse.masked_fill(row_lse == -math.inf, 0).unsqueeze(-1))
        out[:, :, first : first + chunk] = (weights @ v).to(q.dtype)
        lse[:, :, first : first + chunk] = row_lse
    return out, lse.to(torch.float32)


def merge_attention(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.masked_fill(lse == -math.inf, 0)
    work = torch.promote_types(out_a.dtype, torch.float32)
    weight_a, weight_b = torch.exp(lse_a - finite).unsqueeze(-1), torch.exp(lse_b - finite).unsqueeze(-1)
    total = (weight_a + weight_b).masked_fill((lse == -math.inf).unsqueeze(-1), 1)
    weight_a, weight_b = weight_a / total, weight_b / total
    out = weight_a * out_a.to(work) + weight_b * out_b.to(work)
    return out.to(out_a.dtype).contiguous(), lse


def head_density(
    block_count, block_index, column_count, column_index, *, nq, nk, causal, block_q, block_k
) -> torch.Tensor:
    """float64 [Hi]: attended pairs over visible pairs, counted per block row, without a dense mask."""
    device = block_count.device
    blocks = scatter_blocks(block_count, block_index, -(-nk // block_k))
    batch, _, rows, _ = blocks.shape
    begin = torch.arange(rows, device=device)[:, None] * block_q
    end = torch.clamp(begin + block_q, max=nq)
    starts = torch.arange(blocks.shape[-1], device=device) * block_k
    size = torch.clamp(nk - starts, max=block_k)
    if causal:
        # In a block that starts at s, query i sees min(max(i + nk - nq + 1 - s, 0), size) keys. `up_to` sums these
        # numbers from the first query that sees any key.
        def up_to(seen):
            seen = torch.clamp(seen, min=0)
            whole = torch.clamp(seen - size, min=0)
            return (seen - whole) * (seen - whole + 1) // 2 + whole * size

        per_row = up_to(end + nk - nq - starts) - up_to(begin + nk - nq - starts)  # [R, T]
    else:
        per_row = (end - begin) * size
    attended = (blocks * per_row).sum((0, 2, 3), dtype=torch.int64)
    if column_count is not None:
        used = torch.arange(column_index.shape[-1], device=device) < column_count.unsqueeze(-1)
        used = used.expand(-1, -1, rows, -1)
        columns = column_index.long().clamp(0, nk - 1).expand(-1, -1, rows, -1)
        alone = used & ~blocks.gather(-1, columns // block_k)
        # Query i of the row sees a column at position c if i + nk - nq >= c.
        first_seen = columns - (nk - nq) if causal else torch.zeros_like(columns)
        attended = attended + (torch.clamp(end - torch.maximum(first_seen, begin), min=0) * alone).sum((0, 2, 3))
    unseen = max(nq - nk, 0) if causal else 0  # queries before the first key
    visible_pairs = (nq - unseen) * (nk - nq + 1 + unseen + nk) // 2 if causal else nq * nk
    return attended.double() / max(visible_pairs * batch, 1)


def to_minference(block_count, block_index, column_count, column_index, block_k):
    block_offset = block_index * block_k
    b, h, r, _ = block_index.shape
    if column_count is None:
        return block_count, block_offset, torch.zeros_like(block_count), block_index.new_zeros(b, h, r, 0)
    used = torch.arange(column_index.shape[-1], device=column_index.device) < column_count.unsqueeze(-1)
    used, columns = used.expand(b, h, r, -1), column_index.expand(b, h, r, -1)
    last = int(torch.where(used, columns, 0).max()) if columns.numel() else 0
    blocks = scatter_blocks(block_count, block_index, last // block_k + 1)
    alone = used & ~blocks.gather(-1, torch.where(used, columns, 0).long() // block_k)
    big = torch.iinfo(torch.int32).max
    ordered = torch.where(alone, columns, big).sort(-1).values
    count = alone.sum(-1, dtype=torch.int32)
    return block_count, block_offset, count, torch.where(ordered == big, 0, ordered)


def from_minference(block_count, block_offset, column_count, column_index, block_k, nk=None):
    device = block_offset.device
    used = torch.arange(block_offset.shape[-1], device=device) < block_count.unsqueeze(-1)
    aligned = used & (block_offset % block_k == 0)
    top = int(torch.where(used, block_offset, 0).max()) if block_offset.numel() else 0
    used_columns = torch.arange(column_index.shape[-1], device=device) < column_count.unsqueeze(-1)
    top = max(top + block_k, int(torch.where(used_columns, column_index, 0).max()) + 1 if column_index.numel() else 0)
    blocks = torch.zeros(*block_count.shape, -(-top // block_k) + 1, dtype=torch.bool, device=device)
    spare = blocks.shape[-1] - 1
    blocks.scatter_(-1, torch.where(aligned, block_offset // block_k, spare).long(), True)
    blocks[..., spare] = False
    # The tokens of unaligned blocks and the columns, without those that an aligned block covers.
    tokens = torch.zeros(*block_count.shape, (spare + 1) * block_k, dtype=torch.bool, device=device)
    dump = tokens.shape[-1] - 1
    inside = block_offset.unsqueeze(-1) + torch.arange(block_k, device=device)
    keep = (used & ~aligned).unsqueeze(-1) & (inside >= 0)
    tokens.scatter_(-1, torch.where(keep, inside, dump).flatten(-2).long(), True)
    tokens.scatter_(-1, torch.where(used_columns, column_index, dump).long(), True)
    tokens[..., dump] = False
    if nk is not None:
        tokens[..., nk:] = False
    tokens &= ~blocks.repeat_interleave(block_k, -1)
    count, index = compact(blocks[..., :spare])
    column_count, columns = compact(tokens)
    width = max(int(column_count.max()) if column_count.numel() else 0, 1)
    return count, index, column_count, columns[..., :width].contiguous()

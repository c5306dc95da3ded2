"""The four index builders of sparse prefill in plain torch: what the kernels must compute, written to be read.

Each returns the tensors of a `BlockIndex`. Of equal scores, the one with the lower id wins, so results are
deterministic.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .sparse_attention import compact


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def row_positions(nq: int, nk: int, block_q: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Key positions of the first and the last query of every query block, int64 [R] each."""
    rows = torch.arange(ceil_div(nq, block_q), device=device)
    first = rows * block_q + nk - nq
    return first, torch.clamp(first + block_q, max=nk) - 1


def forced_blocks(
    nq: int, nk: int, sink: int, local: int, kv_start: torch.Tensor | None, block_q: int, block_k: int, device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(forced, visible), bool [B or 1, 1, R, T].

    A block is visible if it holds a key that one of the row's queries may see. A visible block is forced if it holds
    one of the first `sink` keys, or a key in the window of one of the row's queries. The window is the query's own
    position and the `local` - 1 keys before it.
    """
    first, last = row_positions(nq, nk, block_q, device)
    start = torch.zeros(1, dtype=torch.int64, device=device) if kv_start is None else kv_start.long().clamp(min=0)
    start = start[:, None, None, None]
    begin = torch.arange(ceil_div(nk, block_k), device=device) * block_k
    end = begin + block_k
    first, last = first[:, None], last[:, None]
    visible = (begin <= last) & (end > start) & (last >= start)
    sinks = (begin < start + sink) if sink > 0 else torch.zeros_like(begin < start)
    window = (end > first - local + 1) if local > 0 else torch.zeros_like(visible)
    return visible & (sinks | window), visible


def a_shape_index(nq, nk, *, sink, local, kv_start, block_q, block_k, device):
    forced, _ = forced_blocks(nq, nk, sink, local, kv_start, block_q, block_k, device)
    return compact(forced, a_shape_capacity(nk, sink, local, kv_start is not None, block_q, block_k))


def a_shape_capacity(nk: int, sink: int, local: int, padded: bool, block_q: int, block_k: int) -> int:
    """The most blocks that a row can need. A run of n keys can touch (n - 2) // block_k + 2 blocks."""
    sinks = ceil_div(sink, block_k) + (1 if padded and sink > 0 else 0)
    window = ceil_div(local + block_q - 1, block_k) + 1 if local > 0 else 0
    return min(sinks + window, ceil_div(nk, block_k))


def expand_heads(k: torch.Tensor, hq: int) -> torch.Tensor:
    return k.repeat_interleave(hq // k.shape[1], 1)


def keep_best(scores: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """bool in the shape of `scores` [..., N]: True at the `count` highest (int, or int64 [..., 1]), never at -inf."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < count) & (scores > -math.inf)


# --- vertical-slash ------------------------------------------------------------------------------------------------


def vertical_slash_index(
    q, k, vertical_size, slash_size, *, last_q, sink, local, kv_start, scale, block_q, block_k, max_blocks, max_columns
):
    b, hq, nq, d = q.shape
    nk = k.shape[2]
    device = q.device
    last_q = min(last_q, nq)
    scale = 1 / math.sqrt(d) if scale is None else scale
    # Softmax of the last queries, causal.
    position = torch.arange(nk - last_q, nk, device=device)
    keys = torch.arange(nk, device=device)
    start = torch.zeros(b, dtype=torch.int64, device=device) if kv_start is None else kv_start.long()
    seen = (keys <= position[:, None]) & (keys >= start[:, None, None, None])
    scores = (q[:, :, nq - last_q :].float() @ expand_heads(k, hq).float().mT) * scale
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)

    # Vertical: the columns with the largest sums, sinks first.
    vertical = weights.sum(-2).masked_fill(keys < start[:, None, None], -math.inf)
    sinks = (keys < (start[:, None, None] + sink)) & (keys >= start[:, None, None])
    vertical = vertical.masked_fill(sinks, math.inf)
    column_capacity = min(vertical_size if max_columns is None else min(vertical_size, max_columns), nk)
    column_count, column_index = compact(keep_best(vertical, column_capacity), column_capacity)

    # Slash: sums along diagonals (offset = query position - key position), pooled into bands of one block.
    offset = (position[:, None] - keys).clamp(min=0)
    slash = weights.new_zeros(b, hq, nk).scatter_add_(-1, offset.flatten().expand(b, hq, -1), weights.flatten(-2))
    first_row, last_row = row_positions(nq, nk, block_q, device)
    bands = nk // block_k + 2 + block_q // block_k
    mass, forced = band_mass(slash, bands, local, nq, nk, block_q, block_k)
    mass = mass.masked_fill(forced, math.inf)
    wanted = ceil_div(slash_size, block_k)
    wanted = min(wanted if max_blocks is None else min(wanted, max_blocks), ceil_div(nk, block_k))
    kept = keep_best(mass, wanted)  # [B, Hq, bands]

    # In every row, band t is the block that stands t blocks before the block of the row's last key.
    anchor = last_row // block_k
    blocks = torch.arange(ceil_div(nk, block_k), device=device)
    band = anchor[:, None] - blocks
    selected = kept[:, :, band.clamp(0, bands - 1)] & (band >= 0)
    selected &= (blocks + 1) * block_k > start[:, None, None, None]
    selected &= last_row[:, None] >= start[:, None, None, None]
    count, index = compact(selected, wanted)
    return count, index, column_count.unsqueeze(2), column_index.unsqueeze(2)


def band_mass(slash: torch.Tensor, bands: int, local: int, nq: int, nk: int, block_q: int, block_k: int):
    """The mass [..., bands] of the bands, and bool [bands], True for the bands that hold the local window.

    In a row whose last query stands at p, band t is key block p // block_k - t. Let e be the distance from p to the end
    of its key block. Take a query w positions before p, and a key `offset` positions before this query. The key lies in
    band (w + offset + e) // block_k. The mass of a diagonal is the average over the positions w of a block, so two
    neighbouring bands share it (three if block_q is twice block_k).
    """
    width = max(block_q, block_k)
    e = edge(nq, nk, block_q, block_k)
    shifted = torch.arange(slash.shape[-1], device=slash.device) + e
    band, within = shifted // block_k, shifted % block_k
    mass = slash.new_zeros(*slash.shape[:-1], bands)
    spread = width // block_k
    for step in range(spread + 1):
        share = (block_k - within) if step == 0 else within if step == spread else torch.full_like(within, block_k)
        target = (band + step).expand_as(slash)
        mass.scatter_add_(-1, target, slash * (share / width))
    forced = torch.arange(bands, device=slash.device) <= (local - 1 + e) // block_k if local > 0 else None
    return mass, torch.zeros(bands, dtype=torch.bool, device=slash.device) if forced is None else forced


def edge(nq: int, nk: int, block_q: int, block_k: int) -> int:
    """The distance from a full row's last query to the end of its key block, or 0 if it differs between rows."""
    return (block_k - 1 - (nk - nq + block_q - 1) % block_k) if block_q >= block_k else 0


# --- block top-k ---------------------------------------------------------------------------------------------------


def pool_mean(x: torch.Tensor, block: int, start: torch.Tensor | None = None) -> torch.Tensor:
    """Means over blocks of tokens, float32 [B, H, ceil(N / block), D], without the tokens before `start` [B]."""
    b, h, n, d = x.shape
    weight = torch.ones(b, 1, n, 1, device=x.device)
    if start is not None:
        weight = (torch.arange(n, device=x.device) >= start[:, None]).float()[:, None, :, None]
    pad = (0, 0, 0, -n % block)
    total = F.pad(x.float() * weight, pad).unflatten(2, (-1, block)).sum(3)
    return total / F.pad(weight, pad).unflatten(2, (-1, block)).sum(3).clamp(min=1)


def block_topk_index(q, k, top_k, *, sink, local, kv_start, block_q, block_k):
    nq, nk = q.shape[2], k.shape[2]
    forced, visible = forced_blocks(nq, nk, sink, local, kv_start, block_q, block_k, q.device)
    query_start = None if kv_start is None else kv_start - (nk - nq)
    pooled_q = pool_mean(q, block_q, query_start)
    pooled_k = expand_heads(pool_mean(k, block_k, kv_start), q.shape[1])
    scores = pooled_q @ pooled_k.mT
    scores = scores.masked_fill(forced, math.inf).masked_fill(~visible, -math.inf)
    capacity = min(top_k, ceil_div(nk, block_k))
    return compact(keep_best(scores, capacity), capacity)


# --- adaptive ------------------------------------------------------------------------------------------------------


def antidiagonal_shares(q, k, *, stride, kv_start, scale, block_q, block_k):
    """The estimated softmax share that each query group of a row gives each block, float32
    [B, Hq, R, block_q / stride, T].

    Tokens are taken in groups of `stride`. The score of a query group and a key group is the mean of q·k along the
    antidiagonal of their stride × stride tile. So every query and every key of the groups counts once, and any vertical
    or slash line through the tile crosses the antidiagonal. A query group sees a key group if its last query sees the
    first key.
    """
    b, hq, nq, d = q.shape
    nk = k.shape[2]
    device = q.device
    if kv_start is not None:
        k = k * (torch.arange(nk, device=device) >= kv_start[:, None])[:, None, :, None].to(k.dtype)
    group_q = F.pad(q.float(), (0, 0, 0, -nq % stride)).unflatten(2, (-1, stride))
    group_k = F.pad(k.float(), (0, 0, 0, -nk % stride)).unflatten(2, (-1, stride)).flip(3)
    scores = group_q.flatten(3) @ expand_heads(group_k.flatten(3), hq).mT * (scale / stride)
    last_query = torch.clamp(torch.arange(group_q.shape[2], device=device) * stride + stride, max=nq) - 1 + nk - nq
    first_key = torch.arange(group_k.shape[2], device=device) * stride
    seen = first_key <= last_query[:, None]
    if kv_start is not None:
        seen = seen & (first_key + stride > kv_start[:, None, None, None])
        seen = seen & (last_query[:, None] >= kv_start[:, None, None, None])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    rows, columns = block_q // stride, block_k // stride
    padded = F.pad(weights, (0, -weights.shape[-1] % columns, 0, -weights.shape[-2] % rows))
    return padded.unflatten(-1, (-1, columns)).sum(-1).unflatten(-2, (-1, rows))


def sampled_shares(q, k, samples, *, kv_start, scale, block_q, block_k):
    """Softmax shares of `samples` queries of every row, including its last, float32 [B, Hq, R, samples, T]."""
    hq, nq, nk = q.shape[1], q.shape[2], k.shape[2]
    rows = torch.arange(ceil_div(nq, block_q), device=q.device)
    within = (torch.arange(samples, device=q.device) + 1) * block_q // samples
    query = torch.clamp(rows[:, None] * block_q + within, max=nq).flatten() - 1
    keys = torch.arange(nk, device=q.device)
    position = query[:, None] + nk - nq
    seen = keys <= position
    if kv_start is not None:
        seen = seen & (keys >= kv_start[:, None, None, None])
    scores = q[:, :, query].float() @ expand_heads(k, hq).float().mT * scale
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    shares = F.pad(weights, (0, -nk % block_k)).unflatten(-1, (-1, block_k)).sum(-1)
    return shares.unflatten(-2, (-1, samples))


def adaptive_block_index(
    q, k, threshold, *, stride, sink, local, kv_start, scale, block_q, block_k, max_blocks, head_threshold, samples
):
    d, nq, nk = q.shape[3], q.shape[2], k.shape[2]
    scale = 1 / math.sqrt(d) if scale is None else scale
    options = dict(kv_start=kv_start, scale=scale, block_q=block_q, block_k=block_k)
    groups = antidiagonal_shares(q, k, stride=stride, **options)
    if samples == 0:
        mass = groups.sum(-2)
    else:
        mass = torch.maximum(groups.amax(-2), sampled_shares(q, k, samples, **options).amax(-2))
    forced, visible = forced_blocks(nq, nk, sink, local, kv_start, block_q, block_k, q.device)
    mass = mass.masked_fill(~visible, 0.0)
    if head_threshold is None:
        goal = threshold * mass.sum(-1, keepdim=True)
    else:
        goal = head_threshold[:, None, None] * mass.sum(-1, keepdim=True)
    # Forced blocks come first, then the heaviest. A block is taken if the blocks before it hold less than the goal.
    key = mass.masked_fill(forced, math.inf).masked_fill(~visible, -math.inf)
    order = key.sort(dim=-1, descending=True, stable=True).indices
    before = mass.gather(-1, order).cumsum(-1) - mass.gather(-1, order)
    take = torch.zeros_like(visible.expand_as(mass)).scatter(-1, order, before < goal)
    blocks = ceil_div(nk, block_k)
    capacity = blocks if max_blocks is None else min(max_blocks, blocks)
    chosen = (take | forced) & visible
    return compact(chosen & keep_best(key, capacity), capacity)

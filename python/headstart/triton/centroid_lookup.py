"""Triton kernels of `centroid_lookup`: they find the runs of permuted keys that each block of queries attends.

A row is a block of queries of a KV head's group: G · block_q query vectors that share one selection. A level is a set
of centroids with the number of keys below each. With parents there are two levels. In the second level a row uses only
a list of the clusters: the children of the parents that it kept.

    cluster_lse_kernel     a tile of a row's queries × a split of the clusters; maximum and sum of every query online

                             clusters (or the row's list)
          row r   ┌──────┬──────┬──────┬─ ─     part [splits, queries] = log2 Σ_j n_j exp2(S_ij) over the split
          G ·     │  S   │  S   │  S   │        S = scale · q cᵀ in base 2, in registers, never in memory
          block_q └──────┴──────┴──────┴─ ─     empty clusters are -inf in the maximum as in the sum

    cluster_best_kernel    a program keeps one tile of clusters, and loops over the row's queries

                  ┌──────┐                      limit_i = log2(threshold) + log2 Σ (the splits, in one order)
          row r   │  S   │ ↓  tile by tile      best [rows, C] = largest S_ij - log2 Σ_i of the queries that keep it,
                  └──────┘                                       -inf if no query keeps it (S_ij <= limit_i for all)

    take_kernel            one program a row. If the kept clusters do not fit, it finds the score of the last one that
                           does, digit by digit from the top (as in block_select.py, but weighted by keys). Then it
                           writes how many keys each cluster gives, as a running sum: ends [rows, C], count [rows]
    expand_runs_kernel     slot s of a row lies in the first cluster with ends > s; each lane does a binary search

The expanded runs of the first level are runs of children. They are the list of the second level.

Floor: 4 · B · Hq · Nq · C · D operations in two passes and one exponential a score. Every tile of queries reads the
centroids from L2 twice. Tensor cores limit prefill. A decode step reads every centroid from memory once, 2 · Hkv · C ·
D bytes, and a second time from L2. The splits give the GPU enough programs. `best` and `ends` take 8 · C bytes a row,
and its columns take 4 · N bytes. Rows are processed in turns, so that all arrays stay below WORKSPACE.

Every sum has one order and nothing adds with atomics, so equal inputs give equal columns. No shape depends on data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import LN2, device_limits, load_rows, on, precision, split_head_dim, stride_unit

WORKSPACE = 2**28  # the most bytes of intermediate arrays at a time
MAX_SPLITS = 64
SLOTS = 1024  # the columns that a program writes at a time


# --- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def _place(local, first_row, rows, heads):
    """(batch, KV head, row of queries) of a row of this turn."""
    stream = (first_row + local) // rows
    return (stream // heads).to(tl.int64), (stream % heads).to(tl.int64), (first_row + local) % rows


@triton.jit
def _level(at, listed, ids, offsets, parent_offsets, entries, clusters, LISTED: tl.constexpr, PARENTS: tl.constexpr):
    """(entry of the level, whether it exists, the number of its keys) at positions `at` of a row's list."""
    entry = at
    inside = at < listed
    if LISTED:
        entry = tl.load(ids + at, mask=inside, other=-1)
        inside = inside & (entry >= 0) & (entry < entries)
    entry = tl.where(inside, entry, 0)
    first = entry
    end = entry + 1
    if PARENTS:
        # The offsets are data that was not checked. The clamp keeps the address inside the array.
        first = tl.minimum(tl.maximum(tl.load(parent_offsets + first), 0), clusters)
        end = tl.minimum(tl.maximum(tl.load(parent_offsets + end), 0), clusters)
    keys = tl.load(offsets + end) - tl.load(offsets + first)
    return entry, inside, tl.where(inside, keys, 0)


@triton.jit
def _queries(first, row, group, block_q, nq, stride_h, stride_n, UNIT: tl.constexpr, BLOCK_M: tl.constexpr):
    """(head of the group, offset in elements, whether the query exists) of BLOCK_M query vectors of a row."""
    lane = first + tl.arange(0, BLOCK_M)
    head = lane // block_q
    query = row * block_q + lane % block_q
    real = (head < group) & (query < nq)
    return head, (head.to(tl.int64) * stride_h + query.to(tl.int64) * stride_n) * UNIT, real


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_ch", "stride_cn", "first_row", "heads", "rows", "group", "nq",
        "block_q", "entries", "clusters", "tiles_m", "splits", "pitch",
    ],
    do_not_specialize_on_alignment=["offsets", "parent_offsets", "ids", "id_count", "part"],
)  # fmt: skip
def cluster_lse_kernel(
    q,
    centroids,
    offsets,
    parent_offsets,
    ids,
    id_count,
    part,
    scale,
    # Strides are in units of UNIT elements. UNIT is a constant, so the compiler can use 16-byte loads.
    stride_qb,
    stride_qh,
    stride_qn,
    stride_ch,
    stride_cn,
    first_row,
    heads,
    rows,
    group,
    nq,
    block_q,
    entries,
    clusters,
    tiles_m,
    splits,
    pitch,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LISTED: tl.constexpr,
    PARENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    unit = tl.program_id(0)
    split = tl.program_id(1)
    local = unit // tiles_m
    batch, head, row = _place(local, first_row, rows, heads)
    q += (batch * stride_qb + head * group * stride_qh) * UNIT
    _, at, real = _queries(unit % tiles_m * BLOCK_M, row, group, block_q, nq, stride_qh, stride_qn, UNIT, BLOCK_M)
    q0 = load_rows(q, at, 1, real, 0, D0, D, True)
    if D1 > 0:
        q1 = load_rows(q, at, 1, real, D0, D1, D, True)
    centroids += head * stride_ch * UNIT
    step = stride_cn.to(tl.int64) * UNIT
    offsets += head * (clusters + 1)
    parent_offsets += head * (entries + 1)
    ids += local.to(tl.int64) * entries
    listed = entries
    if LISTED:
        listed = tl.load(id_count + local)
    tiles = (listed + BLOCK_N - 1) // BLOCK_N
    share = (tiles + splits - 1) // splits
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(split * share, tl.minimum((split + 1) * share, tiles)):
        position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        entry, inside, keys = _level(position, listed, ids, offsets, parent_offsets, entries, clusters, LISTED, PARENTS)
        # This also loads the centroids of empty clusters. Waiting for the sizes would delay the loads.
        c0 = load_rows(centroids, entry, step, inside, 0, D0, D, True)
        scores = tl.dot(q0, tl.trans(c0), input_precision=PRECISION)
        if D1 > 0:
            c1 = load_rows(centroids, entry, step, inside, D0, D1, D, True)
            scores = tl.dot(q1, tl.trans(c1), scores, input_precision=PRECISION)
        present = keys > 0
        weight = tl.log2(tl.where(present, keys, 1).to(tl.float32))
        scores = tl.where(present[None, :], scores * scale + weight[None, :], float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # For a query that has seen no cluster yet, any finite reference avoids -inf - -inf in the exponent.
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - reference) + tl.sum(tl.exp2(scores - reference[:, None]), 1)
        top = new_top
    lse = tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))
    tl.store(part + split.to(tl.int64) * pitch + unit.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), lse)


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_ch", "stride_cn", "first_row", "heads", "rows", "group", "nq",
        "block_q", "entries", "clusters", "tiles_m", "splits", "pitch", "thresholds",
    ],
    do_not_specialize_on_alignment=["offsets", "parent_offsets", "ids", "id_count", "part", "threshold", "best"],
)  # fmt: skip
def cluster_best_kernel(
    q,
    centroids,
    offsets,
    parent_offsets,
    ids,
    id_count,
    part,
    threshold,
    best,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_ch,
    stride_cn,
    first_row,
    heads,
    rows,
    group,
    nq,
    block_q,
    entries,
    clusters,
    tiles_m,
    splits,
    pitch,
    thresholds,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LISTED: tl.constexpr,
    PARENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    local = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_N
    listed = entries
    if LISTED:
        listed = tl.load(id_count + local)
    if first >= listed:
        return
    batch, head, row = _place(local, first_row, rows, heads)
    q += (batch * stride_qb + head * group * stride_qh) * UNIT
    centroids += head * stride_ch * UNIT
    step = stride_cn.to(tl.int64) * UNIT
    offsets += head * (clusters + 1)
    parent_offsets += head * (entries + 1)
    ids += local.to(tl.int64) * entries
    position = first + tl.arange(0, BLOCK_N)
    entry, inside, keys = _level(position, listed, ids, offsets, parent_offsets, entries, clusters, LISTED, PARENTS)
    c0 = load_rows(centroids, entry, step, inside, 0, D0, D, True)
    if D1 > 0:
        c1 = load_rows(centroids, entry, step, inside, D0, D1, D, True)
    split = tl.arange(0, BLOCK_S).to(tl.int64)[:, None]
    column = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for tile in tl.range(0, tiles_m):
        lane, at, real = _queries(tile * BLOCK_M, row, group, block_q, nq, stride_qh, stride_qn, UNIT, BLOCK_M)
        q0 = load_rows(q, at, 1, real, 0, D0, D, True)
        scores = tl.dot(q0, tl.trans(c0), input_precision=PRECISION)
        if D1 > 0:
            q1 = load_rows(q, at, 1, real, D0, D1, D, True)
            scores = tl.dot(q1, tl.trans(c1), scores, input_precision=PRECISION)
        scores = scores * scale
        of_query = (local.to(tl.int64) * tiles_m + tile) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        parts = tl.load(part + split * pitch + of_query, mask=split < splits, other=float("-inf"))
        top = tl.max(parts, 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(parts - top[None, :]), 0)
        # A query without a finite sum keeps every cluster. A NaN threshold does the same.
        lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("nan"))
        at_head = ((head * group + lane) * thresholds // (heads * group)).to(tl.int32)
        share = tl.load(threshold + at_head, mask=real, other=0.0)
        limit = lse + tl.where(share <= 0, float("-inf"), tl.log2(tl.where(share <= 0, 1.0, share)))
        score = scores - lse[:, None]
        score = tl.where(score == score, score, float("inf"))
        dropped = (scores <= limit[:, None]) | (real == 0)[:, None]
        column = tl.maximum(column, tl.max(tl.where(dropped, float("-inf"), score), 0))
    column = tl.where(keys > 0, column, float("-inf"))
    tl.store(best + local.to(tl.int64) * entries + position, column, mask=position < listed)


@triton.jit
def _kept(best, ids, offsets, at, listed, entries, LISTED: tl.constexpr):
    """(key of the score, or 0 if not kept, length of the run) at positions `at` of a row's list."""
    inside = at < listed
    score = tl.load(best + at, mask=inside, other=float("-inf"))
    kept = inside & (score > float("-inf"))
    entry = at
    if LISTED:
        entry = tl.load(ids + at, mask=kept, other=0)
        kept = kept & (entry >= 0) & (entry < entries)
    length = tl.load(offsets + entry + 1, mask=kept, other=0) - tl.load(offsets + entry, mask=kept, other=0)
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)  # -0 ties with 0
    key = tl.where((bits >> 31) == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)
    return tl.where(kept, key, tl.zeros_like(key)), tl.maximum(length, 0)


@triton.jit(
    do_not_specialize=["first_row", "heads", "rows", "entries", "capacity"],
    do_not_specialize_on_alignment=["best", "ids", "id_count", "offsets", "ends", "count"],
)
def take_kernel(
    best,
    ids,
    id_count,
    offsets,
    ends,
    count,
    first_row,
    heads,
    rows,
    entries,
    capacity,
    CHUNK: tl.constexpr,
    DIGIT: tl.constexpr,
    LISTED: tl.constexpr,
):
    local = tl.program_id(0).to(tl.int64)
    _, head, _ = _place(local, first_row, rows, heads)
    best += local * entries
    ids += local * entries
    ends += local * entries
    offsets += head * (entries + 1)
    listed = entries
    if LISTED:
        listed = tl.load(id_count + local)
    lane = tl.arange(0, CHUNK)
    wanted = 0
    for first in tl.range(0, listed, CHUNK):
        key, length = _kept(best, ids, offsets, first + lane, listed, entries, LISTED)
        wanted += tl.sum(length, 0)

    # The largest key such that the clusters with this key or a larger one fill the capacity. 0 if all clusters fit.
    digits = tl.arange(0, 1 << DIGIT)
    last = tl.zeros([1], tl.uint32)
    if wanted > capacity:
        for step in tl.range(0, 32 // DIGIT):
            shift = 32 - DIGIT - step * DIGIT
            candidates = last + (digits.to(tl.uint32) << shift.to(tl.uint32))
            held = tl.zeros([1 << DIGIT], tl.int32)
            for first in tl.range(0, listed, CHUNK):
                key, length = _kept(best, ids, offsets, first + lane, listed, entries, LISTED)
                held += tl.sum(tl.where(key[:, None] >= candidates[None, :], length[:, None], 0), 0)
            digit = tl.sum(((held >= capacity) & (digits > 0)).to(tl.int32), 0)
            last += digit.to(tl.uint32) << shift.to(tl.uint32)

    above = 0
    for first in tl.range(0, listed, CHUNK):
        key, length = _kept(best, ids, offsets, first + lane, listed, entries, LISTED)
        above += tl.sum(tl.where(key > last, length, 0), 0)
    room = capacity - above
    taken = 0
    ties = 0
    for first in tl.range(0, listed, CHUNK):
        at = first + lane
        key, length = _kept(best, ids, offsets, at, listed, entries, LISTED)
        tie = tl.where(key == last, length, 0)
        before = ties + tl.cumsum(tie, 0) - tie
        length = tl.where(key > last, length, tl.minimum(tie, tl.maximum(room - before, 0)))
        tl.store(ends + at, taken + tl.cumsum(length, 0), mask=at < listed)
        ties += tl.sum(tie, 0)
        taken += tl.sum(length, 0)
    tl.store(count + local, tl.maximum(tl.minimum(taken, capacity), 0))  # clamped in case the offsets are broken


@triton.jit(
    do_not_specialize=["first_row", "heads", "rows", "entries", "capacity"],
    do_not_specialize_on_alignment=["ids", "id_count", "offsets", "ends", "count", "index"],
)
def expand_runs_kernel(
    ids,
    id_count,
    offsets,
    ends,
    count,
    index,
    first_row,
    heads,
    rows,
    entries,
    capacity,
    SLOTS: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Writes the positions of each row's keys. Entries past the count are not written."""
    local = tl.program_id(0).to(tl.int64)
    _, head, _ = _place(local, first_row, rows, heads)
    ids += local * entries
    ends += local * entries
    index += local * capacity
    offsets += head * (entries + 1)
    listed = entries
    if LISTED:
        listed = tl.load(id_count + local)
    used = tl.load(count + local)
    for first in tl.range(tl.program_id(1) * SLOTS, used, tl.num_programs(1) * SLOTS):
        slot = first + tl.arange(0, SLOTS)
        inside = slot < used
        # Every lane has `left` candidates, from `at` on. `left` is the same number in all lanes.
        at = tl.zeros([SLOTS], tl.int32)
        left = listed
        while left > 1:
            half = left // 2
            later = tl.load(ends + at + (half - 1), mask=inside, other=0) <= slot
            at += tl.where(later, half, 0)
            left -= half
        before = tl.load(ends + at - 1, mask=inside & (at > 0), other=0)
        entry = at
        if LISTED:
            entry = tl.load(ids + at, mask=inside, other=0)
        start = tl.load(offsets + entry, mask=inside, other=0)
        tl.store(index + slot, start + slot - before, mask=inside)


# --- launchers -------------------------------------------------------------------------------------------------------


class _Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    lse_stages: int
    splits: int


def _config(q: torch.Tensor, vectors: int, units: int, entries: int, listed: bool) -> _Config:
    """Tiles for rows of `vectors` query vectors, and splits of the clusters so that `units` rows fill the device."""
    if q.element_size() == 4:
        block_m, block_n = 32, 32
    else:
        block_m = 128 if q.shape[-1] <= 128 else 64  # a tile of 256 dims is 64 KiB
        block_n = block_m if vectors > 64 else 64
    block_m = min(block_m, max(16, triton.next_power_of_2(vectors)))
    programs = units * triton.cdiv(vectors, block_m)
    limits = device_limits(q.device)
    splits = max(1, min(triton.cdiv(2 * limits.processors, programs), triton.cdiv(entries, block_n), MAX_SPLITS))
    # With a list, the ids must be loaded before the centroids. Then five stages load two tiles of centroids ahead.
    stages, ahead = (5, 2) if listed else (4 if block_m < 64 else 3, 0)
    row_bytes = q.shape[-1] * q.element_size()
    while stages > 2 + ahead and (block_m + (stages - ahead) * block_n) * row_bytes > limits.shared_memory:
        stages -= 1
    return _Config(block_m, block_n, 8 if block_m == 128 else 4, stages, splits)


class _Turn(NamedTuple):
    """Rows that are processed together: the first, their number, the KV heads, and the rows of a head."""

    first: int
    count: int
    heads: int
    rows: int


class _List(NamedTuple):
    """The entries of a level that each row uses."""

    count: torch.Tensor
    ids: torch.Tensor


def _best(q, centroids, offsets, parent_offsets, threshold, seen, turn, scale, block_q) -> torch.Tensor:
    """The best score of each entry of a level that a row keeps, -inf for the other entries: [rows, entries]."""
    hq, nq, d = q.shape[1:]
    entries = centroids.shape[1]
    group = hq // turn.heads
    vectors = group * block_q
    config = _config(q, vectors, turn.count, entries, seen is not None)
    tiles_m = triton.cdiv(vectors, config.block_m)
    pitch = turn.count * tiles_m * config.block_m
    part = q.new_empty((config.splits, pitch), dtype=torch.float32)
    best = q.new_empty((turn.count, entries), dtype=torch.float32)
    d0, d1 = split_head_dim(d)
    unit = stride_unit(q, centroids[None])
    strides = [s // unit for s in (*q.stride()[:3], *centroids.stride()[:2])]
    sizes = (turn.first, turn.heads, turn.rows, group, nq, block_q, entries, offsets.shape[1] - 1)
    sizes += (tiles_m, config.splits, pitch)
    lists = (offsets, offsets if parent_offsets is None else parent_offsets)
    lists += (offsets, offsets) if seen is None else (seen.ids, seen.count)
    options = dict(D=d, D0=d0, D1=d1, UNIT=unit, BLOCK_M=config.block_m, BLOCK_N=config.block_n)
    options |= dict(LISTED=seen is not None, PARENTS=parent_offsets is not None, PRECISION=precision(q))
    options |= dict(num_warps=config.num_warps)
    cluster_lse_kernel[(turn.count * tiles_m, config.splits)](
        q, centroids, *lists, part, scale / LN2, *strides, *sizes, **options, num_stages=config.lse_stages
    )
    cluster_best_kernel[(turn.count, triton.cdiv(entries, config.block_n))](
        q,
        centroids,
        *lists,
        part,
        threshold,
        best,
        scale / LN2,
        *strides,
        *sizes,
        threshold.numel(),
        BLOCK_S=triton.next_power_of_2(config.splits),
        **options,
        num_stages=2,
    )
    return best


def _take(best, offsets, seen, turn, count, index) -> None:
    """Fills count [rows] and index [rows, capacity] with the runs of the kept entries, up to the capacity."""
    entries, capacity = best.shape[1], index.shape[1]
    ends = best.new_empty(best.shape, dtype=torch.int32)
    ids, id_count = (offsets, offsets) if seen is None else (seen.ids, seen.count)
    place = (turn.first, turn.heads, turn.rows, entries, capacity)
    chunk = min(2048, max(32, triton.next_power_of_2(entries)))
    long = entries > 4 * chunk
    take_kernel[(turn.count,)](
        best,
        ids,
        id_count,
        offsets,
        ends,
        count,
        *place,
        CHUNK=chunk,
        DIGIT=4 if long else 2,
        LISTED=seen is not None,
        num_warps=16 if long else max(1, chunk // 256),
    )
    if capacity == 0:
        return
    # Enough programs a row to fill the device. Each program loops until no columns are left.
    programs = triton.cdiv(16 * device_limits(best.device).processors, turn.count)
    expand_runs_kernel[(turn.count, min(programs, triton.cdiv(capacity, SLOTS)))](
        ids, id_count, offsets, ends, count, index, *place, SLOTS=SLOTS, LISTED=seen is not None, num_warps=4
    )


def centroid_lookup(
    q,
    centroids,
    cluster_offsets,
    threshold,
    *,
    scale,
    block_q,
    max_columns,
    parent_centroids=None,
    parent_offsets=None,
    parent_threshold=None,
):
    """`torch.ops.headstart.centroid_lookup` on Triton; see `ops/centroid_lookup.py` for the contract."""
    batch, hq, nq, _ = q.shape
    heads, clusters, _ = centroids.shape
    block_q = max(1, min(block_q, nq))
    rows = -(-nq // block_q)
    count = q.new_empty((batch, heads, rows), dtype=torch.int32)
    index = q.new_empty((batch, heads, rows, max_columns), dtype=torch.int32)
    total = count.numel()
    if total == 0 or hq == 0:
        return count.zero_(), index
    offsets, threshold = cluster_offsets.contiguous(), threshold.contiguous()
    flat_count, flat_index = count.view(total), index.view(total, max_columns)
    arrays = 2 if parent_centroids is None else 3
    at_once = max(1, WORKSPACE // (4 * arrays * clusters + 4 * hq // heads * block_q))
    if parent_centroids is not None:
        children, parent_threshold = parent_offsets.contiguous(), parent_threshold.contiguous()
    with on(q.device):
        for first in range(0, total, at_once):
            turn = _Turn(first, min(at_once, total - first), heads, rows)
            seen = None
            if parent_centroids is not None:
                best = _best(q, parent_centroids, offsets, children, parent_threshold, None, turn, scale, block_q)
                ids = q.new_empty((turn.count, clusters), dtype=torch.int32)
                seen = _List(q.new_empty(turn.count, dtype=torch.int32), ids)
                _take(best, children, None, turn, *seen)
            best = _best(q, centroids, offsets, None, threshold, seen, turn, scale, block_q)
            here = slice(first, first + turn.count)
            _take(best, offsets, seen, turn, flat_count[here], flat_index[here])
    return count, index

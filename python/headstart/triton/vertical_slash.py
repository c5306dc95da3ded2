"""Triton kernels of `vertical_slash_index`: the columns and diagonals that the last queries attend most.

                    keys, a tile a program                         last queries
                  ┌──────┬──────┬──────┬─ ─ ─┬──────┐             stay in registers
    last queries  │      │      │      │     │      │   pass 1: last_query_lse_kernel   online softmax over a split of
    (64 a tile)   │ S    │ S    │ S    │     │ S    │           the keys → lse [splits, last_q]
                  └──┬───┴──┬───┴──┬───┴─ ─ ─┴──┬───┘   pass 2: last_query_sums_kernel  the same scores again → weights
                     ▼      ▼      ▼            ▼
    vertical [Nk]   sums down the columns;      partial [query tile, BANDS, key tile]: sums by band. A diagonal crosses
                                                two bands or three, and each of its weights is shared among them
    band_mass_kernel     a band's sums over the key tiles that it crosses → mass [bands]
    select, twice        the best columns; the best bands
    spread_bands_kernel  bands → blocks of every row

Floor: each pass reads the keys of a KV head from memory once. Its query heads run side by side, so the others find the
keys in L2. A query head needs 4 · last_q · Nk · D operations and 2 · last_q · Nk exponentials. No array of size
last_q × Nk exists.

No kernel adds with atomics. Every sum has one order, so equal inputs give equal indices.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..reference.prefill_index import ceil_div, edge
from ._common import LN2, load_rows, on, precision, split_head_dim, stride_unit, token_strides
from .block_select import row_blocks, select

SPLITS = 32  # the most splits of the keys in pass 1; pass 2 reads one number of each split for every query


# --- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def _last_queries(
    q, stride, first, last_q, nq, D0: tl.constexpr, D1: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """BLOCK_M of the last `last_q` queries: their rows, and two parts of the head dim (the same one if D1 is 0)."""
    row = first + tl.arange(0, BLOCK_M)
    q0 = load_rows(q, nq - last_q + row, stride, row < last_q, 0, D0, D, True)
    if D1 > 0:
        q1 = load_rows(q, nq - last_q + row, stride, row < last_q, D0, D1, D, True)
    else:
        q1 = q0
    return row, q0, q1


@triton.jit
def _last_scores(q0, q1, k0, k1, row, keys, start, last_q, nk, scale, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [BLOCK_M, BLOCK_N] in base 2, -inf where a query does not see a key."""
    scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
    position = nk - last_q + row
    seen = (keys[None, :] <= position[:, None]) & ((keys >= start) & (keys < nk))[None, :] & (row < last_q)[:, None]
    return tl.where(seen, scores * scale, float("-inf"))


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn",
        "heads", "group", "nq", "nk", "last_q", "splits", "tiles_a_split",
    ],
    do_not_specialize_on_alignment=["kv_start", "lse"],
)  # fmt: skip
def last_query_lse_kernel(
    q,
    k,
    kv_start,
    lse,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    heads,
    group,
    nq,
    nk,
    last_q,
    splits,
    tiles_a_split,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_KV_START: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(0)
    batch = (tl.program_id(2) // heads).to(tl.int64)
    head = (tl.program_id(2) % heads).to(tl.int64)
    start = 0
    if HAS_KV_START:
        start = tl.maximum(tl.load(kv_start + batch), 0)
    k += batch * stride_kb * UNIT + head // group * stride_kh * UNIT
    step_k = stride_kn.to(tl.int64) * UNIT
    q += batch * stride_qb * UNIT + head * stride_qh * UNIT
    step_q = stride_qn.to(tl.int64) * UNIT
    row, q0, q1 = _last_queries(q, step_q, tl.program_id(1) * BLOCK_M, last_q, nq, D0, D1, D, BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(split * tiles_a_split, (split + 1) * tiles_a_split):
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        real = (keys >= start) & (keys < nk)
        k0 = load_rows(k, keys, step_k, real, 0, D0, D, True)
        k1 = k0
        if D1 > 0:
            k1 = load_rows(k, keys, step_k, real, D0, D1, D, True)
        scores = _last_scores(q0, q1, k0, k1, row, keys, start, last_q, nk, scale, D1, PRECISION)
        new_top = tl.maximum(top, tl.max(scores, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - reference) + tl.sum(tl.exp2(scores - reference[:, None]), 1)
        top = new_top
    seen = total > 0
    result = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    tl.store(lse + (tl.program_id(2).to(tl.int64) * splits + split) * last_q + row, result, mask=row < last_q)


@triton.jit
def _nearest_band(offset, first_key, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The band of the last of BLOCK_N keys, for a query `offset` positions after key 0. Negative for later keys."""
    block = first_key // BLOCK_K
    # Within a block the numerator is positive, so the division rounds down.
    return (offset - (first_key - block * BLOCK_K) - BLOCK_N + 1 + BLOCK_K) // BLOCK_K - 1 - block


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn",
        "heads", "group", "nq", "nk", "last_q", "splits", "query_tiles", "key_tiles", "edge",
    ],
    do_not_specialize_on_alignment=["kv_start", "lse", "vertical", "partial"],
)  # fmt: skip
def last_query_sums_kernel(
    q,
    k,
    kv_start,
    lse,
    vertical,
    partial,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    heads,
    group,
    nq,
    nk,
    last_q,
    splits,
    query_tiles,
    key_tiles,
    edge,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BANDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_KV_START: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over BLOCK_N keys: `vertical` [stream, nk] and `partial` [stream, query tile, BANDS, key tile].

    `partial` holds the masses of the BANDS bands in which these keys can lie for a tile of queries, the nearest first.
    """
    key_tile = tl.program_id(0)
    stream = tl.program_id(1).to(tl.int64)
    batch = stream // heads
    head = stream % heads
    start = 0
    if HAS_KV_START:
        start = tl.maximum(tl.load(kv_start + batch), 0)
    k += batch * stride_kb * UNIT + head // group * stride_kh * UNIT
    step_k = stride_kn.to(tl.int64) * UNIT
    q += batch * stride_qb * UNIT + head * stride_qh * UNIT
    step_q = stride_qn.to(tl.int64) * UNIT
    keys = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real = (keys >= start) & (keys < nk)
    k0 = load_rows(k, keys, step_k, real, 0, D0, D, True)
    k1 = k0
    if D1 > 0:
        k1 = load_rows(k, keys, step_k, real, D0, D1, D, True)
    column = tl.zeros([BLOCK_N], tl.float32)
    split = tl.arange(0, BLOCK_S)
    for tile in tl.range(0, query_tiles):
        row, q0, q1 = _last_queries(q, step_q, tile * BLOCK_M, last_q, nq, D0, D1, D, BLOCK_M)
        scores = _last_scores(q0, q1, k0, k1, row, keys, start, last_q, nk, scale, D1, PRECISION)
        parts = tl.load(
            lse + (stream * splits + split)[:, None] * last_q + row[None, :],
            mask=(split < splits)[:, None] & (row < last_q)[None, :],
            other=float("-inf"),
        )
        top = tl.max(parts, 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(parts - top[None, :]), 0)
        inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
        weights = tl.exp2(scores - top[:, None]) * inverse[:, None]
        column += tl.sum(weights, 0)
        # A diagonal covers the WIDTH positions from `offset` on. A band gets the share of them that it contains.
        offset = (nk - last_q + edge + row)[:, None] - keys[None, :]
        nearest = _nearest_band(nk - last_q + edge + tile * BLOCK_M, key_tile * BLOCK_N, BLOCK_N, BLOCK_K)
        at = partial + ((stream * query_tiles + tile) * BANDS) * key_tiles + key_tile
        for i in tl.static_range(0, BANDS):
            low = (nearest + i) * BLOCK_K
            inside = tl.minimum(offset + WIDTH, low + BLOCK_K) - tl.maximum(offset, low)
            shared = weights * tl.maximum(inside, 0).to(tl.float32)
            tl.store(at + i * key_tiles, tl.sum(tl.sum(shared, 1), 0) * (1.0 / WIDTH))
    tl.store(vertical + stream * nk + keys, column, mask=keys < nk)


@triton.jit(do_not_specialize=["nk", "last_q", "query_tiles", "key_tiles", "bands", "edge"])
def band_mass_kernel(
    partial,
    mass,
    nk,
    last_q,
    query_tiles,
    key_tiles,
    bands,
    edge,
    BLOCK_K: tl.constexpr,
    BANDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """mass [stream, bands]. For one tile of queries, each next key block is one band nearer.

    So a band has place i among the BANDS bands in one key block only.
    """
    band = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    stream = tl.program_id(1).to(tl.int64)
    total = tl.zeros([CHUNK], tl.float32)
    PARTS: tl.constexpr = BLOCK_K // BLOCK_N
    for step in tl.range(0, query_tiles * PARTS):
        tile = step // PARTS
        part = step % PARTS
        nearest = _nearest_band(nk - last_q + edge + tile * BLOCK_M, part * BLOCK_N, BLOCK_N, BLOCK_K)
        for i in tl.static_range(0, BANDS):
            key_tile = (nearest + i - band) * PARTS + part
            at = ((stream * query_tiles + tile) * BANDS + i) * key_tiles + key_tile
            total += tl.load(partial + at, mask=(key_tile >= 0) & (key_tile < key_tiles), other=0.0)
    tl.store(mass + stream * bands + band, total, mask=band < bands)


@triton.jit(do_not_specialize=["heads", "rows", "nq", "nk", "capacity"])
def spread_bands_kernel(
    band_count,
    band_index,
    kv_start,
    count,
    index,
    heads,
    rows,
    nq,
    nk,
    capacity,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_KV_START: tl.constexpr,
):
    """The block of each band that a row sees. Bands ascend and blocks descend, so the bands are taken from the last."""
    row = tl.program_id(0)
    stream = tl.program_id(1).to(tl.int64)
    begin, end, _, _ = row_blocks(kv_start, stream // heads, row, nq, nk, 0, 0, BLOCK_Q, BLOCK_K, HAS_KV_START)
    anchor = (tl.minimum(nk - nq + (row + 1) * BLOCK_Q, nk) - 1) // BLOCK_K
    kept = tl.load(band_count + stream)
    bands = band_index + stream * capacity
    at = stream * rows + row
    listed = index + at * capacity
    # The bands that reach before the row's first block are the last of the list. Only the first `seen` bands are used.
    seen = 0
    for first in tl.range(0, kept, CHUNK):
        i = first + tl.arange(0, CHUNK)
        block = anchor - tl.load(bands + i, mask=i < kept, other=0)
        seen += tl.sum(((i < kept) & (block >= begin) & (block < end)).to(tl.int32), 0)
    for first in tl.range(0, capacity, CHUNK):
        i = first + tl.arange(0, CHUNK)
        block = anchor - tl.load(bands + (seen - 1 - i), mask=i < seen, other=0)
        tl.store(listed + i, tl.where(i < seen, block, 0), mask=i < capacity)
    tl.store(count + at, seen)


# --- launchers -------------------------------------------------------------------------------------------------------


def vertical_slash_index(
    q, k, vertical_size, slash_size, *, last_q, sink, local, kv_start, scale, block_q, block_k, max_blocks, max_columns
):
    """`torch.ops.headstart.vertical_slash_index` on Triton; see `ops/prefill_index.py` for the contract."""
    batch, heads, nq, d = q.shape
    nk = k.shape[2]
    rows, blocks = ceil_div(nq, block_q), ceil_div(nk, block_k)
    vertical, bands = _last_query_sums(q, k, min(last_q, nq), kv_start, scale, block_q, block_k)
    columns = min(vertical_size if max_columns is None else min(vertical_size, max_columns), nk)
    # `select` sees the columns as blocks of one key in a single row, whose sinks are forced. It sees the bands in the
    # same way, and the nearest bands are forced.
    one_row = dict(nq=nk, nk=nk, block_q=nk, block_k=1)
    column_count, column_index = select(vertical, columns, sink=sink, kv_start=kv_start, **one_row)
    wanted = min(ceil_div(slash_size, block_k), blocks)
    wanted = wanted if max_blocks is None else min(wanted, max_blocks)
    one_row = dict.fromkeys(("nq", "nk", "block_q"), bands.shape[-1]) | dict(block_k=1)
    nearest = (local - 1 + edge(nq, nk, block_q, block_k)) // block_k + 1 if local > 0 else 0
    band_count, band_index = select(bands, wanted, sink=nearest, **one_row)
    count = column_count.new_empty(batch, heads, rows)
    index = column_count.new_empty(batch, heads, rows, wanted)
    with on(q.device):
        spread_bands_kernel[(rows, batch * heads)](
            band_count,
            band_index,
            kv_start if kv_start is not None else count,
            count,
            index,
            heads,
            rows,
            nq,
            nk,
            wanted,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            CHUNK=min(1024, triton.next_power_of_2(wanted)),
            HAS_KV_START=kv_start is not None,
            num_warps=1,
        )
    return count, index, column_count, column_index


def _last_query_sums(q, k, last_q, kv_start, scale, block_q, block_k):
    """Sums of the last queries' softmax by column [B, Hq, 1, Nk] and by band [B, Hq, 1, bands]."""
    batch, heads, nq, d = q.shape
    kv_heads, nk = k.shape[1:3]
    bands = nk // block_k + 2 + block_q // block_k
    d0, d1 = split_head_dim(d)
    block_m = min(64 if q.element_size() == 2 else 32, max(16, triton.next_power_of_2(last_q)))
    query_tiles = ceil_div(last_q, block_m)
    block_n = 64 if q.element_size() == 2 else 32
    key_tiles = ceil_div(nk, block_n)
    tiles_a_split = max(4, ceil_div(key_tiles, SPLITS))
    splits = ceil_div(key_tiles, tiles_a_split)
    width = max(block_q, block_k)
    tile_bands = (block_m + block_n + block_k + width - 4) // block_k + 1
    e = edge(nq, nk, block_q, block_k)
    lse = q.new_empty((batch, heads, splits, last_q), dtype=torch.float32)
    vertical = q.new_empty((batch, heads, 1, nk), dtype=torch.float32)
    partial = q.new_empty((batch, heads, query_tiles, tile_bands, key_tiles), dtype=torch.float32)
    mass = q.new_empty((batch, heads, 1, bands), dtype=torch.float32)
    unit = stride_unit(q, k)
    scale = (1 / math.sqrt(d) if scale is None else scale) / LN2
    sizes = heads, heads // kv_heads, nq, nk, last_q, splits
    options = dict(D=d, D0=d0, D1=d1, UNIT=unit, BLOCK_M=block_m, BLOCK_N=block_n)
    options |= dict(HAS_KV_START=kv_start is not None, PRECISION=precision(q))
    with on(q.device):
        last_query_lse_kernel[(splits, query_tiles, batch * heads)](
            q,
            k,
            kv_start if kv_start is not None else lse,
            lse,
            scale,
            *token_strides(unit, q, k),
            *sizes,
            tiles_a_split,
            **options,
            num_warps=4,
            num_stages=2,
        )
        last_query_sums_kernel[(key_tiles, batch * heads)](
            q,
            k,
            kv_start if kv_start is not None else lse,
            lse,
            vertical,
            partial,
            scale,
            *token_strides(unit, q, k),
            *sizes,
            query_tiles,
            key_tiles,
            e,
            BLOCK_K=block_k,
            WIDTH=width,
            BANDS=tile_bands,
            BLOCK_S=triton.next_power_of_2(splits),
            **options,
            num_warps=8,
            num_stages=2,
        )
        band_mass_kernel[(ceil_div(bands, 128), batch * heads)](
            partial,
            mass,
            nk,
            last_q,
            query_tiles,
            key_tiles,
            bands,
            e,
            BLOCK_K=block_k,
            BANDS=tile_bands,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            CHUNK=128,
            num_warps=4,
        )
    return vertical, mass

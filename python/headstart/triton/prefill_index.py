"""Triton kernels of the index builders `adaptive_block_index` and `block_topk_index` (see also `vertical_slash.py`).

Each builder computes one score or mass for each entry of each row from queries and keys. Then `block_select.py` lists
the best entries. No array of size Nq × Nk exists, all heads run at once, and the host does not wait for the GPU.

    adaptive        strided_score_kernel   one program, one tile of a GEMM of depth stride · D:

                        key groups, 128 a tile
                      ┌──────┬──────┬──────┬─ ─           S = Σ_s Q[g · stride + s] K[h · stride + stride - 1 - s]ᵀ
          query       │      │      │      │              [128, 128] fp32 in registers, Q and K through shared memory
          groups,     │ tile │ skip │ skip   (causality)       │ maximum of each query group in the tile
          128 a tile  ├──────┼──────┼──────┼─ ─                │ sums of exp2(S - maximum) in each key block
                      │ tile │ tile │ skip                     ▼
                      └──────┴──────┴──────┴─ ─           tile_max [G, tiles], partial [G, T]
                    block_mass_kernel      brings a row's query groups to one maximum and sum → mass [R, T]
                    sampled_share_kernel   with samples: joins the exact shares of some queries of every row
                    select                 as many blocks as hold the share

                    sampled_share_kernel   one program, 64 queries: the samples of neighbouring rows, gathered

                        keys, 64 a tile
          row r     ┌──────┬──────┬─ ─                    pass 1: online softmax → maximum and sum of each query
          row r + 1 │ S    │ S    │      in two passes    pass 2: S again → shares of a key block, the row's largest
          row r + … └──────┴──────┴─ ─                            → maximum with mass [R, T], in place

    top-k           pool_mean_kernel       a block of tokens → its mean
                    pooled_score_kernel    means · means, 64 × 64 a program → scores [R, T]
                    select                 the best top_k

Floors:

- Adaptive: 1 / stride of dense causal attention's Q Kᵀ, and one exponential for each pair of groups. The partial sums
  are written and read once, 4 · G · T bytes a head, in a workspace that heads use in turns. (A second pass over the
  scores would avoid these sums, but it would double the multiplications. At 128K tokens, stride 16 and D 128 these are
  137 GFLOP a head, and the sums are 67 MB at most.)
- n samples a row of block_q queries: n / (2 · block_q) of dense attention's Q Kᵀ, twice, and two exponentials a score.
  K is read from L2 twice for every 64 samples. Their scores stay in registers.
- Top-k: Q and K are read once.

No kernel adds with atomics. Every sum has one order, so equal inputs give equal indices.

A-shape has no kernel, because it needs only arithmetic on positions. Without a tensor argument, torch cannot dispatch
by device. So its reference runs on every device, and the host does not wait for it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..reference.prefill_index import ceil_div
from ._common import LN2, load_rows, on, precision, split_head_dim, stride_unit, token_strides
from .block_select import row_blocks, select

WORKSPACE = 2**28  # the most bytes of partial sums at a time


# --- adaptive --------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "first_stream", "heads", "group",
        "nq", "nk", "query_groups", "tiles_q", "tiles_k", "blocks",
    ],
    do_not_specialize_on_alignment=["kv_start", "partial", "tile_max"],
)  # fmt: skip
def strided_score_kernel(
    q,
    k,
    kv_start,
    partial,
    tile_max,
    scale,
    # Strides are in units of UNIT elements. UNIT is a constant, so the compiler can use 16-byte loads.
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    first_stream,
    heads,
    group,
    nq,
    nk,
    query_groups,
    tiles_q,
    tiles_k,
    blocks,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SWEEP: tl.constexpr,
    HAS_KV_START: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # SWEEP query tiles go through the key tiles together, so all of them read a key tile from L2.
    program = tl.program_id(0)
    sweep = program // (SWEEP * tiles_k)
    size = tl.minimum(tiles_q - sweep * SWEEP, SWEEP)
    place = program - sweep * SWEEP * tiles_k
    tile_q = sweep * SWEEP + place % size
    tile_k = place // size
    stream = first_stream + tl.program_id(1)
    batch = (stream // heads).to(tl.int64)
    head = (stream % heads).to(tl.int64)
    start = 0
    if HAS_KV_START:
        start = tl.maximum(tl.load(kv_start + batch), 0)
    last_position = tl.minimum((tile_q + 1) * BLOCK_M * STRIDE, nq) - 1 + nk - nq
    if (tile_k * BLOCK_N * STRIDE > last_position) | ((tile_k + 1) * BLOCK_N * STRIDE <= start):
        return

    rows = tile_q * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
    q += batch * stride_qb * UNIT + head * stride_qh * UNIT
    k += batch * stride_kb * UNIT + head // group * stride_kh * UNIT
    step_q = stride_qn.to(tl.int64) * UNIT
    step_k = stride_kn.to(tl.int64) * UNIT
    PARTS: tl.constexpr = (D + DEPTH - 1) // DEPTH
    lane = tl.arange(0, DEPTH)
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, STRIDE * PARTS):
        token = step // PARTS
        dims = step % PARTS * DEPTH + lane
        queries = rows * STRIDE + token
        keys = columns * STRIDE + (STRIDE - 1 - token)
        is_query = (queries < nq)[:, None]
        is_key = (keys < nk)[:, None]
        if HAS_KV_START:
            is_key = is_key & (keys >= start)[:, None]
        if PARTS * DEPTH > D:
            is_query = is_query & (dims < D)[None, :]
            is_key = is_key & (dims < D)[None, :]
        a = tl.load(q + queries.to(tl.int64)[:, None] * step_q + dims[None, :], mask=is_query, other=0.0)
        b = tl.load(k + keys.to(tl.int64)[:, None] * step_k + dims[None, :], mask=is_key, other=0.0)
        scores = tl.dot(a, tl.trans(b), scores, input_precision=PRECISION)

    last_query = tl.minimum(rows * STRIDE + STRIDE, nq) - 1 + nk - nq
    first_key = columns * STRIDE
    seen = (first_key[None, :] <= last_query[:, None]) & (first_key < nk)[None, :]
    if HAS_KV_START:
        seen = seen & (first_key + STRIDE > start)[None, :] & (last_query >= start)[:, None]
    scores = tl.where(seen, scores * scale, float("-inf"))
    top = tl.max(scores, 1)
    # For a group that sees no key of this tile, any finite reference avoids -inf - -inf in the exponent.
    weights = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
    GROUPS: tl.constexpr = BLOCK_K // STRIDE
    TILE_BLOCKS: tl.constexpr = BLOCK_N // GROUPS
    sums = tl.sum(tl.reshape(weights, (BLOCK_M, TILE_BLOCKS, GROUPS)), 2)
    at = tl.program_id(1).to(tl.int64) * query_groups + rows
    block = tile_k * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    is_row = rows < query_groups
    tl.store(tile_max + at * tiles_k + tile_k, top, mask=is_row)
    tl.store(partial + at[:, None] * blocks + block[None, :], sums, mask=is_row[:, None] & (block < blocks)[None, :])


@triton.jit(
    do_not_specialize=["first_stream", "heads", "nq", "nk", "rows", "query_groups", "tiles_k", "blocks"],
    do_not_specialize_on_alignment=["kv_start", "partial", "tile_max", "mass"],
)
def block_mass_kernel(
    partial,
    tile_max,
    kv_start,
    mass,
    first_stream,
    heads,
    nq,
    nk,
    rows,
    query_groups,
    tiles_k,
    blocks,
    GROUPS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    SAMPLED: tl.constexpr,
    HAS_KV_START: tl.constexpr,
):
    row = tl.program_id(0)
    stream = first_stream + tl.program_id(1)
    begin, end, _, _ = row_blocks(kv_start, stream // heads, row, nq, nk, 0, 0, BLOCK_Q, BLOCK_K, HAS_KV_START)
    groups = row * GROUPS + tl.arange(0, GROUPS)
    is_group = (groups < query_groups)[:, None]
    at = (tl.program_id(1).to(tl.int64) * query_groups + groups)[:, None]
    lane = tl.arange(0, CHUNK)[None, :]
    # Tiles that hold no block of [begin, end) were skipped, so their results must not be read.
    tiles_end = (end + TILE_BLOCKS - 1) // TILE_BLOCKS
    # A finite start, so that a group that sees no key needs no choice afterwards. Triton 3.6 does not compile a loop
    # whose reduction is used twice.
    top = tl.full([GROUPS], -3.0e38, tl.float32)
    for first in tl.range(begin // TILE_BLOCKS, tiles_end, CHUNK):
        tile = first + lane
        maxima = tl.load(tile_max + at * tiles_k + tile, mask=is_group & (tile < tiles_end), other=float("-inf"))
        top = tl.maximum(top, tl.max(maxima, 1))
    top = top[:, None]
    total = tl.zeros([GROUPS], tl.float32)
    for first in tl.range(begin, end, CHUNK):
        block = first + lane
        inside = is_group & (block < end)
        maxima = tl.load(tile_max + at * tiles_k + block // TILE_BLOCKS, mask=inside, other=float("-inf"))
        total += tl.sum(tl.exp2(maxima - top) * tl.load(partial + at * blocks + block, mask=inside, other=0.0), 1)
    inverse = (1.0 / tl.maximum(total, 1.0e-37))[:, None]  # where the total is 0, so are all weights
    mass += (stream.to(tl.int64) * rows + row) * blocks
    for first in tl.range(begin, end, CHUNK):
        block = first + lane
        inside = is_group & (block < end)
        maxima = tl.load(tile_max + at * tiles_k + block // TILE_BLOCKS, mask=inside, other=float("-inf"))
        weights = tl.exp2(maxima - top) * tl.load(partial + at * blocks + block, mask=inside, other=0.0)
        ids = first + tl.arange(0, CHUNK)
        # If sampled queries follow, the mass is the largest share of a group. Otherwise it is the sum of the shares.
        shares = tl.max(weights * inverse, 0) if SAMPLED else tl.sum(weights * inverse, 0)
        tl.store(mass + ids, shares, mask=ids < end)


@triton.jit
def _sampled_scores(
    q0,
    q1,
    k,
    step_k,
    keys,
    position,
    start,
    nk,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores [BLOCK_M, BLOCK_N] in base 2, -inf where a query does not see a key."""
    real = (keys >= start) & (keys < nk)
    scores = tl.dot(q0, tl.trans(load_rows(k, keys, step_k, real, 0, D0, D, True)), input_precision=PRECISION)
    if D1 > 0:
        k1 = load_rows(k, keys, step_k, real, D0, D1, D, True)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
    # The mask comes after scaling, because a negative scale would turn -inf into +inf.
    return tl.where((keys[None, :] <= position[:, None]) & real[None, :], scores * scale, float("-inf"))


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn",
        "heads", "group", "nq", "nk", "rows", "blocks", "samples",
    ],
    do_not_specialize_on_alignment=["kv_start", "mass"],
)  # fmt: skip
def sampled_share_kernel(
    q,
    k,
    kv_start,
    mass,
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
    rows,
    blocks,
    samples,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_KV_START: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """mass = max(mass, shares of the sampled queries), for ROWS rows. A row uses `samples` of its SLOTS slots."""
    # The last rows start first, because they see the most keys. Heads run side by side, and find K in L2.
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    stream = tl.program_id(0).to(tl.int64)
    batch = stream // heads
    head = stream % heads
    start = 0
    if HAS_KV_START:
        start = tl.maximum(tl.load(kv_start + batch), 0)
    lane = tl.arange(0, ROWS * SLOTS)
    slot = lane % SLOTS
    query = tl.minimum((first_row + lane // SLOTS) * BLOCK_Q + (slot + 1) * BLOCK_Q // samples, nq) - 1
    is_query = (slot < samples) & (first_row + lane // SLOTS < rows)
    # At position -1, an unused slot sees no key.
    position = tl.where(is_query, query + nk - nq, -1)
    q += batch * stride_qb * UNIT + head * stride_qh * UNIT
    step_q = stride_qn.to(tl.int64) * UNIT
    k += batch * stride_kb * UNIT + head // group * stride_kh * UNIT
    step_k = stride_kn.to(tl.int64) * UNIT
    q0 = load_rows(q, query, step_q, is_query, 0, D0, D, True)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(q, query, step_q, is_query, D0, D1, D, True)
    PARTS: tl.constexpr = BLOCK_K // BLOCK_N
    last = tl.minimum((first_row + ROWS) * BLOCK_Q, nq) - 1 + nk - nq
    begin = start // BLOCK_K * PARTS
    end = (last // BLOCK_K + 1) * PARTS

    top = tl.full([ROWS * SLOTS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS * SLOTS], tl.float32)
    for tile in tl.range(begin, end):
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        scores = _sampled_scores(q0, q1, k, step_k, keys, position, start, nk, scale, D, D0, D1, PRECISION)
        new_top = tl.maximum(top, tl.max(scores, 1))
        # For a query that has seen no key yet, any finite reference avoids -inf - -inf in the exponent.
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - reference) + tl.sum(tl.exp2(scores - reference[:, None]), 1)
        top = new_top
    top = tl.where(top == float("-inf"), 0.0, top)
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)

    row = first_row + tl.arange(0, ROWS)
    row_last = tl.minimum((row + 1) * BLOCK_Q, nq) - 1 + nk - nq
    mass += (stream * rows + row) * blocks
    share = tl.zeros([ROWS * SLOTS], tl.float32)
    for tile in tl.range(begin, end):
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        scores = _sampled_scores(q0, q1, k, step_k, keys, position, start, nk, scale, D, D0, D1, PRECISION)
        here = tl.sum(tl.exp2(scores - top[:, None]), 1)
        if PARTS > 1:
            share = tl.where(tile % PARTS == 0, 0.0, share) + here
        else:
            share = here
        block = tile // PARTS
        largest = tl.max(tl.reshape(share * inverse, (ROWS, SLOTS)), 1)
        # If a row sees no key of a block, block_mass_kernel has written no mass for it.
        whole = (row < rows) & (block * BLOCK_K <= row_last) & (row_last >= start) & (tile % PARTS == PARTS - 1)
        before = tl.load(mass + block, mask=whole, other=0.0)
        tl.store(mass + block, tl.maximum(before, largest), mask=whole)


# --- block top-k -----------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["stride_b", "stride_h", "stride_n", "heads", "n", "blocks", "before"],
    do_not_specialize_on_alignment=["kv_start", "mean"],
)
def pool_mean_kernel(
    x,
    kv_start,
    mean,
    stride_b,
    stride_h,
    stride_n,
    heads,
    n,
    blocks,
    before,  # the number of keys before the first of these tokens
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_KV_START: tl.constexpr,
):
    block = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    real = tokens < n
    if HAS_KV_START:
        real = real & (tokens + before >= tl.load(kv_start + batch))
    inverse = 1.0 / tl.maximum(tl.sum(real.to(tl.int32), 0), 1).to(tl.float32)
    x += batch * stride_b * UNIT + head * stride_h * UNIT
    step = stride_n.to(tl.int64) * UNIT
    mean += (tl.program_id(1).to(tl.int64) * blocks + block) * D
    dims0 = tl.arange(0, D0)
    x0 = load_rows(x, tokens, step, real, 0, D0, D, True).to(tl.float32)
    tl.store(mean + dims0, tl.sum(x0, 0) * inverse, mask=dims0 < D)
    if D1 > 0:
        dims1 = D0 + tl.arange(0, D1)
        x1 = load_rows(x, tokens, step, real, D0, D1, D, True).to(tl.float32)
        tl.store(mean + dims1, tl.sum(x1, 0) * inverse, mask=dims1 < D)


@triton.jit(
    do_not_specialize=["heads", "group", "nq", "nk", "rows", "blocks", "block_q", "block_k"],
    do_not_specialize_on_alignment=["kv_start", "scores"],
)
def pooled_score_kernel(
    mean_q,
    mean_k,
    scores,
    heads,
    group,
    nq,
    nk,
    rows,
    blocks,
    block_q,
    block_k,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(1) * BLOCK_N * block_k > nk - nq + (tl.program_id(0) + 1) * BLOCK_M * block_q - 1:
        return  # by causality, no row of this tile uses its scores
    stream = tl.program_id(2).to(tl.int64)
    kv_stream = stream // heads * (heads // group) + stream % heads // group
    is_row = row < rows
    is_block = block < blocks
    mean_q += stream * rows * D
    mean_k += kv_stream * blocks * D
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, D, DEPTH):
        dims = first + tl.arange(0, DEPTH)
        inside = (dims < D)[None, :]
        a = tl.load(mean_q + row.to(tl.int64)[:, None] * D + dims[None, :], mask=is_row[:, None] & inside, other=0.0)
        b = tl.load(
            mean_k + block.to(tl.int64)[:, None] * D + dims[None, :], mask=is_block[:, None] & inside, other=0.0
        )
        result = tl.dot(a, tl.trans(b), result, input_precision="tf32x3")
    at = scores + (stream * rows + row)[:, None] * blocks + block[None, :]
    tl.store(at, result, mask=is_row[:, None] & is_block[None, :])


# --- launchers -------------------------------------------------------------------------------------------------------


def adaptive_block_index(
    q, k, threshold, *, stride, sink, local, kv_start, scale, block_q, block_k, max_blocks, head_threshold, samples
):
    """`torch.ops.headstart.adaptive_block_index` on Triton; see `ops/prefill_index.py` for the contract."""
    blocks = ceil_div(k.shape[2], block_k)
    mass = _antidiagonal_mass(q, k, stride, kv_start, scale, block_q, block_k, samples > 0)
    if samples > 0:
        _join_sampled_shares(mass, q, k, samples, kv_start, scale, block_q, block_k)
    return select(
        mass,
        blocks if max_blocks is None else min(max_blocks, blocks),
        nq=q.shape[2],
        nk=k.shape[2],
        block_q=block_q,
        block_k=block_k,
        sink=sink,
        local=local,
        kv_start=kv_start,
        share=threshold,
        head_share=head_threshold,
    )


def _antidiagonal_mass(q, k, stride, kv_start, scale, block_q, block_k, sampled):
    """The sum of `reference.antidiagonal_shares` over a row's groups, or their maximum if `sampled`.

    It is written only where a row sees the block.
    """
    batch, heads, nq, d = q.shape
    kv_heads, nk = k.shape[1:3]
    rows, blocks = ceil_div(nq, block_q), ceil_div(nk, block_k)
    query_groups = ceil_div(nq, stride)
    mass = q.new_empty((batch, heads, rows, blocks), dtype=torch.float32)
    tile = 128 if q.element_size() == 2 else 64
    depth = 64 if ceil_div(d, 64) * 64 <= ceil_div(d, 32) * 32 else 32
    tiles_q, tiles_k = ceil_div(query_groups, tile), ceil_div(ceil_div(nk, stride), tile)
    streams = batch * heads
    at_once = max(1, min(streams, WORKSPACE // (4 * query_groups * blocks)))
    partial = q.new_empty((at_once, query_groups, blocks), dtype=torch.float32)
    tile_max = q.new_empty((at_once, query_groups, tiles_k), dtype=torch.float32)
    unit = stride_unit(q, k)
    groups = block_q // stride
    for first in range(0, streams, at_once):
        now = min(at_once, streams - first)
        with on(q.device):
            strided_score_kernel[(tiles_q * tiles_k, now)](
                q,
                k,
                kv_start if kv_start is not None else mass,
                partial,
                tile_max,
                (1 / math.sqrt(d) if scale is None else scale) / stride / LN2,
                *token_strides(unit, q, k),
                first,
                heads,
                heads // kv_heads,
                nq,
                nk,
                query_groups,
                tiles_q,
                tiles_k,
                blocks,
                D=d,
                DEPTH=depth,
                UNIT=unit,
                STRIDE=stride,
                BLOCK_K=block_k,
                BLOCK_M=tile,
                BLOCK_N=tile,
                SWEEP=8,
                HAS_KV_START=kv_start is not None,
                PRECISION=precision(q),
                num_warps=8,
                num_stages=3,
            )
            block_mass_kernel[(rows, now)](
                partial,
                tile_max,
                kv_start if kv_start is not None else mass,
                mass,
                first,
                heads,
                nq,
                nk,
                rows,
                query_groups,
                tiles_k,
                blocks,
                GROUPS=groups,
                TILE_BLOCKS=tile * stride // block_k,
                BLOCK_Q=block_q,
                BLOCK_K=block_k,
                CHUNK=min(2048 // groups, max(16, triton.next_power_of_2(blocks))),
                SAMPLED=sampled,
                HAS_KV_START=kv_start is not None,
                num_warps=4,
            )
    return mass


def _join_sampled_shares(mass, q, k, samples, kv_start, scale, block_q, block_k):
    """The maximum of `mass` and `reference.sampled_shares`, in place."""
    batch, heads, nq, d = q.shape
    nk = k.shape[2]
    rows, blocks = mass.shape[2:]
    d0, d1 = split_head_dim(d)
    slots = triton.next_power_of_2(samples)
    # One program has all samples of a row, so no two programs write the same mass.
    most = max(slots, 64 if q.element_size() == 2 else 32)
    tile_rows = min(most, max(16, slots * triton.next_power_of_2(rows))) // slots
    unit = stride_unit(q, k)
    with on(q.device):
        sampled_share_kernel[(batch * heads, ceil_div(rows, tile_rows))](
            q,
            k,
            kv_start if kv_start is not None else mass,
            mass,
            (1 / math.sqrt(d) if scale is None else scale) / LN2,
            *token_strides(unit, q, k),
            heads,
            heads // k.shape[1],
            nq,
            nk,
            rows,
            blocks,
            samples,
            D=d,
            D0=d0,
            D1=d1,
            UNIT=unit,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            SLOTS=slots,
            ROWS=tile_rows,
            BLOCK_N=64 if q.element_size() == 2 else 32,
            HAS_KV_START=kv_start is not None,
            PRECISION=precision(q),
            num_warps=4 if q.element_size() == 2 or slots < 64 else 8,
            num_stages=2,
        )


def block_topk_index(q, k, top_k, *, sink, local, kv_start, block_q, block_k):
    """`torch.ops.headstart.block_topk_index` on Triton; see `ops/prefill_index.py` for the contract."""
    batch, heads, nq, d = q.shape
    kv_heads, nk = k.shape[1:3]
    rows, blocks = ceil_div(nq, block_q), ceil_div(nk, block_k)
    mean_q = _pool_mean(q, block_q, kv_start, nk - nq)
    mean_k = _pool_mean(k, block_k, kv_start, 0)
    scores = mean_q.new_empty(batch, heads, rows, blocks)
    with on(q.device):
        pooled_score_kernel[(ceil_div(rows, 64), ceil_div(blocks, 64), batch * heads)](
            mean_q,
            mean_k,
            scores,
            heads,
            heads // kv_heads,
            nq,
            nk,
            rows,
            blocks,
            block_q,
            block_k,
            D=d,
            DEPTH=32,
            BLOCK_M=64,
            BLOCK_N=64,
            num_warps=8,
        )
    geometry = dict(nq=nq, nk=nk, block_q=block_q, block_k=block_k, sink=sink, local=local, kv_start=kv_start)
    return select(scores, min(top_k, blocks), **geometry)


def _pool_mean(x, block, kv_start, before):
    batch, heads, n, d = x.shape
    blocks = ceil_div(n, block)
    mean = x.new_empty((batch, heads, blocks, d), dtype=torch.float32)
    d0, d1 = split_head_dim(d)
    unit = stride_unit(x)
    with on(x.device):
        pool_mean_kernel[(blocks, batch * heads)](
            x,
            kv_start if kv_start is not None else mean,
            mean,
            *token_strides(unit, x),
            heads,
            n,
            blocks,
            before,
            D=d,
            D0=d0,
            D1=d1,
            UNIT=unit,
            BLOCK=block,
            HAS_KV_START=kv_start is not None,
            num_warps=4,
        )
    return mean

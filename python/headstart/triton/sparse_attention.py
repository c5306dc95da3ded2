"""Triton kernels of `sparse_attention` and `merge_attention`, for any GPU that Triton supports. They are forward only.

One program computes one query tile of one head. It processes the tile's key blocks and then its single keys, with an
online softmax in base 2. No array of size Nq × Nk exists.

            key blocks of the row (ascending)               single keys, 64 at a time
           ┌────────┬────────┬─ ─ ─ ┬────────┬────────┐    ┌─┬─┬─┬─ ─ ─┬─┐
    K, V   │ lead   │ whole  │      │ whole  │ tail   │    │ gathered rows │   shared memory, `num_stages` deep
           └────────┴────────┴─ ─ ─ ┴────────┴────────┘    └─┴─┴─┴─ ─ ─┴─┘
            crosses   no mask at all          crosses        masked, so that a key that a
            kv_start, or                      the diagonal   block of the row also covers
            the window's                      or the end     counts only once
            lower edge
    registers, the whole time:  Q [BLOCK_M, D]   acc [BLOCK_M, D] fp32   row_max, row_sum [BLOCK_M] fp32
    registers, a tile at a time:  S = Q Kᵀ [BLOCK_M, BLOCK_N] fp32 → P in the input's dtype → acc += P V

Floor, for a row of n selected keys (blocks and columns): 4 · BLOCK_M · n · D tensor-core operations, BLOCK_M · n
exponentials, and 2 · n · D elements of K and V, read once from L2.

Query heads of one KV head run side by side. KV heads run in sections whose keys and values fit in L2. So DRAM sees K
and V about once for each section and sweep over the query rows. Rows run from last to first, because under causality
the last rows are the longest, and a long row must not be the last to start. If even the first row may be long, a sort
on the device orders the rows by their counts (`longest_first`). Few queries use `sparse_attention_decode.py`, where
query heads share a tile and several programs share a long list.

If the head dim is not a power of two, it is cut in two power-of-two parts if this wastes less (80 = 64 + 16,
96 = 64 + 32, 192 = 128 + 64). Otherwise it is padded.

The kernel trusts that lists are ascending: the split into lead, whole and tail needs it. It does not trust that ids are
in range: an id outside the keys is skipped or clamped before an address is computed from it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import sparse_attention_decode as decode
from ._common import (
    LN2,
    Limits,
    attend,
    device_limits,
    load_rows,
    on,
    precision,
    split_head_dim,
    stride_unit,
    token_strides,
)
from .block_lists import longest_first, make_lists, place, span

COLUMNS = 64  # the number of single keys that are gathered at a time


# --- device code -----------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn",
        "stride_vb", "stride_vh", "stride_vn", "stride_nb", "stride_nh", "stride_nr",
        "stride_ib", "stride_ih", "stride_ir", "stride_it", "stride_cnb", "stride_cnh", "stride_cnr",
        "stride_cb", "stride_ch", "stride_cr", "stride_cc", "stride_wb", "stride_wh",
        "covered_words", "block_capacity", "column_capacity", "nq", "nk", "window", "tiles", "streams",
        "section", "kv_heads", "group", "index_group",
    ],
    do_not_specialize_on_alignment=[
        "block_count", "block_index", "column_count", "column_index", "covered", "kv_start", "order", "lse",
    ],
)  # fmt: skip
def sparse_attention_kernel(
    q,
    k,
    v,
    out,
    lse,
    block_count,
    block_index,
    column_count,
    column_index,
    covered,
    kv_start,
    order,
    qk_scale,
    # Strides of q, k, v are in units of UNIT elements. UNIT is a constant, so the compiler can use 16-byte loads.
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_nb,
    stride_nh,
    stride_nr,
    stride_ib,
    stride_ih,
    stride_ir,
    stride_it,
    stride_cnb,
    stride_cnh,
    stride_cnr,
    stride_cb,
    stride_ch,
    stride_cr,
    stride_cc,
    stride_wb,
    stride_wh,
    covered_words,
    block_capacity,
    column_capacity,
    nq,
    nk,
    window,
    tiles,
    streams,
    section,
    kv_heads,
    group,
    index_group,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_KV_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_COVERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    if HAS_ORDER:
        program = tl.load(order + program).to(tl.int32)
    stream, lane, tile = place(program, section, group, tiles, streams)
    batch = (stream // kv_heads).to(tl.int64)
    kv_head = (stream % kv_heads).to(tl.int64)
    head = kv_head * group + lane
    index_head = head // index_group
    heads = (kv_heads * group).to(tl.int64)

    first = tile * BLOCK_M
    block_row = (first // BLOCK_Q).to(tl.int64)
    queries = first + tl.arange(0, BLOCK_M)
    is_query = queries < nq
    positions = queries + (nk - nq)
    start = 0
    if HAS_KV_START:
        start = tl.maximum(tl.load(kv_start + batch), 0)
    # The keys from `start` to `limit` are those that any query of the tile sees. All queries of the tile see the keys
    # from `whole_start` to `whole_limit`.
    last_position = tl.minimum(first + BLOCK_M, nq) - 1 + (nk - nq)
    limit = nk
    whole_limit = nk
    if CAUSAL:
        limit = last_position + 1
        whole_limit = first + 1 + (nk - nq)
    whole_start = start
    if HAS_WINDOW:
        whole_start = tl.maximum(start, last_position - window + 1)
        start = tl.maximum(start, first + (nk - nq) - window + 1)

    q_base = q + batch * stride_qb * UNIT + head * stride_qh * UNIT
    k_base = k + batch * stride_kb * UNIT + kv_head * stride_kh * UNIT
    v_base = v + batch * stride_vb * UNIT + kv_head * stride_vh * UNIT
    step_q = stride_qn.to(tl.int64) * UNIT
    step_k = stride_kn.to(tl.int64) * UNIT
    step_v = stride_vn.to(tl.int64) * UNIT
    step_i = stride_it.to(tl.int64)
    step_c = stride_cc.to(tl.int64)
    q0 = load_rows(q_base, queries, step_q, is_query, 0, D0, D, True)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        q1 = load_rows(q_base, queries, step_q, is_query, D0, D1, D, True)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    else:
        q1 = q0
        acc1 = acc0
    if qk_scale < 0:
        q0 = (q0.to(tl.float32) * -1).to(q0.dtype)
        q1 = (q1.to(tl.float32) * -1).to(q1.dtype)
    qk_scale = tl.abs(qk_scale)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    # --- the blocks [begin, end) of the list; those in [begin + lead, whole_end) need no mask ---
    ids = block_index + batch * stride_ib + index_head * stride_ih + block_row * stride_ir
    count = tl.load(block_count + batch * stride_nb + index_head * stride_nh + block_row * stride_nr)
    count = tl.minimum(count, block_capacity)
    blocks_end = (limit + BLOCK_K - 1) // BLOCK_K
    begin, end = span(ids, step_i, count, start // BLOCK_K, blocks_end)
    # At most three listed blocks cross the diagonal or the end of the keys. They are the last ones of the list.
    last = end - 4 + tl.arange(0, 4)
    last_ids = tl.load(ids + last * step_i, mask=last >= begin, other=0)
    whole_end = end - tl.sum(((last >= begin) & ((last_ids + 1) * BLOCK_K > whole_limit)).to(tl.int32), 0)
    whole_blocks = whole_limit // BLOCK_K
    whole_end = tl.where(whole_blocks > 0, whole_end, begin)
    lead = begin * 0
    if HAS_KV_START or HAS_WINDOW:
        # One block crosses kv_start. The window's lower edge moves with the queries of the tile, and crosses at most
        # three blocks.
        leading = begin + tl.arange(0, 4)
        leading_ids = tl.load(ids + leading * step_i, mask=leading < whole_end, other=0)
        lead = tl.sum(((leading < whole_end) & (leading_ids * BLOCK_K < whole_start)).to(tl.int32), 0)
    SUB: tl.constexpr = BLOCK_K // BLOCK_N
    inner = tl.arange(0, BLOCK_N)
    for i in tl.range((begin + lead) * SUB, whole_end * SUB):
        # In an ascending list the clamp changes nothing. In any other list it keeps the address inside the keys.
        block = tl.load(ids + i // SUB * step_i)
        block = tl.minimum(tl.maximum(block, 0), whole_blocks - 1).to(tl.int64)
        origin = block * BLOCK_K + (i % SUB) * BLOCK_N
        acc0, acc1, row_max, row_sum = attend(
            q0, q1, acc0, acc1, row_max, row_sum, k_base + origin * step_k, v_base + origin * step_v, step_k, step_v,
            inner, True, True, qk_scale, D, D0, D1, False, PRECISION,
        )  # fmt: skip
    for i in tl.range(0, (lead + end - whole_end) * SUB):
        entry = i // SUB
        entry = tl.where(entry < lead, begin + entry, whole_end + entry - lead)
        block = tl.load(ids + entry * step_i)
        block = tl.where((block >= 0) & (block < blocks_end), block, blocks_end)
        keys = block * BLOCK_K + (i % SUB) * BLOCK_N + inner
        present = (keys >= start) & (keys < limit)
        allowed = present[None, :]
        if CAUSAL:
            allowed = allowed & (keys[None, :] <= positions[:, None])
        if HAS_WINDOW:
            allowed = allowed & (keys[None, :] > positions[:, None] - window)
        acc0, acc1, row_max, row_sum = attend(
            q0, q1, acc0, acc1, row_max, row_sum, k_base, v_base, step_k, step_v,
            keys, present, allowed, qk_scale, D, D0, D1, True, PRECISION,
        )  # fmt: skip

    # --- the single keys ---
    if HAS_COLUMNS:
        columns = column_index + batch * stride_cb + index_head * stride_ch + block_row * stride_cr
        column_n = tl.load(column_count + batch * stride_cnb + index_head * stride_cnh + block_row * stride_cnr)
        column_n = tl.minimum(column_n, column_capacity)
        covered_row = covered + (batch * stride_wb + index_head * stride_wh + block_row * covered_words)
        column_begin, column_end = span(columns, step_c, column_n, start, limit)
        for i in tl.range(column_begin, column_end, BLOCK_C):
            entries = i + tl.arange(0, BLOCK_C)
            keys = tl.load(columns + entries * step_c, mask=entries < column_end, other=-1)
            present = (keys >= start) & (keys < limit)
            allowed = present
            if HAS_COVERED:
                word = tl.load(covered_row + entries // 32, mask=entries < column_end, other=0)
                allowed = allowed & (((word >> (entries % 32)) & 1) == 0)
            allowed = allowed[None, :]
            if CAUSAL:
                allowed = allowed & (keys[None, :] <= positions[:, None])
            if HAS_WINDOW:
                allowed = allowed & (keys[None, :] > positions[:, None] - window)
            acc0, acc1, row_max, row_sum = attend(
                q0, q1, acc0, acc1, row_max, row_sum, k_base, v_base, step_k, step_v,
                keys, present, allowed, qk_scale, D, D0, D1, True, PRECISION,
            )  # fmt: skip

    # --- out = acc / sum, lse = ln 2 · (max + log2 sum); a row that saw no key has sum 0 and max -inf ---
    seen = row_sum != 0
    inverse = tl.where(seen, 1.0 / tl.where(seen, row_sum, 1.0), 0.0)
    row_lse = tl.where(seen, row_max + tl.log2(tl.where(seen, row_sum, 1.0)), float("-inf")) * 0.6931471805599453
    rows = (batch * heads + head) * nq + queries
    tl.store(lse + rows, row_lse, mask=is_query)
    dims0 = tl.arange(0, D0)
    tl.store(
        out + rows[:, None] * D + dims0[None, :],
        (acc0 * inverse[:, None]).to(out.dtype.element_ty),
        mask=is_query[:, None] & (dims0 < D)[None, :],
    )
    if D1 > 0:
        dims1 = D0 + tl.arange(0, D1)
        tl.store(
            out + rows[:, None] * D + dims1[None, :],
            (acc1 * inverse[:, None]).to(out.dtype.element_ty),
            mask=is_query[:, None] & (dims1 < D)[None, :],
        )


@triton.jit(do_not_specialize=["heads", "queries", "rows"])
def merge_attention_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    stride_ab,
    stride_ah,
    stride_an,
    stride_bb,
    stride_bh,
    stride_bn,
    stride_lab,
    stride_lah,
    stride_lan,
    stride_lbb,
    stride_lbh,
    stride_lbn,
    heads,
    queries,
    rows,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    query = row % queries
    head = row // queries % heads
    batch = row // queries // heads
    a = tl.load(lse_a + batch * stride_lab + head * stride_lah + query * stride_lan, mask=is_row, other=0.0)
    b = tl.load(lse_b + batch * stride_lbb + head * stride_lbh + query * stride_lbn, mask=is_row, other=0.0)
    top = tl.maximum(a, b)
    # If neither side saw a key, any finite reference avoids -inf - -inf in the exponents.
    top = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp(a - top)
    weight_b = tl.exp(b - top)
    total = weight_a + weight_b
    tl.store(lse + row, top + tl.log(total), mask=is_row)
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    dims = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (dims < D)[None, :]
    at_a = (batch * stride_ab + head * stride_ah + query * stride_an)[:, None] + dims[None, :]
    at_b = (batch * stride_bb + head * stride_bh + query * stride_bn)[:, None] + dims[None, :]
    value_a = tl.load(out_a + at_a, mask=mask, other=0.0).to(tl.float32)
    value_b = tl.load(out_b + at_b, mask=mask, other=0.0).to(tl.float32)
    merged = value_a * (weight_a * inverse)[:, None] + value_b * (weight_b * inverse)[:, None]
    tl.store(out + row[:, None] * D + dims[None, :], merged.to(out.dtype.element_ty), mask=mask)


# --- choice of configuration -----------------------------------------------------------------------------------------


class Config(NamedTuple):
    """The constants that a launch is compiled for. They depend only on shapes and dtypes, so no call tunes."""

    d0: int
    d1: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@functools.lru_cache
def choose_config(
    d: int, nq: int, block_q: int, block_k: int, itemsize: int, limits: Limits, masked: bool = True
) -> Config:
    """Tiles that keep the accumulator, the scores and the queries in registers, and as many stages as memory holds.

    `masked` means that there are columns or a window. Their loops and masks need more registers.
    """
    d0, d1 = split_head_dim(d)
    width = d0 + d1
    rows = max(16, 1 << (nq - 1).bit_length())  # a decode step needs no 64 rows
    if itemsize == 4:  # FMAs without tensor cores need small tiles, because whole operands pass through registers
        block_m = min(block_q, rows, 64 if width <= 64 else 32)
        block_n = 32 if width <= 64 else 16
        num_warps = 8
    else:
        # wgmma keeps its second operand in shared memory. mma.sync needs registers for it, so its tiles are smaller.
        if limits.wgmma:
            block_m = min(block_q, rows, 128 if width <= 128 else 64)
            block_n = (64 if masked else block_k) if width <= 128 else (32 if masked else 64)
        else:
            block_m = min(block_q, rows, 128 if width <= 64 else 64)
            block_n = 32 if width > 128 or (masked and block_m >= 64) else 64
            if d1 > 0 and block_m == 64 and (masked or width > 128):  # two accumulators
                block_n = 16
        num_warps = 8 if block_m == 128 or (width > 128 and block_m == 64) else 4
    stage = 2 * block_n * width * itemsize
    held = block_m * width * itemsize
    most = 2 if masked and width > (64 if limits.wgmma else 128) else 3  # a third needs more registers, and spills
    num_stages = max(1, min(most, (limits.shared_memory - held - 4096) // stage))
    return Config(d0, d1, block_m, block_n, num_warps, num_stages)


def fits_sm90(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether csrc/cuda/sparse_attention_sm90.cu takes these tensors: its `sparse_attention_sm90_runs` in Python.

    Few queries are not for it: there, query heads share a tile and several programs share a long list.
    """
    if q.dtype == torch.float32 or q.shape[3] not in (64, 128) or q.shape[2] <= decode.MAX_ROWS:
        return False
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    expanded = any(n > 1 and s <= 0 for x in (q, k, v) for n, s in zip(x.shape, x.stride(), strict=True))
    return not expanded and all(_reads_vectors(x) for x in (q, k, v))


def _reads_vectors(x: torch.Tensor) -> bool:
    """Whether every row of x can be read 16 bytes at a time."""
    return stride_unit(x) == 8 and x.data_ptr() % 16 == 0


# --- launchers -------------------------------------------------------------------------------------------------------


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_count: torch.Tensor,
    block_index: torch.Tensor,
    column_count: torch.Tensor | None = None,
    column_index: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.ops.headstart.sparse_attention` on Triton; see `ops/sparse_attention.py` for the contract."""
    batch, heads, nq, d = q.shape
    kv_heads, nk = k.shape[1], k.shape[2]
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    limits = device_limits(q.device)
    scale = (1 / math.sqrt(d) if scale is None else scale) / LN2
    window = None if window is None or window >= nk else window
    lists = make_lists(block_count, block_index, column_count, column_index, block_k)
    group, index_group = heads // kv_heads, heads // block_count.shape[1]
    if d % 8 == 0:
        # One copy here avoids loads of 2 bytes in every tile. With such loads, Triton 3.6 gave wrong results for head
        # dim 72 on an H100.
        q, k, v = (x if _reads_vectors(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    unit = stride_unit(q, k, v)
    strides = token_strides(unit, q, k, v)

    few = nq <= decode.MAX_ROWS
    if few:
        pack = decode.choose_pack(math.gcd(group, index_group), nq)
        splits = decode.choose_splits(batch * heads // pack, lists.keys(block_k), limits.processors)
        limits = limits._replace(wgmma=False)  # wgmma needs tiles of 64 rows
    masked = lists.has_columns or window is not None
    config = choose_config(d, pack * nq if few else nq, block_q, block_k, q.element_size(), limits, masked)
    options = dict(D=d, D0=config.d0, D1=config.d1, UNIT=unit, BLOCK_K=block_k, BLOCK_N=config.block_n)
    options |= dict(BLOCK_C=min(COLUMNS, config.block_n), CAUSAL=causal, HAS_KV_START=kv_start is not None)
    options |= dict(HAS_COLUMNS=lists.has_columns, HAS_COVERED=lists.has_covered, HAS_WINDOW=window is not None)
    options |= dict(PRECISION=precision(q))
    if few:
        chosen = dict(pack=pack, index_group=index_group, splits=splits, config=config, options=options)
        decode.split_attention(q, k, v, out, lse, lists, kv_start, scale, strides, window, **chosen)
        return out, lse

    tiles = triton.cdiv(nq, config.block_m)
    streams = batch * kv_heads
    section = min(streams, max(1, limits.l2 // 2 // max(1, 2 * nk * d * q.element_size())))
    order = longest_first(
        lists,
        nq=nq,
        nk=nk,
        tiles=tiles,
        streams=streams,
        section=section,
        kv_heads=kv_heads,
        group=group,
        index_group=index_group,
        block_q=block_q,
        block_k=block_k,
        block_m=config.block_m,
        causal=causal,
    )
    with on(q.device):
        sparse_attention_kernel[(tiles * batch * heads,)](
            q,
            k,
            v,
            out,
            lse,
            *lists.tensors,
            kv_start if kv_start is not None else block_count,
            order if order is not None else block_count,
            scale,
            *strides,
            *lists.strides,
            *lists.capacities,
            nq,
            nk,
            window or 0,
            tiles,
            streams,
            section,
            kv_heads,
            group,
            index_group,
            **options,
            BLOCK_Q=block_q,
            BLOCK_M=config.block_m,
            HAS_ORDER=order is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, lse


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.ops.headstart.merge_attention` on Triton. Floor: 3 · rows · D elements and 12 bytes of lse a row."""
    batch, heads, nq, d = out_a.shape
    out = out_a.new_empty(out_a.shape)
    lse = lse_a.new_empty(lse_a.shape)
    rows = batch * heads * nq
    if rows == 0:
        return out, lse
    block_d = triton.next_power_of_2(max(d, 1))
    block_m = max(1, 4096 // block_d)
    with on(out_a.device):
        merge_attention_kernel[(triton.cdiv(rows, block_m),)](
            out_a,
            lse_a,
            out_b,
            lse_b,
            out,
            lse,
            *out_a.stride()[:3],
            *out_b.stride()[:3],
            *lse_a.stride(),
            *lse_b.stride(),
            heads,
            nq,
            rows,
            D=d,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out, lse

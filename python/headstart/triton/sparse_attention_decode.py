"""Sparse attention of few queries (decode, a few drafted tokens): heads share a tile, and a long list is split.

A decode step has one query a head. So the query heads that read the same keys with the same list are packed into one
tile, whether the list is split or not. If there are fewer lists than a GPU can run programs for, each program takes a
share of one list, and a second, small kernel joins the shares by their log-sum-exp. Otherwise one program takes a whole
list and writes the result itself.

              a row's list: blocks, then columns           query heads that share a list of the same keys stand
             ┌───────┬───────┬───────┬───────┬─ ─          together as rows of one tile, so K and V are read once
    program  │ (0,u) │ (1,u) │ (2,u) │ (3,u) │             for all of them:   row = head of the pack · nq + query
             └───┬───┴───┬───┴───┬───┴───┬───┴─ ─
                 ▼       ▼       ▼       ▼                 out [splits, B · Hq · Nq, D] fp32
             merge_splits_kernel: one program a row        lse [splits, B · Hq · Nq] in base 2

Floor: the listed keys and values are read once from DRAM, 2 · n · D elements a pack. If there are several splits,
8 · splits · D bytes a row move between the two kernels. All tiles are masked, because loads limit this kernel and the
comparisons do not.

The number of splits depends only on shapes and the device, so the same call always adds in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import attend, load_rows, on
from .block_lists import span

MAX_ROWS = 32  # the most rows of a tile; more queries than this fill a tile without packing heads
MAX_SPLITS = 64
SPLIT_KEYS = 256  # a split shorter than this costs more to join than it saves


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn",
        "stride_vb", "stride_vh", "stride_vn", "stride_nb", "stride_nh", "stride_nr",
        "stride_ib", "stride_ih", "stride_ir", "stride_it", "stride_cnb", "stride_cnh", "stride_cnr",
        "stride_cb", "stride_ch", "stride_cr", "stride_cc", "stride_wb", "stride_wh",
        "covered_words", "block_capacity", "column_capacity", "nq", "nk", "window", "splits", "rows", "heads", "pack",
        "group", "index_group",
    ],
    do_not_specialize_on_alignment=[
        "block_count", "block_index", "column_count", "column_index", "covered", "kv_start", "lse",
    ],
)  # fmt: skip
def split_attention_kernel(
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
    splits,
    rows,
    heads,
    pack,
    group,
    index_group,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_KV_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_COVERED: tl.constexpr,
    SPLIT: tl.constexpr,  # out and lse are those of a share of the list, not of the whole list
    PRECISION: tl.constexpr,
):
    split = tl.program_id(1)
    packs = heads // pack
    batch = (tl.program_id(0) // packs).to(tl.int64)
    first_head = (tl.program_id(0) % packs * pack).to(tl.int64)
    index_head = first_head // index_group
    lane = tl.arange(0, BLOCK_M)
    is_row = lane < pack * nq
    queries = lane % nq
    positions = queries + (nk - nq)
    start = 0
    if HAS_KV_START:
        start = tl.maximum(tl.load(kv_start + batch), 0)
    if HAS_WINDOW:
        start = tl.maximum(start, nk - nq - window + 1)

    q_rows = ((first_head + lane // nq) * stride_qh + queries.to(tl.int64) * stride_qn) * UNIT
    q += batch * stride_qb * UNIT
    k += batch * stride_kb * UNIT + first_head // group * stride_kh * UNIT
    v += batch * stride_vb * UNIT + first_head // group * stride_vh * UNIT
    step_k = stride_kn.to(tl.int64) * UNIT
    step_v = stride_vn.to(tl.int64) * UNIT
    step_i = stride_it.to(tl.int64)
    step_c = stride_cc.to(tl.int64)
    q0 = load_rows(q, q_rows, 1, is_row, 0, D0, D, True)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        q1 = load_rows(q, q_rows, 1, is_row, D0, D1, D, True)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    else:
        q1 = q0
        acc1 = acc0
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    # --- this split's share of the blocks, cut in tiles of BLOCK_N keys ---
    ids = block_index + batch * stride_ib + index_head * stride_ih
    count = tl.load(block_count + batch * stride_nb + index_head * stride_nh)
    blocks = (nk + BLOCK_K - 1) // BLOCK_K
    begin, end = span(ids, step_i, tl.minimum(count, block_capacity), start // BLOCK_K, blocks)
    SUB: tl.constexpr = BLOCK_K // BLOCK_N
    share = ((end - begin) * SUB + splits - 1) // splits
    for i in tl.range(begin * SUB + split * share, tl.minimum(begin * SUB + (split + 1) * share, end * SUB)):
        block = tl.load(ids + i // SUB * step_i)
        block = tl.where((block >= 0) & (block < blocks), block, blocks)
        keys = block * BLOCK_K + (i % SUB) * BLOCK_N + tl.arange(0, BLOCK_N)
        present = (keys >= start) & (keys < nk)
        allowed = present[None, :]
        if CAUSAL:
            allowed = allowed & (keys[None, :] <= positions[:, None])
        if HAS_WINDOW:
            allowed = allowed & (keys[None, :] > positions[:, None] - window)
        acc0, acc1, row_max, row_sum = attend(
            q0, q1, acc0, acc1, row_max, row_sum, k, v, step_k, step_v,
            keys, present, allowed, qk_scale, D, D0, D1, True, PRECISION,
        )  # fmt: skip

    # --- this split's share of the single keys, in groups of BLOCK_C ---
    if HAS_COLUMNS:
        columns = column_index + batch * stride_cb + index_head * stride_ch
        column_n = tl.load(column_count + batch * stride_cnb + index_head * stride_cnh)
        covered_row = covered + (batch * stride_wb + index_head * stride_wh)
        column_begin, column_end = span(columns, step_c, tl.minimum(column_n, column_capacity), start, nk)
        share = ((column_end - column_begin + BLOCK_C - 1) // BLOCK_C + splits - 1) // splits * BLOCK_C
        column_begin += split * share
        column_end = tl.minimum(column_end, column_begin + share)
        for i in tl.range(column_begin, column_end, BLOCK_C):
            entries = i + tl.arange(0, BLOCK_C)
            keys = tl.load(columns + entries * step_c, mask=entries < column_end, other=-1)
            present = (keys >= start) & (keys < nk)
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
                q0, q1, acc0, acc1, row_max, row_sum, k, v, step_k, step_v,
                keys, present, allowed, qk_scale, D, D0, D1, True, PRECISION,
            )  # fmt: skip

    seen = row_sum != 0
    inverse = tl.where(seen, 1.0 / tl.where(seen, row_sum, 1.0), 0.0)
    row_lse = tl.where(seen, row_max + tl.log2(tl.where(seen, row_sum, 1.0)), float("-inf"))
    if not SPLIT:
        row_lse *= 0.6931471805599453
    at = split.to(tl.int64) * rows + (batch * heads + first_head) * nq + lane
    tl.store(lse + at, row_lse, mask=is_row)
    dims0 = tl.arange(0, D0)
    dtype: tl.constexpr = out.dtype.element_ty
    out += at[:, None] * D
    mask0 = is_row[:, None] & (dims0 < D)[None, :]
    tl.store(out + dims0[None, :], (acc0 * inverse[:, None]).to(dtype), mask=mask0)
    if D1 > 0:
        dims1 = D0 + tl.arange(0, D1)
        mask1 = is_row[:, None] & (dims1 < D)[None, :]
        tl.store(out + dims1[None, :], (acc1 * inverse[:, None]).to(dtype), mask=mask1)


@triton.jit(do_not_specialize=["splits", "rows"], do_not_specialize_on_alignment=["part_lse", "lse"])
def merge_splits_kernel(
    part_out,
    part_lse,
    out,
    lse,
    splits,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    parts = tl.load(part_lse + split.to(tl.int64) * rows + row, mask=split < splits, other=float("-inf"))
    top = tl.max(parts, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # a row that saw no key
    total = tl.sum(tl.exp2(parts - top), 0)
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    dims = tl.arange(0, BLOCK_D)
    merged = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(0, splits, CHUNK):
        some = first + tl.arange(0, CHUNK)
        at = some.to(tl.int64) * rows + row
        weight = tl.exp2(tl.load(part_lse + at, mask=some < splits, other=float("-inf")) - top) * inverse
        inside = (some < splits)[:, None] & (dims < D)[None, :]
        values = tl.load(part_out + at[:, None] * D + dims[None, :], mask=inside, other=0.0)
        merged += tl.sum(values * weight[:, None], 0)
    tl.store(out + row * D + dims, merged.to(out.dtype.element_ty), mask=dims < D)
    seen = total > 0
    result = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf")) * 0.6931471805599453
    tl.store(lse + row, result)


def choose_pack(shared: int, nq: int) -> int:
    """How many of the `shared` heads, which read the same keys with the same list, fit a tile of MAX_ROWS rows."""
    return max(pack for pack in range(1, shared + 1) if shared % pack == 0 and pack * nq <= MAX_ROWS)


def choose_splits(units: int, keys: int, processors: int) -> int:
    """The number of programs that share each of `units` lists of up to `keys` keys.

    If the lists are long enough, there are about two programs for each SM.
    """
    return max(1, min(triton.cdiv(2 * processors, max(units, 1)), keys // SPLIT_KEYS, MAX_SPLITS))


def split_attention(
    q, k, v, out, lse, lists, kv_start, scale, strides, window, *, pack, index_group, splits, config, options
) -> None:
    """Fills out and lse. All queries are in one query block. `options` are the kernel's constants except its tile."""
    batch, heads, nq, d = q.shape
    nk = k.shape[2]
    rows = batch * heads * nq
    part_out, part_lse = out, lse
    if splits > 1:
        part_out = q.new_empty((splits, rows, d), dtype=torch.float32)
        part_lse = q.new_empty((splits, rows), dtype=torch.float32)
    with on(q.device):
        # The lists are the grid's first dimension, because only this dimension may be above 65,535.
        split_attention_kernel[(batch * heads // pack, splits)](
            q,
            k,
            v,
            part_out,
            part_lse,
            *lists.tensors,
            kv_start if kv_start is not None else part_lse,
            scale,
            *strides,
            *lists.strides,
            *lists.capacities,
            nq,
            nk,
            window or 0,
            splits,
            rows,
            heads,
            pack,
            heads // k.shape[1],
            index_group,
            **options,
            BLOCK_M=config.block_m,
            SPLIT=splits > 1,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits == 1:
            return
        merge_splits_kernel[(rows,)](
            part_out,
            part_lse,
            out,
            lse,
            splits,
            rows,
            D=d,
            BLOCK_D=triton.next_power_of_2(d),
            BLOCK_S=triton.next_power_of_2(splits),
            CHUNK=min(16, triton.next_power_of_2(splits)),
            num_warps=4,
        )

"""What attention asks of a block index before it walks it: where a row's ids begin and end, which of its columns a
block covers already, and which rows are the longest.

The two kernels here are passes over the index alone: `covered_columns_kernel` writes a bit for each listed column,
`row_work_kernel` a number for each query tile. Floor: the index read once; both are far below the attention they serve.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import on

COVERED_WORDS = 32  # a program of the covered-columns pass writes this many words of 32 columns
LONG_ROW = 64  # key blocks; see `longest_first`


# --- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def lower_bound(ids, stride, low, high, value):
    """The first position in [low, high) whose id is at least `value`, or `high`. (All strides here are int64.)"""
    while low < high:
        middle = low + (high - low) // 2
        below = tl.load(ids + middle * stride) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def span(ids, stride, count, first, end):
    """Positions [begin, finish) of the ids in [first, end). Lists built for this row need no search: two loads."""
    some = count > 0
    lowest = tl.load(ids, mask=some, other=0)
    highest = tl.load(ids + (tl.maximum(count, 1) - 1) * stride, mask=some, other=0)
    count = tl.maximum(count, 0)
    begin = lower_bound(ids, stride, count * 0, tl.where(lowest < first, count, 0), first)
    finish = lower_bound(ids, stride, tl.where(highest < end, count, begin), count, end)
    return begin, finish


@triton.jit
def place(program, section, group, tiles, streams):
    """(stream, query head of its group, query tile) of a program. In order: section of KV heads, query tile (last
    first), KV head of the section, query head of its group."""
    per_section = section * group * tiles
    this_section = program // per_section
    at = program - this_section * per_section
    lanes = tl.minimum(section, streams - this_section * section) * group
    lane = at % lanes
    return this_section * section + lane // group, lane % group, tiles - 1 - at // lanes


@triton.jit(
    do_not_specialize=[
        "stride_nb", "stride_nh", "stride_nr", "stride_ib", "stride_ih", "stride_ir", "stride_it",
        "stride_cnb", "stride_cnh", "stride_cnr", "stride_cb", "stride_ch", "stride_cr", "stride_cc",
        "block_capacity", "column_capacity", "index_heads", "rows", "words", "steps",
    ],
    do_not_specialize_on_alignment=["block_count", "block_index", "column_count", "column_index", "covered"],
)  # fmt: skip
def covered_columns_kernel(
    block_count,
    block_index,
    column_count,
    column_index,
    covered,
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
    block_capacity,
    column_capacity,
    index_heads,
    rows,
    words,
    steps,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One bit for each listed column of each row: whether a listed block holds it. A binary search by each lane.

    It stands apart because a chain of dependent loads inside the attention loop keeps that loop from being pipelined
    (compiled for sm_90 the two together spilled 3 KB a thread), and because query heads may share an index head.
    """
    program = tl.program_id(0)
    row = (program % rows).to(tl.int64)
    head = (program // rows % index_heads).to(tl.int64)
    batch = (program // rows // index_heads).to(tl.int64)
    ids = block_index + batch * stride_ib + head * stride_ih + row * stride_ir
    columns = column_index + batch * stride_cb + head * stride_ch + row * stride_cr
    count = tl.minimum(tl.load(block_count + batch * stride_nb + head * stride_nh + row * stride_nr), block_capacity)
    columns_here = tl.load(column_count + batch * stride_cnb + head * stride_cnh + row * stride_cnr)
    columns_here = tl.minimum(columns_here, column_capacity)
    step_i = stride_it.to(tl.int64)
    step_c = stride_cc.to(tl.int64)
    entries = tl.program_id(1) * (WORDS * 32) + tl.arange(0, WORDS * 32)
    wanted = tl.load(columns + entries * step_c, mask=entries < columns_here, other=0) // BLOCK_K
    found = tl.zeros_like(wanted)
    last = tl.full(wanted.shape, -1, tl.int32)
    for i in tl.range(0, steps):
        candidate = found + (1 << (steps - 1 - i))
        inside = candidate <= count
        entry = tl.load(ids + (candidate - 1) * step_i, mask=inside, other=0)
        accept = inside & (entry <= wanted)
        found = tl.where(accept, candidate, found)
        last = tl.where(accept, entry, last)
    bits = tl.reshape(((found > 0) & (last == wanted)).to(tl.int32), (WORDS, 32))
    packed = tl.sum(bits << tl.arange(0, 32)[None, :], 1)
    at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    tl.store(covered + program.to(tl.int64) * words + at, packed, mask=at < words)


@triton.jit(
    do_not_specialize=[
        "stride_nb", "stride_nh", "stride_nr", "stride_cnb", "stride_cnh", "stride_cnr", "block_capacity",
        "column_capacity", "nq", "nk", "tiles", "streams", "section", "kv_heads", "group", "index_group", "programs",
    ],
    do_not_specialize_on_alignment=["block_count", "column_count", "work"],
)  # fmt: skip
def row_work_kernel(
    block_count,
    column_count,
    work,
    stride_nb,
    stride_nh,
    stride_nr,
    stride_cnb,
    stride_cnh,
    stride_cnr,
    block_capacity,
    column_capacity,
    nq,
    nk,
    tiles,
    streams,
    section,
    kv_heads,
    group,
    index_group,
    programs,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A key for each program: earlier sections first, and in a section the tile with the most key blocks."""
    program = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    real = program < programs
    stream, lane, tile = place(tl.where(real, program, 0), section, group, tiles, streams)
    batch = (stream // kv_heads).to(tl.int64)
    head = ((stream % kv_heads * group + lane) // index_group).to(tl.int64)
    row = (tile * BLOCK_M // BLOCK_Q).to(tl.int64)
    at = batch * stride_nb + head * stride_nh + row * stride_nr
    length = tl.minimum(tl.load(block_count + at, mask=real, other=0), block_capacity)
    if CAUSAL:
        length = tl.minimum(length, (tl.minimum((tile + 1) * BLOCK_M, nq) + nk - nq + BLOCK_K - 1) // BLOCK_K)
    longest = block_capacity
    if HAS_COLUMNS:
        at = batch * stride_cnb + head * stride_cnh + row * stride_cnr
        columns = tl.minimum(tl.load(column_count + at, mask=real, other=0), column_capacity)
        length += tl.maximum(columns, 0) // BLOCK_K
        longest += column_capacity // BLOCK_K
    key = stream // section * (longest + 1) + longest - tl.maximum(length, 0)
    tl.store(work + program, key, mask=real)


# --- launchers -------------------------------------------------------------------------------------------------------


class Lists(NamedTuple):
    """An index as the attention kernels take it: tensors, strides (0 where one entry serves all), capacities."""

    tensors: tuple[torch.Tensor, ...]
    strides: tuple[int, ...]
    capacities: tuple[int, int]
    has_columns: bool
    has_covered: bool

    def keys(self, block_k: int) -> int:
        """The most keys that a row can list."""
        return self.capacities[0] * block_k + (self.capacities[1] if self.has_columns else 0)


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(0 if n == 1 else s for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))


def make_lists(block_count, block_index, column_count, column_index, block_k: int) -> Lists:
    """Runs the covered-columns pass where a row has both blocks and columns."""
    has_columns = column_count is not None and column_index.shape[-1] > 0
    if not has_columns:
        column_count, column_index = block_count, block_index
    capacities = block_index.shape[-1], column_index.shape[-1]
    strides = (*_strides(block_count), *_strides(block_index), block_index.stride(-1))
    strides += (*_strides(column_count), *_strides(column_index), column_index.stride(-1))
    tensors = (block_count, block_index, column_count, column_index)
    if not has_columns or capacities[0] == 0:
        return Lists((*tensors, block_count), (*strides, 0, 0, 0), capacities, has_columns, False)
    batch, heads, rows = block_count.shape
    words = triton.cdiv(capacities[1], 32)
    covered = block_count.new_empty(batch, heads, rows, words)
    with on(block_count.device):
        covered_columns_kernel[(batch * heads * rows, triton.cdiv(words, COVERED_WORDS))](
            *tensors,
            covered,
            *strides,
            *capacities,
            heads,
            rows,
            words,
            capacities[0].bit_length(),
            BLOCK_K=block_k,
            WORDS=COVERED_WORDS,
            num_warps=4,
        )
    # The index's head dim may be 1 for the columns' lists, never for the bits.
    strides += (0 if batch == 1 else covered.stride(0), covered.stride(1), words)
    return Lists((*tensors, covered), strides, capacities, True, True)


def longest_first(
    lists: Lists,
    *,
    nq: int,
    nk: int,
    tiles: int,
    streams: int,
    section: int,
    kv_heads: int,
    group: int,
    index_group: int,
    block_q: int,
    block_k: int,
    block_m: int,
    causal: bool,
) -> torch.Tensor | None:
    """The order in which programs should start, int64 [programs], or None where the plain order will do.

    Blocks of a grid start in order as others end, which balances by itself, unless a long row starts last. Causal
    prefill cannot have that: tiles run last to first, and row r has r + 1 blocks at most. A chunk over a long past can,
    and so can attention without causality: there the shortest row may list thousands of blocks. It costs one small
    kernel and a radix sort of one int32 a program, on the device, so it is done only where the first row may list
    LONG_ROW blocks or more, and there is more than one tile to order.
    """
    programs = tiles * streams * group
    visible = min(nk - nq if causal else nk, lists.keys(block_k)) // block_k
    if tiles == 1 or visible < LONG_ROW:
        return None
    block_count, _, column_count, _, _ = lists.tensors
    work = block_count.new_empty(programs)
    with on(block_count.device):
        row_work_kernel[(triton.cdiv(programs, 256),)](
            block_count,
            column_count,
            work,
            *lists.strides[:3],
            *lists.strides[7:10],
            *lists.capacities,
            nq,
            nk,
            tiles,
            streams,
            section,
            kv_heads,
            group,
            index_group,
            programs,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_M=block_m,
            CAUSAL=causal,
            HAS_COLUMNS=lists.has_columns,
            CHUNK=256,
            num_warps=4,
        )
    return torch.argsort(work, stable=True)

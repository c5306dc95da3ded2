"""What attention needs to know about a block index before it uses it.

It needs where a row's ids begin and end, which of the row's columns a listed block already covers, and which rows are
the longest. The two kernels of this file read only the index. `covered_columns_kernel` writes a bit for each listed
column. `row_work_kernel` writes a number for each query tile. Floor: the index is read once. Both kernels take far less
time than the attention that uses their results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import on

COVERED_WORDS = 32  # the words, of 32 columns each, that a program of `covered_columns_kernel` writes
LONG_ROW = 64  # key blocks; see `longest_first`


# --- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def lower_bound(ids, stride, low, high, value):
    """The first position in [low, high) whose id is at least `value`, or `high`. `stride` is int64."""
    while low < high:
        middle = low + (high - low) // 2
        below = tl.load(ids + middle * stride) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def span(ids, stride, count, first, end):
    """Positions [begin, finish) of the ids in [first, end). If all ids are in this range, two loads are enough."""
    some = count > 0
    lowest = tl.load(ids, mask=some, other=0)
    highest = tl.load(ids + (tl.maximum(count, 1) - 1) * stride, mask=some, other=0)
    count = tl.maximum(count, 0)
    begin = lower_bound(ids, stride, count * 0, tl.where(lowest < first, count, 0), first)
    finish = lower_bound(ids, stride, tl.where(highest < end, count, begin), count, end)
    return begin, finish


@triton.jit
def place(program, section, group, tiles, streams):
    """(stream, query head of its group, query tile) of a program.

    Programs are ordered by section of KV heads, then by query tile (last first), then by KV head of the section, then
    by query head of the KV head's group.
    """
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
    """One bit for each listed column of each row: whether a listed block holds it. Each lane does a binary search.

    This is a separate kernel for two reasons. A chain of dependent loads inside the attention loop prevents pipelining
    (compiled for sm_90, the two together spilled 3 KB a thread). And several query heads may share an index head.
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
    """A sort key for each program. Earlier sections come first, and within a section the tile with most key blocks."""
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
    """An index in the form that the attention kernels need. A batch, head or row stride is 0 if its dim is 1."""

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
    """The `Lists` of an index. If it has both blocks and columns, this runs `covered_columns_kernel`."""
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
    # The bits have an entry for every index head and row. An index with a batch of 1 serves all sequences.
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
    """The order in which programs should start, int64 [programs], or None if the usual order is good enough.

    The blocks of a grid start in order, each as soon as another one ends. This balances the work unless a long row
    starts last. In causal prefill this cannot happen, because tiles run from last to first, and row r has at most r + 1
    blocks. It can happen for a chunk of queries after a long past, and for attention without causality, because there
    even the first row may list thousands of blocks.

    The order costs one small kernel and a radix sort of one int32 a program, both on the device. So it is computed only
    if the first row may list LONG_ROW blocks or more and there is more than one tile.
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

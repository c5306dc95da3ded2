"""Bitmap weights: counting the bits before a weight gives the place of its value. Without a bit, the weight is 0.

      a tile:  rows × bytes of the mask × 8 columns          place of a value = where the row's values begin
                                                                              + bits of the row before the tile
        bytes      ┌──┬──┬──┬──┐  each byte's bits, summed                    + bits of the bytes before, in the tile
        rows       │  │  │  │  │  along the bytes and                         + bits of the byte before its own
                   └──┴──┴──┴──┘  within the byte

Neighbouring columns read neighbouring values. `bitmap_decompress` stores the tile. `bitmap_gemm` computes
outᵀ = W · xᵀ, with the tile as the first operand. Several programs share the columns of a row. A program that does not
start at the beginning of a row first counts the bits before its part. For this it reads some of the mask again, mostly
from L2.

A second kernel adds the products of the parts of K in order. If x has DENSE_ROWS rows or more, the weight is
decompressed and multiplied by torch's GEMM, which reads x fewer times.

Floor: for each weight of 16 bits at density d, 2 d + 1/8 bytes are read. `bitmap_decompress` also writes 2 bytes. If
the package is built with nvcc, `csrc/cuda/bitmap_*.cu` runs instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..reference.bitmap import INTEGER
from ._common import device_limits, on, precision
from .int4_gemm import add_parts_kernel

SEGMENT = 2048  # the least number of columns that a program of bitmap_decompress has
SEGMENTS = 8  # the most programs that share a row; each of them counts all bits before its part
PART = 1024  # the least K of a part
MAX_PARTS = 8
PROGRAMS = 4  # a product is split into parts until there are this many programs for each SM
DENSE_ROWS = 97


@triton.jit
def load_bytes(mask_rows, is_row, first, row_bytes, BYTES: tl.constexpr):
    at = first + tl.arange(0, BYTES)
    inside = is_row[:, None] & (at < row_bytes)[None, :]
    return tl.load(mask_rows[:, None] + at[None, :], mask=inside, other=0).to(tl.int32)


@triton.jit
def bits_before(mask_rows, is_row, begin, row_bytes, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """The number of set bits in the first `begin` bytes of each row."""
    count = tl.zeros([ROWS], tl.int32)
    for first in tl.range(0, begin, BYTES):
        byte = load_bytes(mask_rows, is_row, first, row_bytes, BYTES)
        byte -= (byte >> 1) & 0x55
        byte = (byte & 0x33) + ((byte >> 2) & 0x33)
        count += tl.sum((byte + (byte >> 4)) & 15, 1)
    return count


@triton.jit
def expand(
    values,
    scales,
    byte,
    rows,
    start,
    count,
    first_column,
    cols,
    stored,
    groups,
    group_size,
    BYTES: tl.constexpr,
    NIBBLES: tl.constexpr,
    SCALED: tl.constexpr,
    UNIT_SCALES: tl.constexpr,
):
    """The tile [rows, bytes, 8] of the weight (times its scales if SCALED), and the number of set bits of each row."""
    columns = first_column + (tl.arange(0, BYTES) * 8)[:, None] + tl.arange(0, 8)[None, :]
    bits = ((byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1) * (columns < cols)[None, :, :].to(tl.int32)
    each = tl.sum(bits, 2)
    before = count[:, None] + tl.cumsum(each, 1) - each
    place = before[:, :, None] + tl.cumsum(bits, 2) - bits
    place = start[:, None, None] + place
    inside = (bits == 1) & (place >= 0) & (place < stored)
    if NIBBLES:
        pair = tl.load(values + (place >> 1), mask=inside, other=0).to(tl.int32)
        value = (pair >> ((place & 1) * 4).to(tl.int32)) & 15
        value = (value ^ 8) - 8
    else:
        value = tl.load(values + place, mask=inside, other=0)
    if SCALED:
        scale_rows = scales + rows.to(tl.int64) * groups
        if UNIT_SCALES:
            group = (first_column + tl.arange(0, BYTES) * 8) // group_size
            at = scale_rows[:, None] + group[None, :]
            scale = tl.load(at, mask=each > 0, other=0.0).to(tl.float32)[:, :, None]
        else:
            at = scale_rows[:, None, None] + (columns // group_size)[None, :, :]
            scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(tl.float32) * scale
    return value, tl.sum(each, 1)


@triton.jit(do_not_specialize=["n", "col_units", "row_bytes", "stored", "groups", "group_size", "segment_bytes"])
def bitmap_decompress_kernel(
    values,
    bitmask,
    row_offsets,
    scales,
    out,
    # The row stride and the columns are in units of UNIT elements. UNIT is a constant, so the compiler can use 16-byte
    # stores.
    out_units,
    n,
    col_units,
    row_bytes,
    stored,
    groups,
    group_size,
    segment_bytes,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    NIBBLES: tl.constexpr,
    SCALED: tl.constexpr,
    UNIT_SCALES: tl.constexpr,
):
    cols = col_units * UNIT
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n
    mask_rows = bitmask + rows.to(tl.int64) * row_bytes
    start = tl.load(row_offsets + rows, mask=is_row, other=0)
    begin = tl.program_id(1) * segment_bytes
    count = bits_before(mask_rows, is_row, begin, row_bytes, ROWS, BYTES)
    out_rows = out + rows.to(tl.int64) * out_units * UNIT
    in_byte = (tl.arange(0, BYTES) * 8)[:, None] + tl.arange(0, 8)[None, :]
    for first in tl.range(begin, tl.minimum(begin + segment_bytes, row_bytes), BYTES):
        byte = load_bytes(mask_rows, is_row, first, row_bytes, BYTES)
        tile, bits = expand(values, scales, byte, rows, start, count, first * 8, cols, stored, groups, group_size,
                            BYTES, NIBBLES, SCALED, UNIT_SCALES)  # fmt: skip
        count += bits
        columns = first * 8 + in_byte
        inside = is_row[:, None, None] & (columns < cols)[None, :, :]
        tl.store(out_rows[:, None, None] + columns[None, :, :], tile.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["m", "n", "k_units", "row_bytes", "stored", "groups", "group_size", "part_bytes", "parts"]
)
def bitmap_gemm_kernel(
    x,
    values,
    bitmask,
    row_offsets,
    scales,
    bias,
    out,
    x_units,
    m,
    n,
    k_units,
    row_bytes,
    stored,
    groups,
    group_size,
    part_bytes,
    parts,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NIBBLES: tl.constexpr,
    SCALED: tl.constexpr,
    UNIT_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BYTES: tl.constexpr = BLOCK_K // 8
    k = k_units * UNIT
    tiles_m = (m + BLOCK_M - 1) // BLOCK_M
    columns = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    is_column, is_row = columns < n, rows < m
    mask_rows = bitmask + columns.to(tl.int64) * row_bytes
    start = tl.load(row_offsets + columns, mask=is_column, other=0)
    begin = tl.program_id(1) * part_bytes
    count = bits_before(mask_rows, is_column, begin, row_bytes, BLOCK_N, BYTES)
    depth = tl.arange(0, BLOCK_K)
    x_rows = x + rows.to(tl.int64)[:, None] * x_units * UNIT + depth[None, :]
    result = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in tl.range(begin, tl.minimum(begin + part_bytes, row_bytes), BYTES):
        byte = load_bytes(mask_rows, is_column, first, row_bytes, BYTES)
        tile, bits = expand(values, scales, byte, columns, start, count, first * 8, k, stored, groups, group_size,
                            BYTES, NIBBLES, SCALED, UNIT_SCALES)  # fmt: skip
        count += bits
        weight = tl.reshape(tile.to(x.dtype.element_ty), [BLOCK_N, BLOCK_K])
        left = tl.load(x_rows + first * 8, mask=is_row[:, None] & (first * 8 + depth < k)[None, :], other=0.0)
        result = tl.dot(weight, tl.trans(left), result, input_precision=PRECISION)
    inside = is_column[:, None] & is_row[None, :]
    at_out = rows.to(tl.int64)[None, :] * n + columns[:, None]
    if parts > 1:
        at_out += tl.program_id(1).to(tl.int64) * m * n
    if HAS_BIAS:
        result += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at_out, result.to(out.dtype.element_ty), mask=inside)


def _weight_arguments(values, scales, cols: int, group_size: int):
    """(row bytes, stored, groups, group size), and the kernels' constants that depend on the weight."""
    nibbles = values.dtype == torch.uint8
    group = cols if scales is None or group_size == -1 else min(group_size, cols)
    groups = triton.cdiv(cols, group)
    numbers = triton.cdiv(cols, 8), len(values) * (2 if nibbles else 1), groups, group
    unit_scales = groups == 1 or group % 8 == 0
    return numbers, dict(NIBBLES=nibbles, SCALED=scales is not None, UNIT_SCALES=unit_scales)


def decompress_to(out, values, bitmask, row_offsets, cols: int, scales=None, group_size: int = -1) -> None:
    """Fills out [N, cols]. Quantised weights are rounded to its dtype."""
    n = bitmask.shape[0]
    if n == 0 or cols == 0:
        return
    numbers, constants = _weight_arguments(values, scales, cols, group_size)
    if scales is None:
        integer = INTEGER[values.element_size()]
        values, out = values.view(integer), out.view(integer)
    rows, block = 4, 512
    segment = max(SEGMENT, triton.cdiv(triton.cdiv(cols, SEGMENTS), block) * block)
    unit = 16 // out.element_size()
    unit = unit if out.stride(0) % unit == 0 and cols % unit == 0 else 1
    with on(out.device):
        bitmap_decompress_kernel[(triton.cdiv(n, rows), triton.cdiv(cols, segment))](
            values,
            bitmask,
            row_offsets,
            scales if scales is not None else values,
            out,
            out.stride(0) // unit,
            n,
            cols // unit,
            *numbers,
            segment // 8,
            UNIT=unit,
            ROWS=rows,
            BYTES=block // 8,
            **constants,
            num_warps=4,
        )


def bitmap_decompress(values, bitmask, row_offsets, cols: int, *, scales=None, group_size: int = -1):
    """`torch.ops.headstart.bitmap_decompress` on Triton; see `ops/bitmap.py` for the contract."""
    out = (values if scales is None else scales).new_empty(bitmask.shape[0], cols)
    decompress_to(out, values, bitmask, row_offsets, cols, scales, group_size)
    return out


def bitmap_gemm(x, values, bitmask, row_offsets, bias=None, *, cols: int, scales=None, group_size: int = -1):
    """`torch.ops.headstart.bitmap_gemm` on Triton; see `ops/bitmap.py` for the contract."""
    n = bitmask.shape[0]
    m = x.shape[:-1].numel()
    rows = x.reshape(m, cols)
    if m >= DENSE_ROWS or cols == 0:
        dense = x.new_empty(n, cols)
        decompress_to(dense, values, bitmask, row_offsets, cols, scales, group_size)
        return F.linear(x, dense, bias)
    out = x.new_empty((*x.shape[:-1], n))
    if m == 0 or n == 0:
        return out
    numbers, constants = _weight_arguments(values, scales, cols, group_size)
    stride = rows.stride(0) if m > 1 else cols
    unit = 8 if stride % 8 == 0 and cols % 8 == 0 else 1
    # If they were twice as large, tiles of float32 would spill, and so would tiles of quantised values with 64 rows.
    block_n, block_m, block_k = 32, 16 if m <= 16 else 32 if m <= 32 else 64, 32 if x.dtype == torch.float32 else 64
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    wanted = triton.cdiv(PROGRAMS * device_limits(x.device).processors, tiles)
    parts = max(1, min(wanted, triton.cdiv(cols, PART), MAX_PARTS))
    part = triton.cdiv(triton.cdiv(cols, parts), block_k) * block_k
    parts = triton.cdiv(cols, part)
    target = x.new_empty((parts, m, n), dtype=torch.float32) if parts > 1 else out
    bias = None if bias is None else bias.contiguous()
    with on(x.device):
        bitmap_gemm_kernel[(tiles, parts)](
            rows,
            values,
            bitmask,
            row_offsets,
            scales if scales is not None else values,
            bias if bias is not None else out,
            target,
            stride // unit,
            m,
            n,
            cols // unit,
            *numbers,
            part // 8,
            parts,
            UNIT=unit,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            **constants,
            HAS_BIAS=bias is not None and parts == 1,
            PRECISION=precision(x),
            num_warps=4,
        )
        if parts > 1:
            block = 512
            add_parts_kernel[(triton.cdiv(m * n, block),)](
                target,
                bias if bias is not None else out,
                out,
                m * n,
                n,
                parts,
                BLOCK=block,
                HAS_BIAS=bias is not None,
                num_warps=4,
            )
    return out

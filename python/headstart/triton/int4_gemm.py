"""Int4 GEMM: the packed weight is read in place, dequantised in registers and multiplied by tensor cores.

The product is taken transposed, outᵀ = W · xᵀ, so that the side of W, never short, is the one that tensor cores want
64 long (Hopper's wgmma), whether x has one row or a thousand, and W is the operand that may stay in registers.

          x rows          a block of K is BLOCK_K / 32 slabs, in the order of the packed words (csrc/layouts/int4.h):
         ┌──────┐            word [column, slab, t]  >> 4 i + 16 h & 15  =  code [column, slab, i, t, h]
    W    │      │         and that is [column, k] as it stands, since k = 32 slab + 8 i + 2 t + h: a broadcast and a
 columns │      │         reshape, no gather.
         └──────┘            sum += scale · (code - zero) · xᵀ

Codes become floats by a magic number: code | 0x4B000000 is 2^23 + code as float32, and 2^23 + zero is taken off
exactly, so a fragment holds code - zero, an integer that every dtype represents. The scale is applied to float32 sums.

K is cut into parts by its length alone. Where there are few tiles (small M), each part is a program of its own and
`add_parts_kernel` adds them in order; where there are many, one program walks all parts and adds in the same order.
With blocks of K that depend on nothing but the group size, a row's result does not depend on the batch around it.

Floor: few rows, K · N / 2 bytes and scales and zeros at the memory's rate (2.6 µs for 4096 × 4096, group 128, at 3.35
TB/s); many rows, 2 · M · N · K operations. Parts cost 8 · parts · M · N bytes between the two kernels, mostly in L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import device_limits, on, precision

PART = 1024  # of K, at least; a shorter part costs more to add than it saves
MAX_PARTS = 16
PROGRAMS = 2  # an SM that parts are split up for


class Tile(NamedTuple):
    """Output columns and rows of x of a program."""

    columns: int
    rows: int
    num_warps: int
    num_stages: int


def choose_tile(m: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(64, 16, 4, 3) if m <= 16 else Tile(64, 64, 8, 3)
    if m <= 16:
        return Tile(64, 16, 4, 5)
    if m <= 32:
        return Tile(64, 32, 4, 4)
    return Tile(64, 64, 4, 4) if m <= 64 else Tile(64, 128, 8, 3)


def choose_parts(k: int) -> tuple[int, int]:
    """(parts, slabs of a part): from K alone."""
    slabs = triton.cdiv(k, 32)
    parts = max(1, min(triton.cdiv(k, PART), MAX_PARTS))
    part_slabs = triton.cdiv(triton.cdiv(slabs, parts), 4) * 4  # whole blocks of K, whatever their size
    return triton.cdiv(slabs, part_slabs), part_slabs


@triton.jit(do_not_specialize=["m", "n", "k_units", "stride_x", "group_slabs", "groups", "part_slabs", "parts"])
def int4_gemm_kernel(
    x,
    packed,
    scales,
    zeros,
    bias,
    out,
    # The row stride of x, and K, are in units of UNIT elements: a factor the compiler can see, for 16-byte loads.
    stride_x,
    m,
    n,
    k_units,
    group_slabs,
    groups,
    part_slabs,
    parts,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SLABS: tl.constexpr = BLOCK_K // 32
    k = k_units * UNIT
    slabs = (k + 31) // 32
    tiles_m = (m + BLOCK_M - 1) // BLOCK_M
    columns = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_panels = columns // 16 < (n + 15) // 16
    panel, place = (columns // 16).to(tl.int64), columns % 16
    slab = tl.arange(0, SLABS)
    words = packed + (panel * slabs * 64 + place)[:, None, None]
    words += (tl.arange(0, 4) * 16)[None, None, :]
    shifts = (tl.arange(0, 4) * 4)[:, None] + (tl.arange(0, 2) * 16)[None, :]
    scale_at = panel * groups * 16 + place
    depth = tl.arange(0, BLOCK_K)
    x_rows = x + rows.to(tl.int64)[:, None] * stride_x * UNIT + depth[None, :]
    is_row = (rows < m)[:, None]

    result = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = 0
    last = parts
    if SPLIT:
        first = tl.program_id(1)
        last = first + 1
    for part in tl.range(first, last, num_stages=1):
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for at in tl.range(part * part_slabs, tl.minimum(part * part_slabs + part_slabs, slabs), SLABS):
            in_words = in_panels[:, None, None] & (at + slab < slabs)[None, :, None]
            word = tl.load(words + (at + slab).to(tl.int64)[None, :, None] * 64, mask=in_words, other=0)
            group_at = scale_at + at // group_slabs * 16
            scale = tl.load(scales + group_at, mask=in_panels, other=0.0).to(tl.float32)
            if HAS_ZEROS:
                zero = tl.load(zeros + group_at, mask=in_panels, other=0).to(tl.float32)
            else:
                zero = tl.full([BLOCK_N], 8.0, tl.float32)
            code = ((word[:, :, None, :, None] >> shifts[None, None, :, None, :]) & 15) | 0x4B000000
            weight = code.to(tl.float32, bitcast=True) - (8388608.0 + zero)[:, None, None, None, None]
            weight = tl.reshape(weight.to(x.dtype.element_ty), [BLOCK_N, BLOCK_K])
            start = at * 32
            left = tl.load(x_rows + start, mask=is_row & (start + depth < k)[None, :], other=0.0)
            product = tl.dot(weight, tl.trans(left), input_precision=PRECISION)
            total += product * scale[:, None]
        result += total

    inside = (columns < n)[:, None] & (rows < m)[None, :]
    at_out = rows.to(tl.int64)[None, :] * n + columns[:, None]
    if SPLIT:
        at_out += tl.program_id(1).to(tl.int64) * m * n
    elif HAS_BIAS:
        result += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at_out, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size", "n", "parts"])
def add_parts_kernel(part, bias, out, size, n, parts, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    result = tl.zeros([BLOCK], tl.float32)
    for p in tl.range(0, parts):
        result += tl.load(part + size.to(tl.int64) * p + at, mask=inside, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias + at % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def int4_gemm(x, packed, scales, zeros=None, bias=None, *, group_size: int, n: int):
    """`torch.ops.headstart.int4_gemm` on Triton; see `ops/int4_gemm.py` for the contract."""
    k = x.shape[-1]
    out = x.new_empty((*x.shape[:-1], n))
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if m == 0:
        return out
    slabs = triton.cdiv(k, 32)
    group_slabs = slabs if group_size == -1 else group_size // 32
    stride = rows.stride(0) if m > 1 else k
    unit = 8 if k % 8 == 0 and stride % 8 == 0 else 1
    tile = choose_tile(m, x.dtype)
    tiles = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
    parts, part_slabs = choose_parts(k)
    split = parts > 1 and tiles < PROGRAMS * device_limits(x.device).processors
    target = x.new_empty((parts, m, n), dtype=torch.float32) if split else out
    bias = None if bias is None else bias.contiguous()
    with on(x.device):
        int4_gemm_kernel[(tiles, parts if split else 1)](
            rows,
            packed,
            scales,
            zeros if zeros is not None else packed,
            bias if bias is not None else out,
            target,
            stride // unit,
            m,
            n,
            k // unit,
            group_slabs,
            scales.shape[1],
            part_slabs,
            parts,
            UNIT=unit,
            BLOCK_N=tile.columns,
            BLOCK_M=tile.rows,
            BLOCK_K=64 if group_slabs % 2 == 0 or group_size == -1 else 32,
            HAS_ZEROS=zeros is not None,
            HAS_BIAS=bias is not None,
            SPLIT=split,
            PRECISION=precision(x),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if split:
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

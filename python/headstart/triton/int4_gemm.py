"""Int4 GEMM: the packed weight is read in place, dequantised in registers and multiplied by tensor cores.

The kernel computes the transposed product, outᵀ = W · xᵀ. Tensor cores need one side of at least 64 (Hopper's wgmma).
In this form it is the side of W's columns, which is never short, whether x has one row or a thousand. W is also the
operand that can stay in registers.

          x rows          a block of K is BLOCK_K / 32 slabs, in the order of the packed words (csrc/layouts/int4.h):
         ┌──────┐            word [column, slab, t]  >> 4 i + 16 h & 15  =  code [column, slab, i, t, h]
    W    │      │         this is [column, k] without any reordering, because k = 32 slab + 8 i + 2 t + h.
 columns │      │
         └──────┘            sum += scale · (code - zero) · xᵀ

    global ──cp.async──▶ shared, `num_stages` deep ──▶ registers: a lane's words ──▶ its fragment of W ──▶ tensor cores
           words, zeros, x                              (scales: loaded into registers, one block of K early)

Each lane unpacks the codes that it multiplies, so the unpacked weight never goes through shared memory. For this, the
words and every operation between them and the product must have the layout of the product's operand. Triton moves this
layout back to the loads past elementwise operations, joins, permutations and reshapes, but a shift by a `tl.arange`
stops it. So the kernel unpacks the eight codes of a word one by one, with constant shifts, and joins them.

The joined dimensions h and i must be registers of a lane, and t must be the lane's place in a group of four. Triton
gives a lane LANE_K adjacent k of a tile. With wgmma, LANE_K is 2. With mma.sync, it is 8 if the zero points are bytes,
and 4 without zero points: Triton divides 32 bits by the width of the narrowest load in the chain, or by half of it if
the chain has a join. For these cases the kernel takes k in another order within a slab, for both W and x:

    LANE_K 2:  slab, i, t, h       LANE_K 4:  slab, i // 2, t, i % 2, h       LANE_K 8:  slab, t, i, h

The order changes nothing in the result but its rounding. The tests count copies, loads and stores in the machine code.
So they fail if a version of Triton chooses another layout.

A magic number turns codes into floats. As a float32, code · 2^b | (150 - b) · 2^23 is 2^(23 - b) + code. Subtracting
2^(23 - b) + zero is exact, so a fragment holds code - zero, an integer that every dtype represents. The scale is
applied to float32 sums.

K is cut into parts, which depend only on its length. If there are few tiles (small M), each part has its own program,
and `add_parts_kernel` adds the parts in order. If there are many tiles, one program computes all parts and adds them in
the same order. The blocks of K depend only on the group size and the dtype. So the result of a row does not depend on
the other rows of the batch.

Floor for few rows: reading K · N / 2 bytes, scales and zeros at the memory's rate (2.6 µs for 4096 × 4096, group 128,
at 3.35 TB/s). Floor for many rows: 2 · M · N · K operations. Parts cost 8 · parts · M · N bytes between the two
kernels, mostly in L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import device_limits, on, precision

PART = 1024  # the least K of a part; a shorter part costs more to add than it saves
MAX_PARTS = 16
PROGRAMS = 2  # parts get their own programs if there are fewer tiles than this for each SM


class Tile(NamedTuple):
    """The output columns and the rows of x that one program computes, its warps and its pipeline stages."""

    columns: int
    rows: int
    num_warps: int
    num_stages: int


def choose_tile(m: int, dtype: torch.dtype, wgmma: bool) -> Tile:
    if dtype == torch.float32:
        return Tile(64, 16, 4, 3) if m <= 16 else Tile(64, 32, 4, 3)
    if m <= 16:
        return Tile(64, 16, 4, 4)
    if m <= 32:
        return Tile(64, 32, 4 if wgmma else 2, 4)
    if m <= 64:
        return Tile(64, 64, 4, 4)
    return Tile(128, 128, 8, 3) if wgmma else Tile(128, 64, 8, 3)


def choose_block_k(dtype: torch.dtype, group_slabs: int) -> int:
    """The length of a block of K, which lies within one group.

    A longer block needs fewer instructions other than those for the codes. `group_slabs` is 0 if K is one group. In
    that case, blocks of 128 spilled 88 B on sm_80.
    """
    if dtype != torch.float32 and group_slabs > 0 and group_slabs % 4 == 0:
        return 128
    return 64 if group_slabs % 2 == 0 else 32


def choose_parts(k: int) -> tuple[int, int]:
    """(parts, slabs of a part). They depend only on K."""
    slabs = triton.cdiv(k, 32)
    parts = max(1, min(triton.cdiv(k, PART), MAX_PARTS))
    part_slabs = triton.cdiv(triton.cdiv(slabs, parts), 4) * 4  # whole blocks of K, for each of the block sizes
    return triton.cdiv(slabs, part_slabs), part_slabs


def lane_k(dtype: torch.dtype, has_zeros: bool, wgmma: bool) -> int:
    """The number of adjacent k of the weight's tile that the compiler gives a lane; see LANE_K above."""
    if dtype == torch.float32 or wgmma:
        return 2
    return 8 if has_zeros else 4


@triton.jit
def group_of(slab, GROUP_SLABS: tl.constexpr):
    if GROUP_SLABS == 0:
        return slab * 0
    else:
        return slab // GROUP_SLABS


@triton.jit
def opened(words, PLACE: tl.constexpr, zero, dtype: tl.constexpr):
    """code - zero, exact, for the code that begins at bit PLACE. It is shifted only if it lies above the mantissa."""
    SHIFT: tl.constexpr = 0 if PLACE < 20 else 12
    BIT: tl.constexpr = PLACE - SHIFT
    magic = (words >> SHIFT & (15 << BIT)) | ((150 - BIT) << 23)  # 2^(23 - BIT) + code
    return (magic.to(tl.float32, bitcast=True) - (2.0 ** (23 - BIT) + zero)).to(dtype)


@triton.jit
def opened_pair(words, PAIR: tl.constexpr, zero, dtype: tl.constexpr):
    return tl.join(opened(words, 4 * PAIR, zero, dtype), opened(words, 4 * PAIR + 16, zero, dtype))


@triton.jit(do_not_specialize=["m", "n", "k_units", "stride_x", "groups", "part_slabs", "parts"])
def int4_gemm_kernel(
    x,
    packed,
    scales,
    zeros,
    bias,
    out,
    # The row stride of x, and K, are in units of UNIT elements. UNIT is a constant, so the compiler can use 16-byte
    # loads.
    stride_x,
    m,
    n,
    k_units,
    groups,
    part_slabs,
    parts,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SLABS: tl.constexpr,  # 0: one group
    LANE_K: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of BLOCK_K
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SLABS: tl.constexpr = BLOCK_K // 32
    dtype: tl.constexpr = x.dtype.element_ty
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
        begin = part * part_slabs
        end = tl.minimum(begin + part_slabs, slabs)
        next_scale = tl.load(scales + scale_at + group_of(begin, GROUP_SLABS) * 16, mask=in_panels, other=0.0)
        for at in tl.range(begin, end, SLABS):
            start = at * 32
            word_at = words + (at + slab).to(tl.int64)[None, :, None] * 64
            if EVEN:
                word = tl.load(word_at, mask=in_panels[:, None, None], other=0)
                left = tl.load(x_rows + start, mask=is_row, other=0.0)
            else:
                in_words = in_panels[:, None, None] & (at + slab < slabs)[None, :, None]
                word = tl.load(word_at, mask=in_words, other=0)
                left = tl.load(x_rows + start, mask=is_row & (start + depth < k)[None, :], other=0.0)
            if HAS_ZEROS:
                zero_at = scale_at + group_of(at, GROUP_SLABS) * 16
                zero = tl.load(zeros + zero_at, mask=in_panels, other=0).to(tl.float32)[:, None, None]
            else:
                zero = 8.0
            scale = next_scale.to(tl.float32)
            next_at = tl.minimum(at + SLABS, slabs - 1)
            next_scale = tl.load(scales + scale_at + group_of(next_at, GROUP_SLABS) * 16, mask=in_panels, other=0.0)

            pairs01 = tl.join(opened_pair(word, 0, zero, dtype), opened_pair(word, 1, zero, dtype))
            pairs23 = tl.join(opened_pair(word, 2, zero, dtype), opened_pair(word, 3, zero, dtype))
            weight = tl.join(pairs01, pairs23)  # [column, slab, t, h, i % 2, i // 2]
            if LANE_K == 2:
                weight = tl.permute(weight, (0, 1, 5, 4, 2, 3))
            else:
                left = tl.reshape(left, [BLOCK_M, SLABS, 2, 2, 4, 2])  # [row, slab, i // 2, i % 2, t, h]
                if LANE_K == 4:
                    weight = tl.permute(weight, (0, 1, 5, 2, 4, 3))
                    left = tl.permute(left, (0, 1, 2, 4, 3, 5))
                else:
                    weight = tl.permute(weight, (0, 1, 2, 5, 4, 3))
                    left = tl.permute(left, (0, 1, 4, 2, 3, 5))
                left = tl.reshape(left, [BLOCK_M, BLOCK_K])
            weight = tl.reshape(weight, [BLOCK_N, BLOCK_K])
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
    group_slabs = 0 if group_size in (-1, k) else group_size // 32
    block_k = choose_block_k(x.dtype, group_slabs)
    limits = device_limits(x.device)
    if k % 8 == 0 and m > 1 and rows.stride(0) % 8:
        rows = rows.contiguous()  # one copy here avoids loads of 2 bytes in every tile of columns
    stride = rows.stride(0) if m > 1 else k
    unit = 8 if k % 8 == 0 else 1
    # Single 16-bit values of x cannot be copied ahead to shared memory. They wait in registers, which hold few rows.
    tile = choose_tile(m if unit == 8 else min(m, 16), x.dtype, limits.wgmma)
    tiles = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
    parts, part_slabs = choose_parts(k)
    split = parts > 1 and tiles < PROGRAMS * limits.processors
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
            scales.shape[1],
            part_slabs,
            parts,
            UNIT=unit,
            BLOCK_N=tile.columns,
            BLOCK_M=tile.rows,
            BLOCK_K=block_k,
            GROUP_SLABS=group_slabs,
            LANE_K=lane_k(x.dtype, zeros is not None, limits.wgmma),
            EVEN=k % block_k == 0,
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

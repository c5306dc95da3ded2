"""What the Triton kernels of several operators share: a tile load, the cut of a head dim, a device's limits."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LN2 = math.log(2)


@triton.jit
def load_rows(
    base, rows, stride, row_mask, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr
):
    """base[rows, FIRST : FIRST + SIZE], zero past D and, if MASKED, where `row_mask` is false."""
    dims = FIRST + tl.arange(0, SIZE)
    pointers = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if MASKED and FIRST + SIZE > D:
        return tl.load(pointers, mask=row_mask[:, None] & (dims < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=row_mask[:, None], other=0.0)
    elif FIRST + SIZE > D:
        return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


class Limits(NamedTuple):
    """Of a device: shared memory a block may have and L2, in bytes, and whether its tensor cores are Hopper's."""

    shared_memory: int
    l2: int
    wgmma: bool


def split_head_dim(d: int) -> tuple[int, int]:
    """(D0, D1), powers of two from 16 with D0 + D1 >= d; D1 is 0 where one part wastes no more than two."""
    whole = max(16, 1 << (d - 1).bit_length())
    low = whole // 2
    if low < 16 or d <= low:
        return whole, 0
    rest = max(16, 1 << (d - low - 1).bit_length())
    return (low, rest) if low + rest < whole else (whole, 0)


@functools.lru_cache
def device_limits(device: torch.device) -> Limits:
    if device.type != "cuda":
        return Limits(160 * 1024, 40 * 1024 * 1024, False)
    properties = torch.cuda.get_device_properties(device)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 0) or 48 * 1024
    l2 = getattr(properties, "L2_cache_size", 0) or 4 * 1024 * 1024
    return Limits(shared_memory, l2, properties.major == 9)


def on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

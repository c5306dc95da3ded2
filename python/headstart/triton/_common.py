"""Code that the Triton kernels of several operators share: tile loads, one step of attention, a device's limits."""

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
    """base[rows, FIRST : FIRST + SIZE]. It is 0 past D, and, if MASKED, in rows where `row_mask` is false."""
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


@triton.jit
def attend(
    q0,
    q1,
    acc0,
    acc1,
    row_max,
    row_sum,
    k_base,
    v_base,
    stride_k,
    stride_v,
    keys,
    present,
    allowed,
    qk_scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax, over one tile of keys.

    `present` [BLOCK_N] masks the loads. `allowed` masks the scores.
    """
    k0 = load_rows(k_base, keys, stride_k, present, 0, D0, D, MASKED)
    scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        k1 = load_rows(k_base, keys, stride_k, present, D0, D1, D, MASKED)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(allowed, scores * qk_scale, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # For a row that has seen no key yet, any finite reference avoids -inf - -inf in the exponent.
        reference = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(row_max - reference)
    else:
        # qk_scale >= 0, so the maximum can be scaled after it is taken. One FMA scales a score and subtracts.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)
        weights = tl.exp2(scores * qk_scale - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    v0 = load_rows(v_base, keys, stride_v, present, 0, D0, D, MASKED)
    weights = weights.to(v0.dtype)
    acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    if D1 > 0:
        v1 = load_rows(v_base, keys, stride_v, present, D0, D1, D, MASKED)
        acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, new_max, row_sum


class Limits(NamedTuple):
    """A device's shared memory a block and L2 in bytes, whether it has Hopper's wgmma, and its number of SMs."""

    shared_memory: int
    l2: int
    wgmma: bool
    processors: int = 108


def split_head_dim(d: int) -> tuple[int, int]:
    """(D0, D1), powers of two of at least 16 with D0 + D1 >= d. D1 is 0 if one part wastes no more than two."""
    whole = max(16, 1 << (d - 1).bit_length())
    low = whole // 2
    if low < 16 or d <= low:
        return whole, 0
    rest = max(16, 1 << (d - low - 1).bit_length())
    return (low, rest) if low + rest < whole else (whole, 0)


def stride_unit(*tensors: torch.Tensor) -> int:
    """8 if all strides of these tensors [B, H, N, D] but the last are multiples of 8 elements, else 1."""
    return 8 if all(s % 8 == 0 for x in tensors for s in x.stride()[:3]) else 1


def token_strides(unit: int, *tensors: torch.Tensor) -> list[int]:
    """Batch, head and token strides, in units of `unit` elements."""
    return [s // unit for x in tensors for s in x.stride()[:3]]


def precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@functools.lru_cache
def device_limits(device: torch.device) -> Limits:
    if device.type != "cuda":
        return Limits(160 * 1024, 40 * 1024 * 1024, False)
    properties = torch.cuda.get_device_properties(device)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 0) or 48 * 1024
    l2 = getattr(properties, "L2_cache_size", 0) or 4 * 1024 * 1024
    return Limits(shared_memory, l2, properties.major == 9, properties.multi_processor_count)


def on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

"""The bitmap operators in the lane model."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lane_model import DTYPES, check, library, pointer


class BitmapWeight(ctypes.Structure):  # csrc/arguments.h
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "bitmask", "row_offsets", "scales")),
        ("scale_dtype", ctypes.c_int),
        ("value_bits", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("group_size", "n", "k", "stored")),
    ]


class BitmapDecompressArgs(ctypes.Structure):
    _fields_ = [("weight", BitmapWeight), ("out", ctypes.c_void_p), ("out_row", ctypes.c_int64)]


class BitmapGemmArgs(ctypes.Structure):
    _fields_ = [
        ("weight", BitmapWeight),
        ("dtype", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m", ctypes.c_int64),
    ]


def opened() -> ctypes.CDLL:
    kernels = library("bitmap", "bitmap_*.cu")
    kernels.bitmap_decompress.restype = kernels.bitmap_gemm.restype = ctypes.c_char_p
    return kernels


@contextmanager
def operators(variant: str) -> Iterator[dict[str, Callable]]:
    kernels = opened()
    kernels.descending("descending" in variant)
    try:
        yield {"bitmap_decompress.out": bitmap_decompress_out, "bitmap_gemm": bitmap_gemm}
    finally:
        kernels.descending(False)


def bitmap_decompress_out(values, bitmask, row_offsets, cols, *, scales=None, group_size=-1, out) -> None:
    weight = _weight(values, bitmask, row_offsets, cols, scales, group_size)
    check(opened().bitmap_decompress(ctypes.byref(BitmapDecompressArgs(weight, out.data_ptr(), out.stride(0)))))


def bitmap_gemm(x, values, bitmask, row_offsets, bias=None, *, cols, scales=None, group_size=-1) -> torch.Tensor:
    """Into an output that was NaN, between NaNs that must stay."""
    rows, n = x.reshape(x.shape[:-1].numel(), x.shape[-1]), len(bitmask)
    out = torch.full((len(rows) * n + 64,), math.nan, dtype=x.dtype)
    weight = _weight(values, bitmask, row_offsets, cols, scales, group_size)
    data = rows.data_ptr(), rows.stride(0), pointer(bias), out[32:].data_ptr()
    check(opened().bitmap_gemm(ctypes.byref(BitmapGemmArgs(weight, DTYPES.index(x.dtype), *data, len(rows)))))
    assert out[:32].isnan().all() and out[-32:].isnan().all(), "a write outside the output"
    return out[32:-32].view(*x.shape[:-1], n)


def _weight(values, bitmask, row_offsets, cols, scales, group_size) -> BitmapWeight:
    assert values.is_contiguous() and bitmask.is_contiguous() and row_offsets.is_contiguous()
    bits = 4 if values.dtype == torch.uint8 else 8 * values.element_size()
    data = values.data_ptr(), bitmask.data_ptr(), row_offsets.data_ptr()
    dtype = 0 if scales is None else DTYPES.index(scales.dtype)
    group = max(cols, 1) if scales is None or group_size == -1 else min(group_size, cols)
    stored = len(values) * (2 if bits == 4 else 1)
    return BitmapWeight(*data, pointer(scales), dtype, bits, group, len(bitmask), cols, stored)

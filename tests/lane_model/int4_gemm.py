"""int4_gemm in the lane model, on Ampere or, with "wgmma", on Hopper."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from headstart.ops.int4_gemm import Int4Weight
from lane_model import DTYPES, check, library, pointer


class Int4GemmArgs(ctypes.Structure):  # csrc/arguments.h
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("scale_dtype", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("packed", "scales", "zeros", "minimums", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "group_size")),
        ("bits", ctypes.c_int),
    ]


def opened() -> ctypes.CDLL:
    kernels = library("int4_gemm", "int4_ge*.cu")
    kernels.int4_gemm.restype = kernels.int4_dequantize.restype = ctypes.c_char_p
    return kernels


@contextmanager
def operators(variant: str) -> Iterator[dict[str, Callable]]:
    kernels = opened()
    kernels.descending("descending" in variant)
    kernels.warp_groups("wgmma" in variant)
    try:
        yield {"int4_gemm": int4_gemm}
    finally:
        kernels.descending(False)
        kernels.warp_groups(False)


def int4_gemm(x, packed, scales, zeros=None, bias=None, *, group_size, n, minimums=None, bits=4):
    """As the CUDA library does: a weight in 8 bits or with minimums is opened first, and torch multiplies."""
    rows = x.reshape(-1, x.shape[-1])
    if bits == 8 or minimums is not None:
        w = Int4Weight(packed, scales, zeros, group_size, (n, x.shape[-1]), minimums=minimums, bits=bits)
        return torch.nn.functional.linear(x, dequantize(w, x.dtype), bias)
    weight = packed, scales, zeros, None, bias
    return _run("int4_gemm", rows, *weight, x.dtype, len(rows), n, group_size, bits).view(*x.shape[:-1], n)


def dequantize(w: Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """What a kernel writes for `torch.mm`: the weight [N, K]."""
    n, k = w.shape
    weight = w.packed, w.scales, w.zeros, w.minimums, None
    return _run("int4_dequantize", torch.empty(0, k), *weight, dtype, n, n, w.group_size, w.bits, columns=k)


def _run(name, x, packed, scales, zeros, minimums, bias, dtype, rows, n, group_size, bits, columns=None):
    """Into an output that was NaN, between NaNs that must stay."""
    columns = n if columns is None else columns
    out = torch.full((rows * columns + 64,), math.nan, dtype=dtype)
    data = (x.data_ptr(), x.stride(0), packed.data_ptr(), scales.data_ptr(), *map(pointer, (zeros, minimums, bias)))
    dtypes = DTYPES.index(dtype), DTYPES.index(scales.dtype)
    args = Int4GemmArgs(*dtypes, *data, out[32:].data_ptr(), len(x), n, x.shape[1], group_size, bits)
    check(getattr(opened(), name)(ctypes.byref(args)))
    assert out[:32].isnan().all() and out[-32:].isnan().all(), "a write outside the output"
    return out[32:-32].view(rows, columns)

"""The CUDA kernels of the bitmap operators without a GPU: run lane by lane on the CPU (see `test_lane_model.py`)."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess

import pytest
import torch

import bitmap_judge as judge
from test_lane_model import COMPILE_FLAGS, DTYPES, ROOT

pytestmark = pytest.mark.slow  # it compiles the kernels for the CPU, and runs them lane by lane


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


def weight_of(values, bitmask, row_offsets, cols, scales, group_size) -> BitmapWeight:
    assert values.is_contiguous() and bitmask.is_contiguous() and row_offsets.is_contiguous()
    bits = 4 if values.dtype == torch.uint8 else 8 * values.element_size()
    data = values.data_ptr(), bitmask.data_ptr(), row_offsets.data_ptr()
    at, dtype = (None, 0) if scales is None else (scales.data_ptr(), DTYPES.index(scales.dtype))
    group = max(cols, 1) if scales is None or group_size == -1 else min(group_size, cols)
    return BitmapWeight(*data, at, dtype, bits, group, len(bitmask), cols, len(values) * (2 if bits == 4 else 1))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("lane_model") / "bitmap.so"
    sources = [*sorted((ROOT / "csrc/cuda").glob("bitmap_*.cu")), ROOT / "tests/lane_model/bitmap.cpp"]
    includes = ["-I", ROOT / "tests/lane_model"]
    subprocess.run([compiler, *COMPILE_FLAGS, *includes, "-x", "c++", *sources, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.bitmap_decompress.restype = library.bitmap_gemm.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=["ascending", "descending"])
def kernels(request, library, monkeypatch):
    """The judge's operators are the launchers, run in the lane model, warps and lanes in either order."""

    def decompress(values, bitmask, row_offsets, cols, *, scales, group_size, out):
        weight = weight_of(values, bitmask, row_offsets, cols, scales, group_size)
        error = library.bitmap_decompress(ctypes.byref(BitmapDecompressArgs(weight, out.data_ptr(), out.stride(0))))
        assert error is None, error.decode()

    def gemm(x, values, bitmask, row_offsets, bias=None, *, cols, scales, group_size):
        rows, n = x.reshape(x.shape[:-1].numel(), x.shape[-1]), len(bitmask)
        out = torch.full((len(rows) * n + 64,), math.nan, dtype=x.dtype)
        weight = weight_of(values, bitmask, row_offsets, cols, scales, group_size)
        at = None if bias is None else bias.data_ptr()
        dtype = DTYPES.index(x.dtype)
        args = weight, dtype, rows.data_ptr(), rows.stride(0), at, out[32:].data_ptr(), len(rows)
        error = library.bitmap_gemm(ctypes.byref(BitmapGemmArgs(*args)))
        assert error is None, error.decode()
        assert out[:32].isnan().all() and out[-32:].isnan().all()
        return out[32:-32].view(*x.shape[:-1], n)

    monkeypatch.setattr(judge, "DECOMPRESS", decompress)
    monkeypatch.setattr(judge, "GEMM", gemm)
    library.descending(request.param == "descending")
    yield
    library.descending(False)


# Columns: whole chunks, rows of the mask that 16, 8, 4 and 1 bytes divide, one column; rows: one tile to more than 16,
# which are not cut into segments (the model has one processor).
SHAPES = ((1, 1), (3, 7), (2, 256), (17, 1024), (5, 577), (33, 96), (16, 320), (4, 2304), (290, 64), (270, 530))


@judge.by_value_dtype
@pytest.mark.parametrize("n, k", SHAPES)
def test_decompress_moves_bits(kernels, n, k, dtype):
    judge.check_bits(n, k, (0.1, 0.5, 0.9)[n % 3], dtype, offset=n % 4, stride=k + 5 if n % 2 else None)
    if (n, k) == (16, 320):
        judge.check_bits(n, k, 0.5, dtype, stride=384)


@judge.by_dtype
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("n, k", SHAPES[1:])
def test_decompress_scales(kernels, n, k, values, dtype):
    for group_size in (32, -1, (13, 8, 200)[n % 3]):
        judge.check_scaled(n, k, 0.5, dtype, values, group_size, offset=n % 4)


def test_decompress_past_two_to_the_31(kernels):
    judge.check_far()


@judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_decompress_rows_anywhere_and_damage(kernels, values, dtype):
    judge.check_slice(dtype, values)
    judge.check_damaged(dtype, values)


# One row, a tile of 8 rows, tiles of 32 (float32: 16), more of them than one.
CASES = (
    (1, 40, 288), (1, 17, 33), (1, 270, 520), (1, 16, 2304), (2, 64, 416), (8, 17, 33), (9, 33, 1000), (13, 130, 257),
    (33, 100, 700), (40, 300, 290), (2, 96, 1), (20, 19, 330),
)  # fmt: skip


@judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
@pytest.mark.parametrize("m, n, k", CASES)
def test_gemm_against_float64(kernels, m, n, k, values, dtype):
    scales = judge.DTYPES[(m + n) % 3]
    scales = dtype if values == "same" or dtype == torch.float16 else scales
    judge.check_case(m, n, k, dtype, values, (32, -1, 40)[n % 3], (0.2, 0.5, 0.8)[m % 3], scales, bias=k % 2 == 0)


@judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_gemm_reads_every_weight(kernels, values, dtype):
    judge.check_every_weight(dtype, 20, 300, (1, 75), values)


@judge.by_dtype
def test_gemm_on_odd_input(kernels, dtype):
    for m in (1, 3, 20):
        judge.check_what_is_not_finite(dtype, m)
    judge.check_strides(dtype)

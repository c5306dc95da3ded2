"""The CUDA kernels of int4_gemm without a GPU: run lane by lane on the CPU (see `test_lane_model.py`)."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess

import pytest
import torch

import int4_judge as judge
from test_lane_model import COMPILE_FLAGS, DTYPES, ROOT

pytestmark = pytest.mark.slow  # it compiles the kernels for the CPU, and runs them lane by lane


class Int4GemmArgs(ctypes.Structure):  # csrc/arguments.h
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("scale_dtype", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("packed", "scales", "zeros", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "group_size")),
    ]


def pointer(x: torch.Tensor | None):
    return None if x is None else x.data_ptr()


def arguments(x, packed, scales, zeros, bias, out, group_size, n) -> Int4GemmArgs:
    data = (x.data_ptr(), x.stride(0), packed.data_ptr(), scales.data_ptr(), pointer(zeros), pointer(bias))
    dtypes = DTYPES.index(out.dtype), DTYPES.index(scales.dtype)
    return Int4GemmArgs(*dtypes, *data, out.data_ptr(), x.shape[0], n, x.shape[1], group_size)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("lane_model") / "int4_gemm.so"
    sources = [*sorted((ROOT / "csrc/cuda").glob("int4_gemm*.cu")), ROOT / "tests/lane_model/int4_gemm.cpp"]
    includes = ["-I", ROOT / "tests/lane_model"]
    subprocess.run([compiler, *COMPILE_FLAGS, *includes, "-x", "c++", *sources, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.int4_gemm.restype = library.int4_dequantize.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=["ascending", "descending", "wgmma, ascending", "wgmma, descending"])
def kernel(request, library, monkeypatch):
    """`int4_judge.OP` is the launcher, run in the lane model on Ampere or Hopper, warps and lanes in either order."""

    def run(x, packed, scales, zeros=None, bias=None, *, group_size, n):
        rows = x.reshape(-1, x.shape[-1])
        out = torch.full((len(rows) * n + 64,), math.nan, dtype=x.dtype)
        args = arguments(rows, packed, scales, zeros, bias, out[32:], group_size, n)
        error = library.int4_gemm(ctypes.byref(args))
        assert error is None, error.decode()
        assert out[:32].isnan().all() and out[-32:].isnan().all()
        return out[32:-32].view(*x.shape[:-1], n)

    monkeypatch.setattr(judge, "OP", run)
    library.descending("descending" in request.param)
    library.warp_groups("wgmma" in request.param)
    yield
    library.descending(False)
    library.warp_groups(False)


# One row tile of many rows and one tile of columns are split into parts; more are not (the model has one processor).
CASES = (
    (1, 40, 288, 32), (3, 64, 416, 96), (8, 17, 33, -1), (9, 33, 1000, 128), (16, 30, 130, 64), (17, 60, 130, 32),
    (33, 100, 700, 128), (40, 200, 290, 64), (70, 300, 160, 32), (2, 96, 1, 32), (20, 150, 330, -1),
)  # fmt: skip


@judge.by_dtype
@pytest.mark.parametrize("m, n, k, group_size", CASES)
def test_against_float64(kernel, m, n, k, group_size, dtype):
    scales = judge.DTYPES[(m + n) % 3]
    judge.check_case(m, n, k, group_size, dtype, symmetric=n % 4 == 0, scale_dtype=scales, bias=k % 2 == 0)


@judge.by_dtype
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_weight(kernel, dtype, symmetric):
    judge.check_every_weight(dtype, 83, 135, 64, (135, 30, 15, 8), symmetric)
    judge.check_every_weight(dtype, 20, 135, 96, (27,), symmetric)


@judge.by_dtype
@pytest.mark.parametrize("n, k, group_size", [(200, 288, 32), (64, 600, 128), (19, 330, -1)])
def test_a_row_does_not_depend_on_the_batch(kernel, dtype, n, k, group_size):
    judge.check_batches(dtype, n, k, group_size, (5, 13, 20, 64), rows=66)


@judge.by_dtype
@pytest.mark.parametrize("check", ["zero_points", "strides", "what_is_not_finite_stays_in_its_row"])
def test_odd_input(kernel, dtype, check):
    getattr(judge, f"check_{check}")(dtype)


@judge.by_dtype
def test_zero_points_of_many_rows(kernel, dtype):
    judge.check_zero_points(dtype, m=20)


@judge.by_dtype
@pytest.mark.parametrize("n, k, group_size", [(40, 288, 32), (17, 33, -1), (5, 130, 64), (20, 1088, 96)])
def test_dequantize(library, dtype, n, k, group_size):
    for symmetric, scale_dtype in ((False, torch.float16), (True, torch.bfloat16), (False, torch.float32)):
        *parts, w = judge.random_weight(n, k, group_size, symmetric, dtype=scale_dtype)
        out = torch.full((n * k + 64,), math.nan, dtype=dtype)
        x = torch.empty(0, k)
        odd = torch.empty(w.packed.numel() + 1, dtype=torch.int32)[1:].copy_(w.packed.flatten())
        packed = odd if symmetric else w.packed
        args = arguments(x, packed, w.scales, w.zeros, None, out[32:], group_size, n)
        assert library.int4_dequantize(ctypes.byref(args)) is None
        assert out[:32].isnan().all() and out[-32:].isnan().all()
        assert torch.equal(out[32:-32].view(n, k), w.dequantize(dtype))

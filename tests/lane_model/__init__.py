"""The CUDA kernels without a GPU: their sources compiled by g++ and run lane by lane on the CPU.

`lane_model.h` says what the model knows of a GPU. The kernels' data movement, index maths, selection and compaction are
what a GPU runs. `lane_model.<stem>.operators(variant)` gives the operators of a stem; a variant is a comma-separated
list: "ascending" or "descending", the order in which warps and lanes run, and what else a stem knows.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # csrc/arguments.h, Dtype
# _FORTIFY_SOURCE takes a jump between coroutines for a damaged stack; device code may pun types in shared memory.
FLAGS = "-std=c++17 -O1 -shared -fPIC -U_FORTIFY_SOURCE -fno-strict-aliasing -DHEADSTART_LANE_MODEL".split()


@functools.cache
def library(stem: str, kernels: str) -> ctypes.CDLL:
    """`lane_model/<stem>.cpp` with the kernels `csrc/cuda/<kernels>` (a pattern), compiled once in a process."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{stem}.so")
        sources = [*sorted((ROOT / "csrc/cuda").glob(kernels)), ROOT / f"tests/lane_model/{stem}.cpp"]
        includes = ["-I", ROOT / "tests/lane_model"]
        subprocess.run([compiler, *FLAGS, *includes, "-x", "c++", *sources, "-o", path], check=True)
        return ctypes.CDLL(str(path))


def check(error: bytes | None) -> None:
    assert error is None, error.decode()


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Tensor4(ctypes.Structure):  # csrc/arguments.h
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]

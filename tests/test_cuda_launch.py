"""Whose an error is when a CUDA kernel starts: `csrc/cuda/launch.h` on a runtime that keeps errors as CUDA does."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "cuda_runtime"
EARLIER = "nothing was started, because an earlier CUDA call or kernel had failed: "


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("cuda_runtime") / "launch.so"
    flags = ["-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-isystem", HERE]
    subprocess.run([compiler, *flags, HERE / "launch.cpp", "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.launch.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    library.zero.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.launch.restype = library.zero.restype = ctypes.c_char_p
    return library


@pytest.fixture
def library(compiled):
    compiled.reset()
    yield compiled
    compiled.reset()


def test_an_error_that_was_there_before_is_an_earlier_one(library):
    started = library.started()
    library.fail_a_call()
    error = library.launch(1, 32, 0).decode()
    assert error == EARLIER + "invalid argument (cudaErrorInvalidValue)"
    assert library.started() == started
    assert library.launch(1, 32, 0) is None, "the error was reported once, and forgotten"
    assert library.started() == started + 1


@pytest.mark.parametrize("noticed", [False, True])
def test_the_fault_of_a_kernel_that_ran_before_is_an_earlier_one(library, noticed):
    library.fail_a_kernel(noticed)
    for error in (
        library.launch(1, 32, 0),
        library.launch(1, 32, 100 << 10),
        library.zero(ctypes.create_string_buffer(8), 8),
    ):
        assert error.decode() == EARLIER + "an illegal memory access was encountered (cudaErrorIllegalAddress)"


INVALID_CONFIGURATION = "invalid configuration argument (cudaErrorInvalidConfiguration)"


@pytest.mark.parametrize("blocks, threads, shared_bytes, shown_blocks, reason", [
    (3, 2048, 10, 3, INVALID_CONFIGURATION),
    (1, 32, 1 << 20, 1, "invalid argument (cudaErrorInvalidValue)"),
    (2**32 + 1, 32, 0, 2**32 - 1, INVALID_CONFIGURATION),
])  # fmt: skip
def test_a_launch_that_fails_says_what_was_asked_for(library, blocks, threads, shared_bytes, shown_blocks, reason):
    started = library.started()
    error = library.launch(blocks, threads, shared_bytes).decode()
    wanted = f"{shown_blocks} x 1 blocks of {threads} x 1 threads and {shared_bytes} bytes of shared memory"
    assert error == f"no kernel was started with {wanted}: {reason}"
    assert library.started() == started and library.pending() == 0
    assert library.launch(1, 32, 0) is None


def test_memory_that_cannot_be_set_to_zero(library):
    error = library.zero(None, 12).decode()
    assert error == "12 bytes were not set to zero: invalid argument (cudaErrorInvalidValue)"
    assert library.pending() == 0
    memory = ctypes.create_string_buffer(b"abcd")
    assert library.zero(memory, 2) is None and memory.raw[:4] == b"\0\0cd"

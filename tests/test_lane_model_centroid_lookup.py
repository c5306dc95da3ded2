"""The CUDA kernels of centroid lookup without a GPU: run lane by lane on the CPU (see `test_lane_model.py`)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
import torch

import centroid_judge as judge
from test_lane_model import COMPILE_FLAGS, DTYPES, ROOT, Tensor4

pytestmark = pytest.mark.slow  # it compiles the kernels for the CPU, and runs them lane by lane


class CentroidLevel(ctypes.Structure):  # csrc/arguments.h
    _fields_ = [
        ("centroids", Tensor4),
        ("run_offsets", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("thresholds", ctypes.c_int64),
    ]

    def fill(self, centroids, offsets, threshold):
        """Returns what must outlive the call."""
        kept = [centroids, offsets.contiguous(), threshold.contiguous()]
        self.centroids = Tensor4(centroids.data_ptr(), 0, *centroids.stride()[:2])
        self.run_offsets, self.threshold = (x.data_ptr() for x in kept[1:])
        self.count, self.thresholds = centroids.shape[1], threshold.numel()
        return kept


class CentroidLookupArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("q", Tensor4),
        ("clusters", CentroidLevel),
        ("parents", CentroidLevel),
        *((name, ctypes.c_int64) for name in ("batch", "heads_q", "heads_kv", "nq", "head_dim", "block_q")),
        ("scale", ctypes.c_float),
        ("column_count", ctypes.c_void_p),
        ("column_index", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("lane_model") / "centroid_lookup.so"
    sources = [ROOT / "csrc/cuda/centroid_lookup.cu", ROOT / "tests/lane_model/centroid_lookup.cpp"]
    includes = ["-I", ROOT / "tests/lane_model"]
    subprocess.run([compiler, *COMPILE_FLAGS, *includes, "-x", "c++", *sources, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.centroid_lookup.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=("ascending", "descending"))
def kernel(library, monkeypatch, request):
    """`centroid_judge.OP` is the lane model, with warps and lanes in either order."""

    def run(
        q, centroids, offsets, threshold, *, scale, block_q, max_columns, parent_centroids=None, parent_offsets=None,
        parent_threshold=None
    ):  # fmt: skip
        args = CentroidLookupArgs()
        args.dtype = DTYPES.index(q.dtype)
        args.q = Tensor4(q.data_ptr(), *q.stride()[:3])
        kept = args.clusters.fill(centroids, offsets, threshold)
        if parent_centroids is not None:
            kept += args.parents.fill(parent_centroids, parent_offsets, parent_threshold)
        args.batch, args.heads_q, args.nq, args.head_dim = q.shape
        args.heads_kv = centroids.shape[0]
        args.block_q = min(block_q, args.nq)
        args.scale, args.capacity = scale, max_columns
        rows = -(-args.nq // args.block_q)
        count = torch.full((args.batch, args.heads_kv, rows), -7, dtype=torch.int32)
        guarded = torch.full((count.numel() * max_columns + 64,), -7, dtype=torch.int32)
        args.column_count, args.column_index = count.data_ptr(), guarded[32:].data_ptr()
        error = library.centroid_lookup(ctypes.byref(args))
        assert error is None, error.decode()
        assert (guarded[:32] == -7).all() and (guarded[-32:] == -7).all()
        return count, guarded[32:-32].view(*count.shape, max_columns)

    monkeypatch.setattr(judge, "OP", judge.cleaned(run))
    library.descending(request.param == "descending")
    yield
    library.descending(False)


@judge.by_case
def test_clusters_are_those_of_the_oracle(kernel, case):
    judge.check_case(case)


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("name", ("decode, grouped heads", "a few queries, small blocks", "parents, blocks"))
def test_max_columns(kernel, name, tied):
    judge.check_room(judge.CASES[name], tied)


def test_more_clusters_than_a_scan_takes_at_once(kernel):
    judge.check_room(judge.Case(1, 2, 1, 1500, 8, judge.BFLOAT16), True)


def test_limits(kernel):
    judge.check_limits()


def test_strides_do_not_matter(kernel):
    judge.check_strides()


def test_broken_offsets(kernel):
    judge.check_broken_offsets()

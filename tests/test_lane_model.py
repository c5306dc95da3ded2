"""The CUDA index builders without a GPU: their sources compiled by g++ and run lane by lane on the CPU.

`lane_model/lane_model.h` says what the model knows of a GPU. The kernels' data movement, index maths, selection and
compaction are what a GPU runs; so they must pass the tests of the builders (`test_prefill_index.py`), to the same bars.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import headstart
import shapes
import test_prefill_index as judge
from headstart import BlockIndex
from headstart.reference import prefill_index as reference
from shapes import Shape

pytestmark = pytest.mark.slow  # it compiles the kernels for the CPU, and runs them lane by lane

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# _FORTIFY_SOURCE takes a jump between coroutines for a damaged stack; device code may pun types in shared memory.
COMPILE_FLAGS = "-std=c++17 -O1 -shared -fPIC -U_FORTIFY_SOURCE -fno-strict-aliasing -DHEADSTART_LANE_MODEL".split()


class Tensor4(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]


class PrefillIndexArgs(ctypes.Structure):  # csrc/arguments.h
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("q", Tensor4),
        ("k", Tensor4),
        ("kv_start", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "heads_q", "heads_kv", "nq", "nk", "head_dim")),
        ("block_q", ctypes.c_int),
        ("block_k", ctypes.c_int),
        ("sink", ctypes.c_int64),
        ("local", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("block_count", ctypes.c_void_p),
        ("block_index", ctypes.c_void_p),
        ("block_capacity", ctypes.c_int64),
    ]


class VerticalSlashArgs(PrefillIndexArgs):
    _fields_ = [
        ("last_q", ctypes.c_int64),
        ("column_count", ctypes.c_void_p),
        ("column_index", ctypes.c_void_p),
        ("column_capacity", ctypes.c_int64),
    ]


class AdaptiveArgs(PrefillIndexArgs):
    _fields_ = [
        ("threshold", ctypes.c_float),
        ("head_threshold", ctypes.c_void_p),
        ("stride", ctypes.c_int),
        ("samples", ctypes.c_int64),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("lane_model") / "lane_model.so"
    sources = [*sorted((ROOT / "csrc/cuda").glob("prefill_index_*.cu")), ROOT / "tests/lane_model/prefill_index.cpp"]
    includes = ["-I", ROOT / "tests/lane_model"]
    subprocess.run([compiler, *COMPILE_FLAGS, *includes, "-x", "c++", *sources, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    for name in ("vertical_slash_index", "block_topk_index", "adaptive_block_index"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


class Builders:
    """The public builders' signatures, run in the lane model."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def _start(self, args, q, k, capacity, sink, local, kv_start, scale, block_q, block_k):
        args.dtype = DTYPES.index(q.dtype)
        args.q, args.k = (Tensor4(x.data_ptr(), *x.stride()[:3]) for x in (q, k))
        args.kv_start = None if kv_start is None else kv_start.data_ptr()
        args.batch, args.heads_q, args.nq, args.head_dim = q.shape
        args.heads_kv, args.nk = k.shape[1:3]
        args.block_q, args.block_k, args.sink, args.local = block_q, block_k, sink, local
        args.scale = q.shape[-1] ** -0.5 if scale is None else scale
        args.block_capacity = min(capacity, -(-args.nk // block_k))
        shape = (args.batch, args.heads_q, -(-args.nq // block_q))
        out = [self._new(*shape), self._new(*shape, args.block_capacity)]
        args.block_count, args.block_index = (x.data_ptr() for x in out)
        return out

    @staticmethod
    def _new(*shape: int) -> torch.Tensor:
        return torch.full(shape, -7, dtype=torch.int32)

    def _run(self, name, args, out, block_q, block_k) -> BlockIndex:
        error = getattr(self.library, name)(ctypes.byref(args))
        assert error is None, error.decode()
        return BlockIndex(*out, block_q=block_q, block_k=block_k)

    def vertical_slash_index(
        self, q, k, vertical_size, slash_size, *, last_q=64, sink=30, local=100, kv_start=None, scale=None, block_q=64,
        block_k=64, max_blocks=None, max_columns=None
    ):  # fmt: skip
        args = VerticalSlashArgs()
        capacity = min(-(-slash_size // block_k), max_blocks or 2**40)
        out = self._start(args, q, k, capacity, sink, local, kv_start, scale, block_q, block_k)
        args.last_q = last_q
        args.column_capacity = min(vertical_size, max_columns or 2**40, k.shape[2])
        columns = [self._new(*q.shape[:2], 1), self._new(*q.shape[:2], 1, args.column_capacity)]
        args.column_count, args.column_index = (x.data_ptr() for x in columns)
        return self._run("vertical_slash_index", args, out + columns, block_q, block_k)

    def block_topk_index(self, q, k, top_k, *, sink=1, local=1, kv_start=None, block_q=64, block_k=64):
        args = PrefillIndexArgs()
        out = self._start(args, q, k, top_k, sink, local, kv_start, None, block_q, block_k)
        return self._run("block_topk_index", args, out, block_q, block_k)

    def adaptive_block_index(
        self, q, k, threshold=0.95, stride=8, *, sink=1, local=1, kv_start=None, scale=None, block_q=64, block_k=64,
        max_blocks=None, head_threshold=None, samples=0
    ):  # fmt: skip
        args = AdaptiveArgs()
        out = self._start(args, q, k, max_blocks or 2**40, sink, local, kv_start, scale, block_q, block_k)
        args.threshold, args.stride, args.samples = threshold, stride, samples
        thresholds = None if head_threshold is None else head_threshold.contiguous()
        args.head_threshold = None if thresholds is None else thresholds.data_ptr()
        return self._run("adaptive_block_index", args, out, block_q, block_k)


@pytest.fixture
def builders(library, monkeypatch) -> Builders:
    """The judge's calls of the public builders go to the lane model."""
    builders = Builders(library)
    for name in ("vertical_slash_index", "block_topk_index", "adaptive_block_index"):
        monkeypatch.setattr(headstart, name, getattr(builders, name))
    yield builders
    library.descending(False)


def test_fragments_are_those_of_the_ptx_isa(library):
    a = torch.empty(32, 4, 2, 2, dtype=torch.int32)
    b = torch.empty(32, 2, 2, 2, dtype=torch.int32)
    c = torch.empty(32, 4, 2, dtype=torch.int32)
    library.fragment_layout(*(ctypes.c_void_p(x.data_ptr()) for x in (a, b, c)))
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):  # the ISA's a0 ... a7
            row = group if i in (0, 1, 4, 5) else group + 8
            column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
            assert a[lane, i // 2, i % 2].tolist() == [row, column]
        for i in range(4):
            assert b[lane, i // 2, i % 2].tolist() == [thread * 2 + (i & 1) + (0 if i < 2 else 8), group]
            assert c[lane, i].tolist() == [group if i < 2 else group + 8, thread * 2 + (i & 1)]


@judge.by_shape(shapes.BUILDERS)
@pytest.mark.parametrize("dtype, descending", ((torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 0)), ids=str)
def test_builders(builders, shape, dtype, descending):
    builders.library.descending(bool(descending))
    q, k, _ = shape.qkv(dtype)
    judge.check_vertical_slash(shape, q, k)
    judge.check_topk(shape, q, k)
    judge.check_adaptive(shape, 4 * q, k)


@pytest.mark.parametrize(
    "options",
    (
        dict(vertical=1, slash=1, sink=0, local=0),
        dict(vertical=10**5, slash=10**5),
        dict(last_q=150, sink=0, local=1),
        dict(last_q=10**4, local=0, scale=-0.2),
        dict(vertical=100, slash=400, max_blocks=2, max_columns=11, sink=4, local=1),
        dict(sink=10**6, local=10**6),
    ),
    ids=str,
)
def test_vertical_slash_options(builders, options):
    for shape in (shapes.BUILDERS[1], shapes.BUILDERS[-2]):
        judge.check_vertical_slash(shape, *shape.qkv(torch.float16)[:2], **options)


@pytest.mark.parametrize(
    "options",
    (
        dict(threshold=1e-6, sink=0, local=0),
        dict(threshold=1.0),
        dict(stride=4, threshold=0.5, sink=0, local=0),
        dict(stride=16, threshold=0.95, max_blocks=2),
        dict(stride=32, threshold=0.6, sink=100, local=70),
        dict(max_blocks=1, sink=70, local=70),
        dict(scale=-0.1, threshold=0.7),
        dict(samples=1, stride=32, threshold=0.9),
        dict(samples=4, stride=16, threshold=0.7, sink=0, local=0),
        dict(samples=5, stride=4, threshold=0.5, max_blocks=3),
        dict(samples=64, stride=8, threshold=0.8, scale=-0.3),
        dict(samples=4, scale=0.0, threshold=0.7, sink=0, local=0),
    ),
    ids=str,
)
def test_adaptive_options(builders, options):
    for shape in (shapes.BUILDERS[1], shapes.BUILDERS[5], shapes.BUILDERS[-1]):
        q, k, _ = shape.qkv(torch.bfloat16)
        judge.check_adaptive(shape, 4 * q, k, **options)


@pytest.mark.parametrize("stride", (4, 8, 16, 32))
def test_adaptive_over_several_tiles_and_jobs(builders, stride):
    shape = Shape(1, 2, 1, 1100, 1300, 8, kv_start=(90,))
    q, k, _ = shape.qkv(torch.bfloat16)
    judge.check_adaptive(shape, 4 * q, k, stride=stride, max_blocks=12)


@pytest.mark.parametrize("samples, dtype, descending", ((5, torch.float16, 1), (64, torch.float32, 0)), ids=str)
def test_sampled_adaptive_over_several_tiles_and_jobs(builders, samples, dtype, descending):
    builders.library.descending(bool(descending))
    large = Shape(1, 1, 1, 300, 700, 24, block_q=128, block_k=128, kv_start=(170,))
    for shape in (Shape(1, 2, 1, 600, 1300, 8, kv_start=(90,)), large):
        q, k, _ = shape.qkv(dtype)
        judge.check_adaptive(shape, 4 * q, k, stride=4, samples=samples, sink=0, local=0)


@pytest.mark.parametrize("head_dim", (8, 72, 136, 256))
@judge.by_dtype
def test_head_dims(builders, head_dim, dtype):
    shape = Shape(1, 1, 1, 70, 140, head_dim)
    q, k, _ = shape.qkv(dtype)
    judge.check_vertical_slash(shape, q, k)
    judge.check_topk(shape, q, k, top_k=1, sink=0, local=0)
    judge.check_adaptive(shape, 4 * q, k, sink=0, local=0)
    judge.check_adaptive(shape, 4 * q, k, sink=0, local=0, samples=4)


def test_many_keys(builders):
    """Several splits of the keys, several tiles of key blocks, and more columns than a block has threads."""
    shape = Shape(1, 2, 1, 100, 9000, 8, kv_start=(1500,))
    q, k, _ = shape.qkv(torch.float16)
    judge.check_vertical_slash(shape, q, k, vertical=1500, slash=2000)
    judge.check_topk(shape, q, k, top_k=50)


@pytest.mark.parametrize("top_k", (1, 4, 9))
def test_ties_go_to_the_lower_id(builders, top_k):
    """Means and products of small whole numbers are exact, so the lists must be the reference's, ties and all."""
    q, k = (torch.randint(-1, 2, (1, 2, 800, 8)).float() for _ in range(2))
    q, k = (x[:, :, ::64].repeat_interleave(64, 2)[:, :, :800] for x in (q, k))
    given = dict(sink=0, local=0, kv_start=None, block_q=64, block_k=64)
    count, index = reference.block_topk_index(q, k, top_k, **given)
    got = builders.block_topk_index(q, k, top_k, **given)
    assert torch.equal(got.block_count, count) and torch.equal(got.block_index, index)


# The judge's own tests, with the lane model in place of a CPU tier.


@judge.by_builder
def test_strides_do_not_matter(builders, build):
    judge.test_strides_threads_and_memory_do_not_matter(None, build, torch.bfloat16)


@judge.by_builder
@pytest.mark.parametrize("start", (-50, 300, 2**31 - 1, -(2**31)))
def test_kv_start_outside_the_keys(builders, build, start):
    judge.test_kv_start_outside_the_keys(None, build, start)


@judge.by_builder
def test_equal_scores(builders, build):
    judge.test_equal_scores_choose_the_lower_id(None, build)


def test_planted_patterns(builders):
    judge.test_one_column_and_one_diagonal(None)
    judge.test_block_topk_is_minference(None, 3)
    judge.test_adaptive_threshold_per_head(None)


@judge.by_builder
@pytest.mark.parametrize("where", ("q", "k"))
def test_nan_and_inf_give_a_valid_index(builders, build, where):
    shape = Shape(1, 2, 1, 300, 300, 8)
    for value in (judge.NAN, judge.INF):
        for share in (0.005, 1.0):
            inputs = dict(zip("qk", shape.qkv(torch.float32)))
            inputs[where].masked_fill_(torch.rand_like(inputs[where]) < share, value)
            index = build(**inputs)
            judge.selected_blocks(index, shape)
            if index.column_count is not None:
                judge.listed(index.column_count, index.column_index, shape.nk)

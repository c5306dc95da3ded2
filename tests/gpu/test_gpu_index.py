"""The index builders on a GPU, against the same judges as on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

import headstart
import shapes
import test_prefill_index as truth
from headstart.reference import sparse_attention as reference
from on_a_gpu import BUILDERS, DTYPES, as_mask, compare, cuda_kernel, expect_no_wait, tokens

pytestmark = pytest.mark.gpu

OPERATORS = ("vertical_slash_index", "block_topk_index", "adaptive_block_index")


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS.keys())
@pytest.mark.parametrize("n", [200, 1024])
def test_index_builders(builder, n):
    # float32: a near tie between two scores may fall either way, so sets may differ in a few entries, not in many.
    q, k = torch.randn(1, 4, n, 64), torch.randn(1, 2, n, 64)
    want = builder(q, k).to_mask(n, n)
    got = builder(q.cuda(), k.cuda())
    assert got.block_index.is_cuda and got.block_index.dtype == torch.int32
    for count, ids in ((got.block_count, got.block_index), (got.column_count, got.column_index)):
        if count is not None:
            used = torch.arange(ids.shape[-1], device="cuda") < count.unsqueeze(-1)
            rising = (ids[..., 1:] > ids[..., :-1]) | ~used[..., 1:]
            assert rising.all() and (ids[used] >= 0).all()
    assert float((got.to_mask(n, n).cpu() != want).double().mean()) < 0.01


@pytest.fixture
def built_on_the_gpu(monkeypatch):
    """`headstart.*_index` of CPU tensors are built on the GPU and brought back."""
    from headstart.ops import prefill_index as ops

    def moved(run):
        def call(*args, **options):
            args = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
            options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
            return tuple(x.cpu() for x in run(*args, **options))

        return call

    for name in OPERATORS:
        cuda_kernel(name)
        monkeypatch.setattr(ops, f"_{name}", moved(getattr(ops, f"_{name}")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", shapes.BUILDERS + [shapes.Shape(1, 4, 2, 1000, 3000, d) for d in (40, 128, 256)],
                         ids=str)  # fmt: skip
def test_index_builders_choose_the_best(shape, dtype, built_on_the_gpu):
    q, k, _ = shape.qkv(dtype)
    truth.check_vertical_slash(shape, q, k)
    truth.check_topk(shape, q, k)
    truth.check_adaptive(shape, 4 * q, k)
    truth.check_adaptive(shape, 4 * q, k, stride=16, max_blocks=2, head_threshold=torch.rand(shape.heads_q))
    for samples in (1, 4, 33):
        truth.check_adaptive(shape, 4 * q, k, samples=samples)


@pytest.mark.parametrize("entries, capacity", [(50, 9), (2048, 300), (2048, 2048), (131072, 1000)])
def test_selection_among_ties(entries, capacity):
    from headstart.reference.prefill_index import keep_best
    from headstart.triton.block_select import select

    scores = (torch.randint(-9, 9, (2, 3, 1, entries)) * 0.5).masked_fill(torch.rand(2, 3, 1, entries) < 0.1, -math.inf)
    got = select(scores.cuda(), capacity, nq=entries, nk=entries, block_q=entries, block_k=1)
    expected = reference.compact(keep_best(scores, capacity), capacity)
    assert torch.equal(got[0].cpu(), expected[0]) and torch.equal(got[1].cpu(), expected[1])


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS.keys())
def test_index_builders_repeat_themselves(builder):
    q, k = tokens(1, 4, 2000, 128, torch.bfloat16), tokens(1, 2, 2000, 128, torch.bfloat16)
    first = builder(q, k)
    assert all(truth.same(builder(q, k), first) for _ in range(5))


def test_a_shape_index():
    want = headstart.a_shape_index(700, 900, sink=64, local=200, device="cpu")
    got = headstart.a_shape_index(700, 900, sink=64, local=200, device="cuda")
    assert got.block_index.is_cuda and torch.equal(got.to_mask(700, 900).cpu(), want.to_mask(700, 900))


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS.keys())
def test_index_builders_feed_the_kernel(builder):
    q, k, v = tokens(1, 4, 500, 128, torch.bfloat16), *(tokens(1, 2, 500, 128, torch.bfloat16) for _ in range(2))
    compare(q, k, v, builder(q, k))


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS.keys())
def test_no_operator_waits_for_the_gpu(builder):
    q, k, v = tokens(1, 4, 512, 64, torch.float16), *(tokens(1, 2, 512, 64, torch.float16) for _ in range(2))

    def step():
        out, lse = headstart.sparse_attention(q, k, v, builder(q, k))
        headstart.merge_attention(out, lse, out, lse)

    step()
    expect_no_wait(step)


@pytest.fixture
def judge(monkeypatch):
    """The judge of the CPU's builders; what it calls runs on the GPU, on tokens between NaN tokens."""
    import test_prefill_index

    def on_gpu(build):
        def call(q, k, *args, **kwargs):
            moved = [torch.full((*x.shape[:2], x.shape[2] + 2, x.shape[3]), math.nan).to(x) for x in (q, k)]
            for to, x in zip(moved, (q, k)):
                to[:, :, 1:-1] = x
            kwargs = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
            return build(*(x.cuda()[:, :, 1:-1] for x in moved), *args, **kwargs).to("cpu")

        return call

    for name in ("vertical_slash_index", "block_topk_index", "adaptive_block_index"):
        monkeypatch.setattr(headstart, name, on_gpu(getattr(headstart, name)))
    return test_prefill_index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", shapes.BUILDERS, ids=str)
def test_index_builders_by_the_judge(judge, shape, dtype):
    q, k, _ = shape.qkv(dtype)
    judge.check_vertical_slash(shape, q, k)
    judge.check_vertical_slash(shape, q, k, vertical=100, slash=400, last_q=150, max_blocks=2, max_columns=11)
    judge.check_topk(shape, q, k)
    judge.check_adaptive(shape, 4 * q, k)
    judge.check_adaptive(shape, 4 * q, k, stride=32, max_blocks=2)


@pytest.mark.parametrize("d", [8, 72, 128, 256])
@pytest.mark.parametrize("stride", [4, 16])
def test_index_builders_over_many_tiles(judge, stride, d):
    shape = shapes.Shape(1, 4, 2, 1100, 2300, d, kv_start=(90,))
    q, k, _ = shape.qkv(torch.bfloat16)
    judge.check_vertical_slash(shape, q, k, vertical=1100, slash=700)
    judge.check_topk(shape, q, k, top_k=9)
    judge.check_adaptive(shape, 4 * q, k, stride=stride)


@pytest.mark.parametrize("name", ["test_equal_scores_choose_the_lower_id", "test_nan_and_inf_give_a_valid_index"])
@pytest.mark.parametrize("builder", ["vertical_slash", "block_topk", "adaptive"])
def test_index_builders_on_odd_values(judge, builder, name):
    build = judge.BUILDERS[builder]
    for more in (("q",), ("k",)) if "nan" in name else ((),):
        getattr(judge, name)(None, build, *more)


@pytest.mark.parametrize("n", [4096, 32768])
def test_index_builders_at_length(builder, n):
    q, k = torch.randn(1, 4, n, 64, device="cuda"), torch.randn(1, 2, n, 64, device="cuda")
    got, again = builder(q, k), builder(q, k)
    want = builder(q.cpu(), k.cpu())
    for count, ids in (("block_count", "block_index"), ("column_count", "column_index")):
        lists = [(getattr(x, count), getattr(x, ids)) for x in (got, again, want)]
        if lists[0][0] is not None:
            assert all(torch.equal(a, b) for a, b in zip(*lists[:2])), "the same input gives another index"
            # A near tie between two scores may fall either way.
            chosen = [
                as_mask(a.cpu(), b.cpu(), n if ids == "column_index" else n // 64) for a, b in (lists[0], lists[2])
            ]
            assert float((chosen[0] != chosen[1]).sum() / chosen[1].sum()) < 0.005


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS.keys())
def test_index_builders_in_a_cuda_graph(builder):
    q, k = (torch.randn(1, h, 700, 64, dtype=torch.bfloat16, device="cuda") for h in (4, 2))

    def step():
        index = builder(q, k)
        return [x for x in (index.block_count, index.block_index, index.column_index) if x is not None]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        q.normal_()
        k.normal_()
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(captured, step()))

"""Every operator on a GPU: against the reference on the CPU, under torch.compile, and in a CUDA graph.

Only here do the Triton and CUDA kernels run as machine code. `make gpu` runs these tests; elsewhere they are skipped.
"""

from __future__ import annotations

import math

import pytest
import torch

import bitmap_judge
import centroid_judge
import headstart
import int4_judge
import shapes
import test_prefill_index as truth
from headstart import BlockIndex, _library
from headstart.reference import centroid_lookup as centroid_reference
from headstart.reference import sparse_attention as reference
from tolerances import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned():
    """Fills memory that the allocator hands out again with NaN, so that what a kernel leaves unwritten shows."""
    torch.cuda.empty_cache()
    for _ in range(2):
        torch.full((2**26,), math.nan, device="cuda")
    yield


def tokens(b: int, h: int, n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """Random [B, H, N, D] between NaN tokens, so that a read outside them shows."""
    x = torch.full((b, h, n + 192, d), math.nan, dtype=dtype, device="cuda")
    x[:, :, 64 : 64 + n] = torch.randn(b, h, n, d).to(dtype)
    return x[:, :, 64 : 64 + n]


def random_index(b, hi, nq, nk, share=0.3, columns=0, column_rows=None, block_q=64, block_k=64) -> BlockIndex:
    rows = -(-nq // block_q)
    lists = list(reference.compact(torch.rand(b, hi, rows, -(-nk // block_k)) < share))
    if columns:
        lists += reference.compact(torch.rand(b, hi, column_rows or rows, nk) < columns / nk)
    return BlockIndex(*lists, block_q=block_q, block_k=block_k).to("cuda")


def compare(q, k, v, index: BlockIndex, *, causal=True, scale=None, kv_start=None):
    out, lse = headstart.sparse_attention(q, k, v, index, causal=causal, scale=scale, kv_start=kv_start)
    moved = index.to("cpu")
    lists = moved.block_count, moved.block_index, moved.column_count, moved.column_index
    start = None if kv_start is None else kv_start.cpu()
    options = dict(causal=causal, scale=scale, block_q=index.block_q, block_k=index.block_k)
    exact, exact_lse = reference.sparse_attention(*(x.cpu().double() for x in (q, k, v)), *lists, start, **options)
    plain, plain_lse = reference.sparse_attention(*(x.cpu() for x in (q, k, v)), *lists, start, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert_close(out.cpu(), exact, plain, "out")
    assert_close(lse.cpu(), exact_lse.double(), plain_lse, "lse")
    return out, lse


# --- sparse attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 64, 72, 80, 96, 128, 192, 256])
def test_sparse_attention(d, dtype):
    q, k, v = tokens(1, 4, 333, d, dtype), tokens(1, 2, 333, d, dtype), tokens(1, 2, 333, d, dtype)
    compare(q, k, v, random_index(1, 4, 333, 333, columns=70, column_rows=1))


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("columns", [0, 100])
@pytest.mark.parametrize("d", [64, 128])
def test_block_sizes(d, columns, block_k, block_q):
    q, k, v = (tokens(1, 2, 515, d, torch.bfloat16) for _ in range(3))
    compare(q, k, v, random_index(1, 2, 515, 515, columns=columns, block_q=block_q, block_k=block_k))


@pytest.mark.parametrize("nq, nk", [(1, 1), (1, 1000), (7, 300), (64, 64), (65, 700), (300, 300)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(nq, nk, causal):
    q, k, v = (
        tokens(2, 8, nq, 128, torch.float16),
        tokens(2, 2, nk, 128, torch.float16),
        tokens(2, 2, nk, 128, torch.float16),
    )
    compare(q, k, v, random_index(2, 2, nq, nk, share=0.5, columns=min(nk, 60)), causal=causal)


def test_left_padding_and_an_expanded_index():
    q, k, v = (tokens(3, 4, 300, 64, torch.float16) for _ in range(3))
    start = torch.tensor([0, 77, 299], dtype=torch.int32, device="cuda")
    compare(q, k, v, random_index(1, 1, 300, 300, columns=50, column_rows=1), kv_start=start)


@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
def test_any_scale(scale):
    q, k, v = (tokens(1, 2, 200, 64, torch.float16) for _ in range(3))
    compare(q, k, v, random_index(1, 2, 200, 200, columns=30), scale=scale)


def test_strides_and_a_misaligned_offset():
    flat = torch.randn(1 + 2 * 200 * 6 * 65, device="cuda")[1:].view(2, 200, 6, 65)[..., :64]
    q, k, v = flat[:, :, :2].transpose(1, 2), flat[:, :, 2:4].transpose(1, 2), flat[:, :, 4:].transpose(1, 2)
    compare(q, k, v, random_index(2, 2, 200, 200, columns=30))


def test_rows_that_see_nothing():
    q, k, v = (tokens(1, 2, 200, 64, torch.float16) for _ in range(3))
    rows = torch.zeros(1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 4, 3, dtype=torch.int32)
    out, lse = compare(q, k, v, BlockIndex(*rows).to("cuda"))
    assert (out == 0).all() and (lse == -math.inf).all()


def test_ids_outside_the_keys_are_never_read():
    q, k, v = (tokens(1, 2, 130, 64, torch.float16) for _ in range(3))
    top = 2**31 - 1
    count = torch.full((1, 1, 3), 9, dtype=torch.int32, device="cuda")
    ids = torch.tensor([-top, -1, 0, 2, 2**20, top], dtype=torch.int32, device="cuda").expand(1, 1, 3, 6)
    columns = torch.tensor([-top, -1, 3, 100, 130, top], dtype=torch.int32, device="cuda").expand(1, 1, 1, 6)
    got = headstart.sparse_attention(q, k, v, BlockIndex(count, ids, count[..., :1], columns))
    inside = BlockIndex(count * 0 + 2, ids[..., 2:4], count[..., :1] * 0 + 2, columns[..., 2:4])
    want = compare(q, k, v, inside)
    torch.cuda.synchronize()
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_offsets_past_two_to_the_31():
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    # The last of 34 sequences lies past 2^31 elements; it must give what it gives alone.
    k = torch.empty(34, 1, 2**19, 128, dtype=torch.float16, device="cuda")
    k[-1].normal_()
    q = torch.randn(34, 1, 64, 128, dtype=torch.float16, device="cuda")
    count = torch.full((1, 1, 1), 2, dtype=torch.int32, device="cuda")
    ids = torch.tensor([5, 2**13 - 1], dtype=torch.int32, device="cuda").view(1, 1, 1, 2)
    index = BlockIndex(count, ids)
    out, lse = headstart.sparse_attention(q, k, k, index)
    alone, alone_lse = headstart.sparse_attention(q[-1:], k[-1:], k[-1:], index)
    assert torch.equal(out[-1:], alone) and torch.equal(lse[-1:], alone_lse) and alone.isfinite().all()


# --- windows, uneven rows, few queries -------------------------------------------------------------------------------


@pytest.mark.parametrize("nq, nk", [(300, 300), (130, 5000), (1, 3000), (7, 3000)])
@pytest.mark.parametrize("window", [1, 100, 1000])
@pytest.mark.parametrize("block", [64, 128])
def test_window(block, window, nq, nk):
    from headstart.triton import sparse_attention as kernels

    q, k, v = tokens(1, 8, nq, 128, torch.float16), *(tokens(1, 2, nk, 128, torch.float16) for _ in range(2))
    index = random_index(1, 2, nq, nk, share=0.6, columns=min(nk, 200), block_q=block, block_k=block)
    lists = index.block_count, index.block_index, index.column_count, index.column_index
    out, lse = kernels.sparse_attention(q, k, v, *lists, block_q=block, block_k=block, window=window)
    mask = index.to("cpu").to_mask(nq, nk).repeat_interleave(4, 1)
    mask &= torch.arange(nk) > torch.arange(nk - nq, nk)[:, None] - window

    def dense(q, k, v):
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        scores = (q @ k.mT / math.sqrt(128)).masked_fill(~mask, -math.inf)
        return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)

    given = [x.cpu() for x in (q, k, v)]
    exact, exact_lse = dense(*(x.double() for x in given))
    plain, plain_lse = dense(*given)
    assert_close(out.cpu(), exact, plain, "out")
    assert_close(lse.cpu(), exact_lse, plain_lse.float(), "lse")


@pytest.mark.parametrize("heads_index", [1, 2, 8])
@pytest.mark.parametrize("nq", [1, 3, 17, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_queries_over_long_lists(dtype, nq, heads_index):
    q, k, v = tokens(2, 8, nq, 128, dtype), *(tokens(2, 2, 9000, 128, dtype) for _ in range(2))
    compare(q, k, v, random_index(2, heads_index, nq, 9000, columns=900, column_rows=1))


def test_a_chunk_with_one_dense_head():
    # Rows long enough to be sorted: one head lists all, the others little.
    q, k, v = tokens(1, 8, 512, 64, torch.float16), *(tokens(1, 2, 6000, 64, torch.float16) for _ in range(2))
    lists = torch.rand(1, 8, 8, 94) < 0.05
    lists[:, 3] = True
    compare(q, k, v, BlockIndex(*reference.compact(lists)).to("cuda"))


# --- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 3, 77, 80), (2, 32, 1, 128), (1, 2, 500, 256), (1, 2, 9, 7)])
@pytest.mark.parametrize("layout", ["contiguous", "tokens first", "misaligned"])
def test_merge_attention(layout, shape, dtype):
    b, h, n, d = shape

    def values():
        if layout == "tokens first":
            return torch.randn(b, n, h, d, device="cuda").to(dtype).transpose(1, 2)
        if layout == "misaligned":
            return torch.randn(b * h * n * d + 1, device="cuda").to(dtype)[1:].view(shape)
        return torch.randn(shape, device="cuda").to(dtype)

    out_a, out_b = values(), values()
    lse_a, lse_b = torch.randn(b, h, n, device="cuda") * 9, torch.randn(b, n, h, device="cuda").transpose(1, 2) * 9
    lse_a[0, 0, 0] = lse_b[0, 0, 0] = -math.inf
    out_a[0, 0, 0] = out_b[0, 0, 0] = 0
    out, lse = headstart.merge_attention(out_a, lse_a, out_b, lse_b)
    given = [x.cpu() for x in (out_a, lse_a, out_b, lse_b)]
    exact, exact_lse = reference.merge_attention(*(x.double() for x in given))
    plain, plain_lse = reference.merge_attention(*given)
    assert_close(out.cpu(), exact, plain, "out")
    assert_close(lse.cpu(), exact_lse, plain_lse, "lse")
    assert out.is_contiguous() and lse[0, 0, 0] == -math.inf and (out[0, 0, 0] == 0).all()


def test_merge_of_two_halves_is_the_whole():
    q, k, v = (tokens(1, 2, 256, 128, torch.float32) for _ in range(3))
    lists = torch.rand(1, 2, 4, 4) < 0.5
    parts = [headstart.sparse_attention(q, k, v, BlockIndex(*reference.compact(x)).to("cuda")) for x in (lists, ~lists)]
    out, lse = headstart.merge_attention(*parts[0], *parts[1])
    whole, whole_lse = headstart.sparse_attention(q, k, v, BlockIndex(*reference.compact(lists | ~lists)).to("cuda"))
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)


def test_bad_input_is_named():
    q, lse = torch.zeros(1, 2, 3, 64, device="cuda"), torch.zeros(1, 2, 3, device="cuda")
    with pytest.raises((ValueError, RuntimeError), match=r"merge_attention: lse_a: expected float32 \[1, 2, 3\], got"):
        headstart.merge_attention(q, lse.double(), q, lse)


# --- index builders --------------------------------------------------------------------------------------------------

OPERATORS = ("vertical_slash_index", "block_topk_index", "adaptive_block_index")
BUILDERS = {
    "vertical_slash": lambda q, k: headstart.vertical_slash_index(q, k, 60, 256),
    "block_topk": lambda q, k: headstart.block_topk_index(q, k, 4),
    "adaptive": lambda q, k: headstart.adaptive_block_index(q, k, threshold=0.9, stride=8),
    "adaptive, sampled": lambda q, k: headstart.adaptive_block_index(q, k, threshold=0.9, stride=16, samples=4),
}


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
        assert _library.has_kernel(name, "CUDA")
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
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def as_mask(count: torch.Tensor, ids: torch.Tensor, limit: int) -> torch.Tensor:
    used = torch.arange(ids.shape[-1]) < count.unsqueeze(-1)
    mask = torch.zeros(*count.shape, limit + 1, dtype=torch.bool)
    return mask.scatter_(-1, torch.where(used, ids, limit).long(), True)[..., :limit]


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS.keys())
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


# --- centroid lookup -------------------------------------------------------------------------------------------------


def on_the_gpu(x):
    """The same tensor there: its strides, its offset, and what surrounds it."""
    if not isinstance(x, torch.Tensor):
        return x
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return whole.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.fixture(params=["operator", "triton"])
def lookup(request, monkeypatch):
    """The operator of the centroid judge: as it is dispatched, and on Triton."""
    assert _library.has_kernel("centroid_lookup", "CUDA")
    operator = torch.ops.headstart.centroid_lookup.default
    run = operator if request.param == "operator" else _library.triton_kernels["centroid_lookup"]

    def call(*args, **options):
        options = {name: on_the_gpu(x) for name, x in options.items()}
        return [x.cpu() for x in run(*(on_the_gpu(x) for x in args), **options)]

    monkeypatch.setattr(centroid_judge, "OP", centroid_judge.cleaned(call))
    return run


@centroid_judge.by_case
def test_centroid_lookup(lookup, case):
    centroid_judge.check_case(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("nq, parents", [(1, None), (100, 12)])
def test_centroid_lookup_head_dims(lookup, d, dtype, nq, parents):
    centroid_judge.check_case(centroid_judge.Case(1, 2, nq, 150, d, dtype, parents=parents))


@pytest.mark.parametrize("tied", [False, True])
@centroid_judge.by_case
def test_centroid_lookup_with_too_little_room(lookup, case, tied):
    centroid_judge.check_room(case, tied)


@pytest.mark.parametrize("check", ["check_limits", "check_strides", "check_broken_offsets"])
def test_centroid_lookup_on_odd_input(lookup, check):
    getattr(centroid_judge, check)()


def context(clusters: int, heads: int = 2, d: int = 128, parents: int | None = None):
    """Clusters of 0 to 8 keys on the GPU, without the keys."""
    centroids, offsets, level = centroid_judge.random_clusters(
        torch.Generator().manual_seed(0), heads, clusters, d, parents, torch.bfloat16
    )
    order = torch.zeros(heads, int(offsets[:, -1].max()), dtype=torch.int32)
    return headstart.KeyClusters(centroids, offsets, order, *level.values()).to("cuda")


@pytest.mark.parametrize("nq", [1, 700])
@pytest.mark.parametrize("parents", [None, 300])
@pytest.mark.parametrize("room", [None, 2000])
def test_centroid_lookup_at_length(lookup, nq, parents, room):
    clusters = context(20000, parents=parents)
    n = clusters.order.shape[1]
    q = tokens(2, 8, nq, 128, torch.bfloat16)
    level = {}
    if parents is not None:
        parent_threshold = torch.tensor([3.0 / n], device="cuda")
        level = dict(parent_centroids=clusters.parent_centroids, parent_offsets=clusters.parent_offsets)
        level |= dict(parent_threshold=parent_threshold)
    options = dict(scale=128**-0.5, block_q=64, max_columns=room or n, **level)
    args = q, clusters.centroids, clusters.cluster_offsets, torch.tensor([3.0 / n], device="cuda")
    got = lookup(*args, **options)
    for _ in range(3):
        again = lookup(*args, **options)
        used = torch.arange(got[1].shape[-1], device="cuda") < got[0].unsqueeze(-1)
        assert torch.equal(again[0], got[0]) and torch.equal(again[1][used], got[1][used])
    want = centroid_reference.centroid_lookup(*args, **options)
    masks = [as_mask(count.cpu(), index.cpu(), n) for count, index in (got, want)]
    # A near tie with a threshold may fall either way, and with it a parent's children.
    assert float((masks[0] != masks[1]).sum() / masks[1].sum()) < 0.005


@pytest.mark.parametrize("parents", [None, 30])
def test_centroid_lookup_waits_for_nothing(parents):
    clusters = context(500, parents=parents)
    q = torch.randn(2, 4, 130, 128, dtype=torch.bfloat16, device="cuda")
    given = {} if parents is None else dict(parent_threshold=torch.tensor([1e-3], device="cuda"))

    def step():
        threshold = torch.full((1,), 1e-3, device="cuda")
        count, index = headstart.centroid_lookup(q, clusters, threshold, max_columns=700, **given)
        return count, index.masked_fill(torch.arange(700, device="cuda") >= count.unsqueeze(-1), 0)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        q.normal_()
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(captured, step()))


def test_centroid_lookup_compiles_whole():
    clusters = context(300)

    def step(q):
        return headstart.centroid_lookup(q * 1.0, clusters, 1e-3)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for nq in (1, 100, 170):
        q = torch.randn(1, 4, nq, 128, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(q), step(q))


# --- int4 GEMM -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["operator", "triton"])
def gemm(request, monkeypatch):
    """The operator of the int4 judge: as it is dispatched, and on Triton."""
    assert _library.has_kernel("int4_gemm", "CUDA")
    operator = torch.ops.headstart.int4_gemm.default
    run = operator if request.param == "operator" else _library.triton_kernels["int4_gemm"]

    def call(*args, **options):
        return run(*(on_the_gpu(x) for x in args), **options).cpu()

    monkeypatch.setattr(int4_judge, "OP", call)
    return run


INT4_SHAPES = [(1024, 4096, 128), (17, 33, -1), (1000, 5000, 96), (200, 288, 32), (130, 1000, 64), (64, 1, 32)]


@int4_judge.by_dtype
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 17, 40, 64, 65, 200])
@pytest.mark.parametrize("n, k, group_size", INT4_SHAPES)
def test_int4_gemm(gemm, n, k, group_size, m, dtype):
    if gemm is _library.triton_kernels["int4_gemm"] and (
        m not in (1, 40, 200) or (n, k, group_size) in INT4_SHAPES[3:]
    ):
        pytest.skip("the interpreter ran these, and each compiles a kernel")
    scales = DTYPES[n % 3]
    int4_judge.check_case(m, n, k, group_size, dtype, symmetric=n % 8 == 0, scale_dtype=scales, bias=n % 3 > 0)


@int4_judge.by_dtype
@pytest.mark.parametrize("n, k, group_size", [(300, 8192, -1), (4096, 300, 32)])
def test_int4_gemm_of_many_rows(gemm, n, k, group_size, dtype):
    for m in (512, 1500):
        int4_judge.check_case(m, n, k, group_size, dtype)


@int4_judge.by_dtype
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_gemm_reads_every_weight(gemm, dtype, symmetric):
    batches = (1, 8, 16, 40, 1024)
    int4_judge.check_every_weight(dtype, 83, 135, 64, batches, symmetric)
    int4_judge.check_every_weight(dtype, 300, 2000, 96, batches[3:], symmetric)


@int4_judge.by_dtype
@pytest.mark.parametrize("n, k, group_size", [(200, 288, 32), (64, 600, 128), (19, 330, -1), (5000, 4096, 128)])
def test_int4_gemm_does_not_depend_on_the_batch(gemm, dtype, n, k, group_size):
    int4_judge.check_batches(dtype, n, k, group_size, (1, 5, 13, 16), rows=16)
    int4_judge.check_batches(dtype, n, k, group_size, (20, 40, 80, 160), rows=320)
    # Hopper multiplies more than 16 rows by other instructions (int4_gemm_sm90.cu).
    if gemm is _library.triton_kernels["int4_gemm"] or torch.cuda.get_device_capability() != (9, 0):
        int4_judge.check_batches(dtype, n, k, group_size, (3, 64), rows=320)


@int4_judge.by_dtype
@pytest.mark.parametrize("check", ["zero_points", "strides", "what_is_not_finite_stays_in_its_row"])
def test_int4_gemm_on_odd_input(gemm, dtype, check):
    getattr(int4_judge, f"check_{check}")(dtype)


def int4_weight(n, k, group_size=128):
    return int4_judge.random_weight(n, k, group_size, dtype=torch.bfloat16)[3].to("cuda")


@pytest.mark.parametrize("m", [1, 12, 40, 500])
def test_int4_gemm_in_a_cuda_graph(gemm, m):
    w = int4_weight(1000, 2048)
    x = torch.randn(m, 2048, dtype=torch.bfloat16, device="cuda")

    def step():
        return gemm(x * 1.0, w.packed, w.scales, w.zeros, group_size=128, n=1000)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert torch.equal(captured, step())


def test_int4_gemm_compiles_whole():
    w = int4_weight(300, 512)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: headstart.int4_gemm(x * 1.0, w), fullgraph=True, dynamic=True)
    for m in (2, 30, 700):
        x = torch.randn(m, 512, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(x), headstart.int4_gemm(x, w))


def test_int4_pack_and_unpack():
    codes = torch.randint(0, 16, (83, 135), dtype=torch.uint8, device="cuda")
    packed = torch.ops.headstart.int4_pack(codes)
    assert torch.equal(packed.cpu(), torch.ops.headstart.int4_pack(codes.cpu()))
    assert torch.equal(torch.ops.headstart.int4_unpack(packed, 83, 135), codes)


# --- bitmap weights --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["operator", "triton"])
def bitmap(request, monkeypatch):
    """The operators of the bitmap judge, as they are dispatched, and on Triton: (decompress, with out=, and gemm)."""
    names = ("bitmap_decompress.out", "bitmap_gemm")
    assert all(_library.has_kernel(name, "CUDA") for name in names)
    ops = torch.ops.headstart
    run = (ops.bitmap_decompress.out, ops.bitmap_gemm.default)
    if request.param == "triton":
        run = tuple(_library.triton_kernels[name] for name in names)

    def decompress(*args, out, **options):
        moved = on_the_gpu(out)
        options = {name: on_the_gpu(x) for name, x in options.items()}
        run[0](*(on_the_gpu(x) for x in args), out=moved, **options)
        # All of what surrounds the output, so that the judge sees what was written there.
        whole = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
        whole.copy_(torch.empty(0, dtype=out.dtype, device="cuda").set_(moved.untyped_storage()))

    def gemm(*args, **options):
        options = {name: on_the_gpu(x) for name, x in options.items()}
        return run[1](*(on_the_gpu(x) for x in args), **options).cpu()

    monkeypatch.setattr(bitmap_judge, "DECOMPRESS", decompress)
    monkeypatch.setattr(bitmap_judge, "GEMM", gemm)
    return run


BITMAP_SHAPES = [(1, 1), (3, 7), (17, 1024), (5, 577), (33, 96), (290, 64), (300, 5000), (4, 20000), (40000, 40)]


@bitmap_judge.by_value_dtype
@pytest.mark.parametrize("n, k", BITMAP_SHAPES)
def test_bitmap_decompress(bitmap, n, k, dtype):
    bitmap_judge.check_bits(n, k, (0.1, 0.5, 0.9)[n % 3], dtype, offset=n % 4, stride=k + 5 if n % 2 else None)


@bitmap_judge.by_dtype
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("n, k", BITMAP_SHAPES[1:-1])
def test_bitmap_decompress_scales(bitmap, n, k, values, dtype):
    for group_size in (128, -1, (13, 8, 200)[n % 3]):
        bitmap_judge.check_scaled(n, k, 0.5, dtype, values, group_size, offset=n % 4)


@bitmap_judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_bitmap_rows_anywhere_and_damage(bitmap, values, dtype):
    bitmap_judge.check_slice(dtype, values)
    bitmap_judge.check_damaged(dtype, values)


@bitmap_judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 32, 33, 64, 150])
@pytest.mark.parametrize("n, k", [(1024, 4096), (17, 33), (1000, 5000), (130, 1000), (64, 1)])
def test_bitmap_gemm(bitmap, n, k, m, values, dtype):
    if bitmap[1] is _library.triton_kernels["bitmap_gemm"] and m not in (1, 16, 64, 150):
        pytest.skip("each number of rows compiles a kernel")
    scales = dtype if values == "same" or dtype == torch.float16 else DTYPES[n % 3]
    group_size, density = (128, -1, 40)[n % 3], (0.2, 0.5, 0.8)[m % 3]
    bitmap_judge.check_case(m, n, k, dtype, values, group_size, density, scales, bias=n % 2 == 0)


@bitmap_judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_bitmap_gemm_reads_every_weight(bitmap, values, dtype):
    bitmap_judge.check_every_weight(dtype, 35, 300, (1, 8, 32, 75), values)
    bitmap_judge.check_every_weight(dtype, 700, 2000, (8, 64, 1000), values)


@bitmap_judge.by_dtype
def test_bitmap_gemm_on_odd_input(bitmap, dtype):
    for m in (1, 3, 20):
        bitmap_judge.check_what_is_not_finite(dtype, m)
    bitmap_judge.check_strides(dtype)


def bitmap_weight(n, k, values="same", dtype=torch.bfloat16):
    w = bitmap_judge.random_weight(n, k, 0.5, dtype, values, 128)
    return w, w.to("cuda")


@pytest.mark.parametrize("m", [1, 12, 60, 500])
def test_bitmap_in_a_cuda_graph(bitmap, m):
    _, w = bitmap_weight(1000, 2048)
    x = torch.randn(m, 2048, dtype=torch.bfloat16, device="cuda")
    given = (w.values, w.bitmask, w.row_offsets)
    dense = torch.empty(1000, 2048, dtype=torch.bfloat16, device="cuda")

    def step():
        bitmap[0](*given, 2048, out=dense)
        return bitmap[1](x * 1.0, *given, cols=2048), dense + 0.0

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        x.normal_()
        w.values.normal_()
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(captured, step()))


def test_bitmap_gemm_compiles_whole():
    _, w = bitmap_weight(300, 512, "int8")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: headstart.bitmap_gemm(x * 1.0, w), fullgraph=True, dynamic=True)
    for m in (2, 30, 700):
        x = torch.randn(m, 512, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(x), headstart.bitmap_gemm(x, w))


def test_bitmap_compress_on_the_gpu():
    w = bitmap_judge.random_bits(83, 135, 0.5, torch.bfloat16)
    got = torch.ops.headstart.bitmap_compress(w.cuda())
    for a, b in zip(got, bitmap_judge.reference.compress(w)):
        a, b = (bitmap_judge.bits(x) if x.is_floating_point() else x for x in (a.cpu(), b))
        assert torch.equal(a, b)


def test_bitmap_past_two_to_the_31(bitmap):
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    # Full rows, so that the values, too, are more than 2^31; rows repeat every 61, which no power of two does.
    n, k = 2**15 + 16, 2**16
    few = torch.randint(1, 256, (61, k), dtype=torch.uint8, device="cuda").view(torch.int8)
    values = few.repeat(-(-n // 61), 1)[:n].flatten()
    bitmask = torch.full((n, k // 8), 255, dtype=torch.uint8, device="cuda")
    offsets = torch.arange(n + 1, device="cuda") * k
    out = torch.zeros(n, k, dtype=torch.int8, device="cuda")
    bitmap[0](values, bitmask, offsets, k, out=out)
    assert torch.equal(out.flatten(), values)
    del out
    scales = torch.ones(n, 1, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(1, k, dtype=torch.bfloat16, device="cuda")
    x[0, -1] = 1
    got = bitmap[1](x, values, bitmask, offsets, cols=k, scales=scales)
    assert torch.equal(got[0], values.view(n, k)[:, -1].bfloat16())


# --- torch.compile and CUDA graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS.keys())
def test_compiles_whole_with_dynamic_shapes(builder):
    def step(q, k, v):
        index = builder(q, k)
        out, lse = headstart.sparse_attention(q * 1.0, k, v, index)
        return headstart.merge_attention(out, lse, out, lse)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (512, 640):
        q, k, v = torch.randn(3, 1, 4, n, 64, dtype=torch.float16, device="cuda").unbind()
        for got, want in zip(compiled(q, k, v), step(q, k, v)):
            torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS.keys())
def test_prefill_in_a_cuda_graph(builder):
    q, k, v = (torch.randn(1, 4, 700, 64, dtype=torch.float16, device="cuda") for _ in range(3))

    def step():
        index = builder(q, k)
        return (*truth.tensors(index), *headstart.sparse_attention(q, k, v, index))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        for got, want in zip(captured, step()):
            assert torch.equal(got, want)


def test_cuda_graph():
    q, k, v = (torch.randn(1, 4, 512, 128, dtype=torch.float16, device="cuda") for _ in range(3))
    index = random_index(1, 4, 512, 512, columns=40)

    def step():
        out, lse = headstart.sparse_attention(q, k, v, index)
        return headstart.merge_attention(out, lse, out * 0.5, lse - 1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for x in (q, k, v):
            x.normal_()
        index.block_count.random_(0, 3)
        graph.replay()
        for got, want in zip(captured, step()):
            assert torch.equal(got, want)


def test_side_streams():
    # The work must be ordered on the current stream, not on the default one.
    stream = torch.cuda.Stream()
    q = torch.zeros(1, 4, 4096, 128, device="cuda")
    lse = torch.zeros(1, 4, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        q.fill_(3)
        out, _ = headstart.merge_attention(q, lse, q, lse)
    stream.synchronize()
    assert (out == 3).all()

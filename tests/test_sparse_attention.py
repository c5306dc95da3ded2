"""Sparse attention, wherever it runs, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import headstart
import shapes
from backends import INTERPRETED, STEMS, gpu_kernel, interpreted, on_gpu, places, torch_operator
from headstart import BlockIndex
from headstart.reference import sparse_attention as reference
from judges import sparse_attention as judge
from judges.sparse_attention import INF, NAN, attend, by_dtype, by_torch, dense_mask, surrounded
from shapes import DTYPES, Shape, random_lists
from tolerances import FLOOR, error

STEM = STEMS["sparse_attention"]
F32, F16, BF16 = DTYPES
kernels = places("cpu", "interpreter", "triton")


def by_case(*cases):
    return pytest.mark.parametrize("shape, dtype", cases, ids=lambda x: str(x).removeprefix("torch."))


def heads(ops) -> tuple[int, int]:
    """Of queries, and of keys; in the interpreter, one tile of one head takes 20 ms."""
    return (1, 1) if ops.kind == "interpreter" else (4, 2)


def unread(ops, shape: Shape) -> int:
    """How many of the first keys Triton's kernels do not read, because they are before every window."""
    return judge.keys_before_every_window(shape) if ops.kind in ("interpreter", "triton") else 0


# --- random indices --------------------------------------------------------------------------------------------------

_square, _grouped = Shape(1, 2, 1, 130, 130, 64), Shape(1, 4, 2, 60, 70, 64, columns="own")
CASES = (
    (_square, F32),
    (_square.with_(nq=100, nk=100, columns="own", share=0.0), F32),
    (_square.with_(columns="own", share=0.6), F32),
    (_square.with_(columns="shared"), F32),
    (_grouped, F32),
    (_grouped.with_(heads_index=2), F32),
    (_square.with_(batch=2, nq=100, kv_start=(0, 75), columns="own"), F32),
    (_square.with_(nq=70, nk=301, columns="own"), F32),
    (_square.with_(nq=1, nk=300, columns="own"), F16),
    (_square.with_(nq=100, nk=70, causal=False, columns="own"), F32),
    (_square.with_(nq=200, nk=300, block_q=128, block_k=128, columns="own"), F16),
    (_square.with_(nk=300, block_k=128, columns="own"), F32),
    (_square.with_(nk=200, block_q=128, columns="own"), F16),
    *((_square.with_(nq=70, head_dim=d, columns="own"), F16) for d in (8, 72, 96)),
    *((_square.with_(nq=70, head_dim=d, columns="own"), BF16) for d in (80, 128, 256)),
)
WINDOWS = tuple(
    (_square.with_(window=window, **sizes), F32 if "causal" in sizes else F16)
    for window in (1, 50, 64, 129, 10**9)
    for sizes in (
        dict(nq=200, nk=200, share=0.6),
        dict(nq=200, nk=330, block_q=128, share=1.0),
        dict(nq=140, nk=400, block_q=128, block_k=128, columns="shared"),
        dict(batch=2, nk=200, kv_start=(90, 0), columns="shared"),
        dict(nq=100, nk=150, causal=False, columns="shared"),
    )
)
MORE_CASES = (
    *((shape, dtype) for shape in shapes.ATTENTION + shapes.WINDOWED for dtype in DTYPES),
    *((shape.with_(columns="none", share=1.0), F32) for shape in shapes.WINDOWED),
    *(
        (Shape(1, 4, 2, 333, 333, d, heads_index=4, columns="shared", share=0.3), dtype)
        for d in (8, 64, 72, 80, 96, 128, 192, 256)
        for dtype in DTYPES
    ),
    *(
        (Shape(1, 2, 2, 515, 515, d, 2, block_q, block_k, columns, share=0.3), BF16)
        for d in (64, 128)
        for block_q in (64, 128)
        for block_k in (64, 128)
        for columns in ("none", "own")
    ),
    *(
        (Shape(2, 8, 2, nq, nk, 128, heads_index=2, columns="own", causal=causal, share=0.5), F16)
        for nq, nk in ((1, 1), (1, 1000), (7, 300), (64, 64), (65, 700), (300, 300))
        for causal in (True, False)
    ),
    *(
        (Shape(1, 8, 2, nq, nk, 128, 2, block, block, "own", window=window, share=0.6), F16)
        for nq, nk in ((300, 300), (130, 5000), (1, 3000), (7, 3000))
        for window in (1, 100, 1000)
        for block in (64, 128)
    ),
)


@by_case(*((shape, torch.float64) for shape in shapes.ATTENTION + shapes.WINDOWED))
def test_reference_in_float64_is_the_definition(shape: Shape, dtype):
    q, k, v = shape.qkv(dtype)
    index = shape.random_index()
    options = dict(causal=shape.causal, window=shape.window)
    out, lse = attend(reference.sparse_attention, q, k, v, index, shape.start(), **options)
    exact_out, exact_lse = by_torch(q, k, v, dense_mask(index, shape))
    assert error(out, exact_out) < 1e-12 and error(lse, exact_lse) < 1e-6


@by_case(*CASES, *WINDOWS)
def test_random_index(ops, shape: Shape, dtype):
    judge.check_case(ops.sparse_attention, shape, dtype, unread=unread(ops, shape))


@places("cpu", "cuda", "triton")
@by_case(*MORE_CASES)
def test_more_random_indices(ops, shape: Shape, dtype):
    if (
        ops.kind in ("cuda", "triton")
        and dtype != BF16
        and shape in shapes.ATTENTION[len(shapes.HEAD_DIMS) :] + shapes.WINDOWED
    ):
        pytest.skip("each dtype compiles a kernel, and the interpreter ran such")
    judge.check_case(ops.sparse_attention, shape, dtype, unread=unread(ops, shape))


@places("reference", "cpu")
def test_any_shape(ops):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    pairs = st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 3), (6, 2)])

    @st.composite
    def problems(draw):
        (hq, hkv), batch = draw(pairs), draw(st.integers(1, 2))
        nk = draw(st.integers(1, 200))
        nq = draw(st.integers(1, nk))
        start = draw(st.none() | st.lists(st.integers(0, nk), min_size=batch, max_size=batch).map(tuple))
        return Shape(
            batch, hq, hkv, nq, nk, 8 * draw(st.integers(1, 12)),
            heads_index=draw(st.sampled_from([n for n in range(1, hq + 1) if hq % n == 0])),
            block_q=draw(st.sampled_from((64, 128))), block_k=draw(st.sampled_from((64, 128))),
            columns=draw(st.sampled_from(("none", "shared", "own"))), kv_start=start, causal=draw(st.booleans()),
            window=draw(st.none() | st.integers(1, 220)),
        )  # fmt: skip

    @hypothesis.settings(max_examples=30, deadline=None)
    @hypothesis.given(problems(), st.sampled_from(DTYPES), st.integers(0, 2**16))
    def run(shape, dtype, seed):
        torch.manual_seed(seed)
        judge.check(ops.sparse_attention, *shape.qkv(dtype), shape.random_index(), shape)

    run()


# --- indices of a kind -----------------------------------------------------------------------------------------------


@places("cpu")
@by_dtype
@pytest.mark.parametrize("nq, nk", ((500, 500), (130, 777), (1, 900), (4, 300)))
@pytest.mark.parametrize("window", (1, 64, 100, 256))
def test_a_window_needs_only_its_own_blocks(ops, dtype, nq, nk, window):
    """The blocks of an A-shape without sinks are all that a window of the same width reaches."""
    shape = Shape(1, 4, 2, nq, nk, 64, window=window)
    q, k, v = shape.qkv(dtype)
    index = headstart.a_shape_index(nq, nk, sink=0, local=window)
    got = judge.check(ops.sparse_attention, q, k, v, index, shape)
    every = attend(ops.sparse_attention, q, k, v, shape.all_blocks(), window=window)
    assert all(torch.equal(a, b) for a, b in zip(got, every))


@kernels
def test_keys_outside_every_window_are_not_read(ops):
    """Tiles and columns that no query of a row reaches hold NaN, which any use would spread."""
    for nq in (1, 3, 300):
        shape = Shape(1, 2, 1, nq, 700, 64, window=65, columns="shared", share=1.0)
        q, k, v = shape.qkv(F32)
        index = shape.random_index()
        want = attend(ops.sparse_attention, q, k, v, index, window=65)
        edge = judge.keys_before_every_window(shape)
        edge = edge // 64 * 64 if ops.kind == "cpu" else edge  # a CPU kernel reads whole tiles
        k[:, :, :edge], v[:, :, :edge] = NAN, NAN
        for got, expected in zip(attend(ops.sparse_attention, q, k, v, index, window=65), want):
            assert torch.equal(got, expected) and got.isfinite().all()


@places("reference", "cpu", "triton")
@by_dtype
@pytest.mark.parametrize("padded", (False, True), ids=("whole", "padded"))
def test_index_builders(ops, dtype, padded):
    shape = Shape(2, 4, 2, 230, 300, 64, kv_start=(0, 130) if padded else None)
    q, k, v = shape.qkv(dtype)
    start = shape.start()
    for index in (
        headstart.a_shape_index(230, 300, sink=3, local=80, kv_start=start),
        headstart.vertical_slash_index(q, k, 40, 100, kv_start=start),
        headstart.block_topk_index(q, k, 2, kv_start=start),
        headstart.adaptive_block_index(q, k, 0.7, kv_start=start, block_q=128),
    ):
        judge.check(ops.sparse_attention, q, k, v, index, shape)


@by_dtype
def test_every_block_is_dense_attention(ops, dtype):
    shape = Shape(1, 3, 1, 150, 150, 64)
    q, k, v = shape.qkv(dtype)
    out, _ = judge.check(ops.sparse_attention, q, k, v, shape.all_blocks(), shape)
    dense = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True)
    assert error(out, dense) <= 2 * FLOOR[dtype] * float(dense.abs().max())


@by_dtype
def test_empty_rows_and_lists(ops, dtype):
    shape = Shape(1, 2, 2, 200, 200, 64, heads_index=2)
    count = torch.tensor([[[0, 1, 0, 2], [0, 0, 0, 0]]], dtype=torch.int32)
    ids = torch.tensor([0, 3], dtype=torch.int32).repeat(1, 2, 4, 1)
    columns = torch.tensor([[[0], [1]]], dtype=torch.int32), torch.tensor([[[[7]], [[150]]]], dtype=torch.int32)
    for index in (BlockIndex(count, ids), BlockIndex(count, ids, *columns), BlockIndex(count * 0, ids[..., :0])):
        out, lse = judge.check(ops.sparse_attention, *shape.qkv(dtype), index, shape)
        nothing = ~dense_mask(index, shape).any(-1)
        assert nothing.any() and (out[nothing] == 0).all() and (lse[nothing] == -INF).all()


@by_dtype
def test_rows_that_see_nothing(ops, dtype):
    """No block, blocks of the future alone, and nothing but padding."""
    shape = Shape(2, 2, 1, 130, 130, 64, kv_start=(0, 130))
    count = torch.tensor([0, 1, 0], dtype=torch.int32).expand(2, 1, 3)
    ids = torch.tensor([[0, 0], [2, 0], [1, 1]], dtype=torch.int32).expand(2, 1, 3, 2)
    q, k, v = (surrounded(x) for x in shape.qkv(dtype))
    for index in (BlockIndex(count, ids), BlockIndex(count * 0, ids)):
        out, lse = judge.check(ops.sparse_attention, q, k, v, index, shape)
        assert (out == 0).all() and (lse == -INF).all()


@by_dtype
@pytest.mark.parametrize("nq", (1, 16, 90))
def test_columns(ops, dtype, nq):
    """A key named by a block and by a column counts once; columns alone; more columns than fit a tile."""
    shape = Shape(1, *heads(ops), nq, 300, 64)
    lists = torch.full((1, 1, shape.rows), 2, dtype=torch.int32), torch.tensor([1, 4], dtype=torch.int32)
    blocks = (lists[0], lists[1].repeat(1, 1, shape.rows, 1))
    for rows in {1, shape.rows}:
        for keys in (range(300), range(64, 128), (0, 63, 64, 127, 128, 299), range(0, 300, 2)):
            ids = torch.tensor(keys, dtype=torch.int32).repeat(1, 1, rows, 1)
            columns = torch.full((1, 1, rows), len(keys), dtype=torch.int32), ids
            judge.check(ops.sparse_attention, *shape.qkv(dtype), BlockIndex(*blocks, *columns), shape)
            judge.check(ops.sparse_attention, *shape.qkv(dtype), BlockIndex(blocks[0] * 0, blocks[1], *columns), shape)


@by_case(
    (Shape(2, 2, 1, 60, 150, 64, kv_start=(3, 149), columns="own", share=0.5), F32),
    (Shape(3, 4, 4, 300, 300, 64, kv_start=(0, 77, 299), columns="shared", share=0.3), F16),
)
def test_one_index_for_all_sequences(ops, shape: Shape, dtype):
    q, k, v = (surrounded(x) for x in shape.qkv(dtype))
    judge.check(ops.sparse_attention, q, k, v, shape.with_(batch=1).random_index(), shape)


@pytest.mark.parametrize("nq", (1, 100))
@pytest.mark.parametrize("start", (-7, 100, 130, 2**31 - 1, -(2**31)))
def test_kv_start_outside_the_keys(ops, nq, start):
    """Before the first key is no padding; at or past the last is nothing but padding."""
    shape = Shape(1, 2, 1, nq, 100, 16, columns="shared", kv_start=(min(max(start, 0), 100),))
    kv_start = torch.tensor([start], dtype=torch.int32)
    judge.check(ops.sparse_attention, *shape.qkv(F32), shape.random_index(), shape, kv_start=kv_start)


def test_sizes_of_zero(ops):
    for shape in (
        Shape(1, 2, 1, 0, 5, 16),
        Shape(0, 2, 1, 5, 5, 16),
        Shape(1, 2, 1, 70, 0, 16, causal=False),
        Shape(1, 2, 1, 1, 0, 16, causal=False),
    ):
        q, k, v = shape.qkv(BF16)
        out, lse = attend(ops.sparse_attention, q, k, v, shape.all_blocks(), causal=shape.causal)
        assert out.shape == q.shape and (out == 0).all() and lse.shape == q.shape[:3] and (lse == -INF).all()


# --- layouts ---------------------------------------------------------------------------------------------------------


@kernels
@by_dtype
@pytest.mark.parametrize("nq", (2, 100))
def test_strides_do_not_matter(ops, dtype, nq):
    shape = Shape(2, *heads(ops), nq, 130, 72, columns="own")
    shape = shape.with_(heads_index=shape.heads_q)
    q, k, v = shape.qkv(dtype)
    index = shape.random_index()
    expected = judge.check(ops.sparse_attention, q, k, v, index, shape)
    for (name, lq), lk, lv in zip(judge.layouts(q).items(), judge.layouts(k).values(), judge.layouts(v).values()):
        if ops.kind == "triton":  # on a GPU, other loads may make another order of sums
            judge.check(ops.sparse_attention, lq, lk, lv, index, shape)
        else:
            got = attend(ops.sparse_attention, lq, lk, lv, index)
            assert all(torch.equal(a, b) for a, b in zip(got, expected)), name
    for part in (k[:, :1], k[:1]):  # the same keys and values for all heads, or all batches
        shared, copied = part.expand_as(k), part.expand_as(k).clone()
        pairs = zip(*(attend(ops.sparse_attention, q, x, x, index) for x in (shared, copied)))
        assert all(torch.equal(got, want) for got, want in pairs)


@kernels
def test_index_layouts_do_not_matter(ops):
    small = ops.kind == "interpreter"
    shape = Shape(2, 4, 2, 70, 70, 16) if small else Shape(2, 4, 2, 150, 200, 16)
    q, k, v = shape.qkv(F32)
    for columns in ("own",) if small else ("none", "shared", "own"):
        one = shape.with_(batch=1, columns=columns).random_index()
        parts = [t for t in (one.block_count, one.block_index, one.column_count, one.column_index) if t is not None]
        copies = BlockIndex(*(t.repeat(2, 4, *[1] * (t.dim() - 2)) for t in parts))
        expected = attend(ops.sparse_attention, q, k, v, copies)
        for view in (
            lambda t: t.expand(2, 4, *t.shape[2:]),
            lambda t: t.expand(2, -1, *t.shape[2:]),
            lambda t: t.expand(1, 2, *t.shape[2:]),
            lambda t: t.repeat(2, 2, *[1] * (t.dim() - 2)).transpose(0, 1),
            lambda t: t.repeat(2, 1, *[1] * (t.dim() - 2)).mT.contiguous().mT,
            lambda t: torch.stack([t, t - 9], -1)[..., 0],
        ):
            got = attend(ops.sparse_attention, q, k, v, BlockIndex(*(view(t) for t in parts)))
            assert all(torch.equal(a, b) for a, b in zip(got, expected))


@places("cpu")
@pytest.mark.parametrize("where", ("q", "kv"))
def test_offsets_past_2_to_the_31(ops, where):
    """Tokens 2^24 elements apart: a 32-bit product of position and stride would wrap. Most pages are never touched."""
    shape = Shape(1, 2, 2, 132, 132, 8)
    stride = 2**24
    try:
        far = torch.empty(132 * stride, dtype=BF16).as_strided((1, 2, 132, 8), (0, 64, stride, 1))
    except RuntimeError as failure:
        pytest.skip(f"no address space: {failure}")
    q, k, v = shape.qkv(BF16)
    expected = attend(ops.sparse_attention, q, k, v, shape.all_blocks())
    if where == "q":
        q = far.copy_(q)
    else:
        k, v = far.copy_(k), far.as_strided((1, 2, 132, 8), (0, 64, stride, 1), 1024).copy_(v)
    for nq in (132, 3):  # prefill, decode
        index = shape.with_(nq=nq).all_blocks()
        got = attend(ops.sparse_attention, q[:, :, -nq:], k, v, index)
        assert error(got[0], expected[0][:, :, -nq:]) < 0.02 and error(got[1], expected[1][:, :, -nq:]) < 1e-4


@pytest.mark.gpu
def test_offsets_past_2_to_the_31_on_a_gpu(gpu):
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    # The last of 34 sequences lies past 2^31 elements; it must give what it gives alone.
    k = torch.empty(34, 1, 2**19, 128, dtype=F16, device="cuda")
    k[-1].normal_()
    q = torch.randn(34, 1, 64, 128, dtype=F16, device="cuda")
    count = torch.full((1, 1, 1), 2, dtype=torch.int32, device="cuda")
    ids = torch.tensor([5, 2**13 - 1], dtype=torch.int32, device="cuda").view(1, 1, 1, 2)
    operator = gpu_kernel("sparse_attention", "triton")
    out, lse = operator(q, k, k, count, ids)
    alone, alone_lse = operator(q[-1:], k[-1:], k[-1:], count, ids)
    assert torch.equal(out[-1:], alone) and torch.equal(lse[-1:], alone_lse) and alone.isfinite().all()


# --- values ----------------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("nq", (1, 150))
@pytest.mark.parametrize("scale", (-0.3, 0.0, 1.0, 30.0, 1e-30))
def test_scale(ops, dtype, nq, scale):
    shape = Shape(1, *heads(ops), nq, 200, 64, columns="shared")
    judge.check(ops.sparse_attention, *shape.qkv(dtype), shape.all_blocks(), shape, scale)
    judge.check_case(ops.sparse_attention, shape, dtype, scale)


@places("reference", "cpu")
@by_dtype
@pytest.mark.parametrize("nq", (1, 192))
@pytest.mark.parametrize("size, scale", ((1e4, None), (1e4, 1.0), (1e4, 1e4), (3e4, -1.0), (1e-4, 1e4)))
def test_extreme_logits(ops, dtype, nq, size, scale):
    """One key far ahead of all others, at logits up to 1e13 (scores 6e9 and more): attention is that key's value."""
    shape = Shape(1, 2, 1, nq, 192, 64)
    direction = torch.randn(64).sign()
    q = (direction * size).repeat(1, 2, nq, 1).to(dtype)
    k = torch.full((1, 1, 192, 1), -1.0).index_fill(2, torch.tensor([0]), 1.0) * direction * size
    k = (k * (-1 if scale is not None and scale < 0 else 1)).to(dtype)
    v = torch.randn(1, 1, 192, 64).to(dtype)
    out, lse = attend(ops.sparse_attention, q, k, v, shape.all_blocks(), scale=scale)
    exact_out, exact_lse = by_torch(q, k, v, dense_mask(shape.all_blocks(), shape), scale, torch.float64)
    assert error(out, exact_out) <= FLOOR[dtype] * 4
    assert error(lse, exact_lse) <= 1e-6 * float(exact_lse.abs().max())


@places("cpu")
@by_dtype
def test_equal_extreme_logits(ops, dtype):
    """Logits of 1e9 that are all the same: the mean of the values, however large the common part."""
    shape = Shape(1, 1, 1, 192, 192, 64)
    q, k = torch.full((1, 1, 192, 64), 9999.0, dtype=dtype), torch.full((1, 1, 192, 64), 7777.0, dtype=dtype)
    v = torch.randn(1, 1, 192, 64).to(dtype)
    judge.check(ops.sparse_attention, q, k, v, shape.all_blocks(), shape, scale=1.0)


@by_dtype
@pytest.mark.parametrize("where", ("q", "k", "v"))
@pytest.mark.parametrize("nq, token", ((1, 0), (70, 0), (70, 40), (70, 69), (150, 100)))
def test_nan_propagates(ops, dtype, where, nq, token):
    """A query whose own numbers, or those of a key that it attends, are NaN is NaN; one with neither need not be."""
    shape = Shape(1, 2, 1, nq, max(nq, 70), 64)
    inputs = dict(zip("qkv", shape.qkv(dtype)))
    index = shape.all_blocks()
    inputs[where][0, 0, token, 5] = NAN
    out, lse = attend(ops.sparse_attention, *inputs.values(), index)
    hit = dense_mask(index, shape)[0, :, :, token]
    if where == "q":
        hit = torch.zeros_like(hit).index_fill(1, torch.tensor([token]), True) & torch.tensor([[True], [False]])
    row = out[0] if where != "v" else out[0, :, :, 5:6]
    assert row.isnan().all(-1)[hit].all(), "a NaN was hidden"
    if where != "v":
        assert lse[0].isnan()[hit].all(), "a NaN was hidden in lse"
        assert lse[0].isfinite()[~hit].all()
        assert where == "k" or out[0][~hit].isfinite().all()


@places("cpu")
@by_dtype
def test_result_does_not_depend_on_threads(ops, dtype):
    before = torch.get_num_threads()
    try:
        for nq, nk in ((300, 300), (1, 2000), (4, 1100)):
            shape = Shape(1, 4, 2, nq, nk, 64, heads_index=4, columns="own")
            q, k, v = shape.qkv(dtype)
            index = shape.random_index()
            results = []
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                results.append(attend(ops.sparse_attention, q, k, v, index))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other)), (nq, nk)
    finally:
        torch.set_num_threads(before)


# --- few queries -----------------------------------------------------------------------------------------------------


@places("reference", "cpu", "triton")
@by_dtype
@pytest.mark.parametrize("columns", ("none", "shared", "own"))
@pytest.mark.parametrize("window", (None, 70))
def test_decode_equals_prefill(ops, dtype, columns, window):
    shape = Shape(1, 4, 2, 600, 600, 64, columns=columns)
    q, k, v = shape.qkv(dtype)
    whole = shape.random_index(0.7)
    out, lse = attend(ops.sparse_attention, q, k, v, whole, window=window)
    last = [None if t is None else t[:, :, -1:] for t in (whole.column_count, whole.column_index)]
    index = BlockIndex(whole.block_count[:, :, -1:], whole.block_index[:, :, -1:], *last)
    for n in (1, 2, 4, 5, 8, 9, 24):  # on a CPU, 4 heads share a list: from 5 queries on by the prefill kernel
        few, few_lse = attend(ops.sparse_attention, q[:, :, -n:], k, v, index, window=window)
        assert error(few, out[:, :, -n:]) <= 2 * FLOOR[dtype] * max(1, float(out.abs().max())), n
        assert error(few_lse, lse[:, :, -n:]) <= 1e-5, n


@pytest.fixture
def splits(request, monkeypatch) -> list[int]:
    """In the interpreter: of each launch for few queries, how many programs shared a list."""
    found = []
    if INTERPRETED:
        from headstart.triton.sparse_attention import decode

        split_attention = decode.split_attention
        counted = lambda *args, **options: found.append(options["splits"]) or split_attention(*args, **options)  # noqa: E731
        monkeypatch.setattr(decode, "split_attention", counted)
    return found


_few, _long = Shape(1, 4, 2, 1, 500, 64, share=0.6), Shape(1, 2, 1, 2, 600, 64, columns="shared", share=0.6)
FEW = (
    (_few.with_(nk=700, heads_index=2), F16),
    (_few.with_(batch=2, columns="shared"), F16),
    (_few.with_(heads_index=4, columns="shared"), F16),
    (_long.with_(nq=1, nk=900, share=0.0), F16),
    (_long.with_(heads_q=6, heads_kv=2, nq=5), F16),
    (_long.with_(batch=2, nq=3, kv_start=(599, 130)), BF16),
    (_long.with_(nk=900, head_dim=80, block_q=128, block_k=128), F16),
    (_long.with_(nq=4, head_dim=24, causal=False), F32),
)
SHARED = (
    (_few.with_(heads_q=8), F16),
    (_few.with_(heads_q=8, heads_index=2, nq=2, columns="shared"), F16),
    (_few.with_(heads_q=8, heads_index=4, nq=3), F16),
    (_few.with_(heads_q=12, heads_kv=6, heads_index=4), F16),
    (_few.with_(heads_kv=1, heads_index=4), BF16),
    (_few.with_(heads_q=8, heads_kv=1, nq=7, columns="shared"), F32),
)


@by_case(*((shape.with_(window=window), dtype) for shape, dtype in FEW for window in (None, 300)))
def test_few_queries_split_a_long_list(ops, splits, shape: Shape, dtype, monkeypatch):
    if ops.kind == "interpreter":
        from headstart.triton.sparse_attention import decode

        monkeypatch.setattr(decode, "SPLIT_KEYS", 100)
    scale = -0.3 if shape.nq == 5 else None
    judge.check_case(ops.sparse_attention, shape, dtype, scale, unread(ops, shape))
    assert ops.kind != "interpreter" or splits[0] > 1


def test_few_queries_of_a_long_list_that_names_nothing(ops, splits):
    shape = Shape(1, 2, 1, 2, 600, 64)
    every = shape.all_blocks()
    out, lse = attend(ops.sparse_attention, *shape.qkv(F16), BlockIndex(every.block_count * 0, every.block_index))
    assert (out == 0).all() and (lse == -INF).all() and (ops.kind != "interpreter" or splits[0] > 1)


@by_case(*((shape.with_(batch=2, nk=300, kv_start=(0, 130)), dtype) for shape, dtype in SHARED))
def test_few_queries_of_many_sequences_are_not_split(ops, splits, shape: Shape, dtype, monkeypatch):
    if ops.kind == "interpreter":
        from headstart.triton import sparse_attention as module

        limits = module.device_limits(torch.device("cpu"))._replace(processors=1)
        monkeypatch.setattr(module, "device_limits", lambda device: limits)
    judge.check_case(ops.sparse_attention, shape, dtype)
    assert ops.kind != "interpreter" or splits == [1]


@places("triton")
@by_dtype
@pytest.mark.parametrize("heads_index", [1, 2, 8])
@pytest.mark.parametrize("nq", [1, 3, 17, 32])
def test_few_queries_over_long_lists(ops, nq, heads_index, dtype):
    shape = Shape(2, 8, 2, nq, 9000, 128, heads_index)
    q, k, v = (surrounded(x) for x in shape.qkv(dtype))
    blocks, columns = (random_lists((2, heads_index, 1), n, share) for n, share in ((shape.blocks, 0.3), (9000, 0.1)))
    judge.check(ops.sparse_attention, q, k, v, BlockIndex(*blocks, *columns), shape)


@places("triton")
@pytest.mark.parametrize("heads_index", [8, 16, 32])
@pytest.mark.parametrize("nq", [1, 3, 8])
def test_a_batch_whose_heads_share_keys_and_lists(ops, nq, heads_index):
    # Lists for each KV head, for two query heads and for one; so many that none is split.
    shape = Shape(64, 32, 8, nq, 700, 128, heads_index, columns="own", share=0.3)
    judge.check_case(ops.sparse_attention, shape, BF16)


@places("triton")
def test_more_lists_than_a_grid_has_in_its_second_dimension(ops):
    shape = Shape(2100, 32, 32, 1, 70, 64, heads_index=32)
    q, k, v = (surrounded(x) for x in shape.qkv(F16))
    judge.check(ops.sparse_attention, q, k, v, shape.with_(batch=1).random_index(0.7), shape)


# --- lists that a GPU must survive -----------------------------------------------------------------------------------


@places("reference", "interpreter", "triton")
@pytest.mark.parametrize("causal", [True, False])
def test_ids_outside_the_keys_are_skipped(ops, causal):
    """On a CPU they are an error. `clean` lists the same keys, and nothing else."""
    shape, top = Shape(1, 2, 1, 130, 130, 64, causal=causal), 2**31 - 1
    q, k, v = (surrounded(x) for x in shape.qkv(F16))
    ids = torch.tensor([[-9, 0, 3, top, 0], [-2, -1, 0, 1, 4], [-1, 0, 2, 7, top]], dtype=torch.int32)[None, None]
    columns = torch.tensor([-top, -1, 5, 70, 129, 130, top], dtype=torch.int32).view(1, 1, 1, 7)
    inside = torch.tensor([[0, 0], [0, 1], [0, 2]], dtype=torch.int32)[None, None]
    column_count, count = torch.full((1, 1, 1), 7, dtype=torch.int32), torch.tensor([[[1, 2, 2]]], dtype=torch.int32)
    clean = BlockIndex(count, inside, column_count - 4, columns[..., 2:5])
    want = judge.check(ops.sparse_attention, q, k, v, clean, shape)
    for count in ((4, 5, 5), (4, 5, 9)):  # one past the capacity
        index = BlockIndex(torch.tensor([[count]], dtype=torch.int32), ids, column_count, columns)
        got = attend(ops.sparse_attention, q, k, v, index, causal=causal)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@places("reference", "interpreter", "triton")
def test_the_same_wild_ids_for_every_row(ops):
    shape, top = Shape(1, 2, 2, 130, 130, 64), 2**31 - 1
    q, k, v = (surrounded(x) for x in shape.qkv(F16))
    count = torch.full((1, 1, 3), 9, dtype=torch.int32)
    ids = torch.tensor([-top, -1, 0, 2, 2**20, top], dtype=torch.int32).expand(1, 1, 3, 6)
    columns = torch.tensor([-top, -1, 3, 100, 130, top], dtype=torch.int32).expand(1, 1, 1, 6)
    clean = BlockIndex(count * 0 + 2, ids[..., 2:4], count[..., :1] * 0 + 2, columns[..., 2:4])
    want = judge.check(ops.sparse_attention, q, k, v, clean, shape)
    got = attend(ops.sparse_attention, q, k, v, BlockIndex(count, ids, count[..., :1], columns))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@places("interpreter", "triton")
def test_disordered_lists_read_no_memory_outside_the_keys(ops):
    q, k, v = (surrounded(x) for x in Shape(1, 1, 1, 130, 130, 64).qkv(F16))
    count = torch.full((1, 1, 3), 6, dtype=torch.int32)
    ids = torch.tensor([0, 2**30, -5, 1, 77, 0], dtype=torch.int32).expand(1, 1, 3, 6)
    out, lse = ops.sparse_attention(q, k, v, count, ids)
    assert not out.isnan().any() and not lse.isnan().any()


# --- the order of programs -------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("section", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_programs_start_longest_first(causal, section, interpreter, monkeypatch):
    from headstart.triton import block_lists

    monkeypatch.setattr(block_lists, "LONG_ROW", 1)
    kv_heads, group, tiles, nq, nk = 3, 2, 5, 300, 900
    count, ids = reference.compact(torch.rand(1, 6, tiles, 15) < 0.5)
    column_count, columns = reference.compact(torch.rand(1, 6, tiles, nk) < 1 / 3)
    lists = block_lists.Lists((count, ids, column_count, columns, count), (), (15, 900), True, False)
    lists = lists._replace(strides=(0, *count.stride()[1:], *[0] * 4, 0, *column_count.stride()[1:]))
    shape = dict(nq=nq, nk=nk, tiles=tiles, streams=3, section=section, kv_heads=3, group=group, index_group=1)
    order = block_lists.longest_first(lists, **shape, block_q=64, block_k=64, block_m=64, causal=causal)
    seen = (torch.arange(1, tiles + 1) * 64).clamp(max=nq) + nk - nq
    length = count[0].minimum((seen + 63) // 64) if causal else count[0]
    length = length + column_count[0] // 64
    places = []  # of each program: its section, and its length, by counting through the grid
    for first in range(0, kv_heads, section):
        heads = range(first * group, min(first + section, kv_heads) * group)
        places += [(first, int(length[head, tile])) for tile in reversed(range(tiles)) for head in heads]
    started = [places[i] for i in order.tolist()]
    assert sorted(order.tolist()) == list(range(len(places)))
    assert started == sorted(places, key=lambda x: (x[0], -x[1]))
    ties = [[i for i in order.tolist() if places[i] == place] for place in set(places)]
    assert all(same == sorted(same) for same in ties), "equal rows keep the plain order"


@places("interpreter")
def test_the_order_of_programs_changes_no_result(ops, monkeypatch):
    from headstart.triton import block_lists
    from headstart.triton import sparse_attention as module

    shape = Shape(2, 4, 2, 150, 300, 64, heads_index=4, columns="own", share=0.6)
    q, k, v = (surrounded(x) for x in shape.qkv(F16))
    index = shape.random_index()
    want = judge.check(ops.sparse_attention, q, k, v, index, shape)
    monkeypatch.setattr(block_lists, "LONG_ROW", 1)
    order, longest_first = [], block_lists.longest_first
    monkeypatch.setattr(module, "longest_first", lambda *a, **o: order.append(longest_first(*a, **o)) or order[0])
    got = attend(ops.sparse_attention, q, k, v, index)
    assert order[0].tolist() != sorted(order[0].tolist())
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@places("triton")
def test_a_chunk_with_one_dense_head(ops):
    # Rows long enough to be sorted: one head lists all, the others little.
    shape = Shape(1, 8, 2, 512, 6000, 64, heads_index=8)
    lists = torch.rand(1, 8, 8, 94) < 0.05
    lists[:, 3] = True
    q, k, v = (surrounded(x) for x in shape.qkv(F16))
    judge.check(ops.sparse_attention, q, k, v, BlockIndex(*reference.compact(lists)), shape)


# --- merged results --------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("head_dim", (8, 72, 128))
def test_merge_of_two_halves_is_the_whole(ops, dtype, head_dim):
    shape = Shape(2, *heads(ops), 150, 260, head_dim, kv_start=(0, 250))
    judge.check_merge_of_halves(ops.sparse_attention, ops.merge_attention, shape, dtype)


@pytest.mark.gpu
@by_dtype
def test_merge_of_two_halves_on_a_gpu(gpu, dtype):
    """With the kernels that a user's call reaches there."""
    attention, merge = (on_gpu(torch_operator(name), name) for name in ("sparse_attention", "merge_attention"))
    judge.check_merge_of_halves(attention, merge, Shape(1, 4, 2, 256, 260, 128), dtype)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_bad_index_is_named(ops):
    q = torch.randn(1, 1, 70, 64)
    index = torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    said = r"sparse_attention: block_count: expected 2 query blocks .* got 1"
    with pytest.raises((ValueError, RuntimeError), match=said):
        ops.sparse_attention(q, q, q, *index)

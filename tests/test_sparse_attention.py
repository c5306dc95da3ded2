"""Sparse attention and the merge of two results: every tier's numbers against float64."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import headstart
import shapes
from exact import by_torch, dense_mask
from headstart import BlockIndex, _library
from headstart.reference import sparse_attention as reference
from shapes import DTYPES, Shape
from tolerances import FLOOR, assert_close, error

NAN, INF = math.nan, math.inf
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def by_shape(cases):
    return pytest.mark.parametrize("shape", cases, ids=str)


def poisoned(function, *like: torch.Tensor):
    """Calls a function after freeing NaNs where it is likely to allocate, so that what it does not write is seen."""
    trash = [torch.full(x.shape, NAN, dtype=d) for x in like for d in (x.dtype, torch.float32)]
    trash += [torch.full(x.shape[:3], NAN) for x in like]
    del trash
    return function()


def check(q, k, v, index, shape, scale=None, kv_start=None):
    """Runs the kernel and holds it against float64; returns what it gave."""
    start = shape.start() if kv_start is None else kv_start
    out, lse = poisoned(
        lambda: headstart.sparse_attention(
            q, k, v, index, causal=shape.causal, scale=scale, kv_start=start, window=shape.window
        ),
        q,
    )
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    mask = dense_mask(index, shape)
    exact_out, exact_lse = by_torch(q, k, v, mask, scale, torch.float64)
    # In float32, torch's own error depends on the order in which its product adds the head dims up. CPUs differ in this
    # order, and where logits are large, the errors differ by a factor of ten. The bar is the largest of a few.
    d = q.shape[-1]
    orders = [torch.arange(d), *(torch.randperm(d) for _ in range(7 if q.dtype == torch.float32 else 0))]
    by_order = [by_torch(q[..., order], k[..., order], v, mask, scale) for order in orders]
    for got, exact, results, what in zip((out, lse), (exact_out, exact_lse), zip(*by_order), ("out", "lse")):
        errors = [error(result, exact) for result in results]
        largest = max(range(len(errors)), key=lambda i, errors=errors: errors[i] if errors[i] < INF else -1)
        assert_close(got, exact, results[largest if errors[0] < INF else 0], what)
    return out, lse


# --- numbers ---------------------------------------------------------------------------------------------------------


@by_shape(shapes.ATTENTION + shapes.WINDOWED)
def test_reference_in_float64_is_the_definition(shape: Shape):
    q, k, v = shape.qkv(torch.float64)
    index = shape.random_index()
    parts = (index.block_count, index.block_index, index.column_count, index.column_index, shape.start())
    options = dict(causal=shape.causal, block_q=shape.block_q, block_k=shape.block_k, window=shape.window)
    out, lse = reference.sparse_attention(q, k, v, *parts, **options)
    exact_out, exact_lse = by_torch(q, k, v, dense_mask(index, shape))
    assert error(out, exact_out) < 1e-12 and error(lse, exact_lse) < 1e-6


@by_dtype
@by_shape(shapes.ATTENTION + shapes.WINDOWED)
def test_random_index(cpu_tier, dtype, shape: Shape):
    check(*shape.qkv(dtype), shape.random_index(), shape)


@by_shape(shapes.WINDOWED)
def test_a_window_over_every_block(cpu_tier, shape: Shape):
    check(*shape.qkv(torch.float32), shape.with_(columns="none").all_blocks(), shape)


@by_dtype
@pytest.mark.parametrize("nq, nk", ((500, 500), (130, 777), (1, 900), (4, 300)))
@pytest.mark.parametrize("window", (1, 64, 100, 256))
def test_a_window_needs_only_its_own_blocks(cpu_tier, dtype, nq, nk, window):
    """The blocks of an A-shape without sinks are all that a window of the same width reaches."""
    shape = Shape(1, 4, 2, nq, nk, 64, window=window)
    q, k, v = shape.qkv(dtype)
    got = check(q, k, v, headstart.a_shape_index(nq, nk, sink=0, local=window), shape)
    every = headstart.sparse_attention(q, k, v, shape.all_blocks(), window=window)
    assert all(torch.equal(a, b) for a, b in zip(got, every))


def test_keys_outside_every_window_are_not_read(cpu_tier):
    """Tiles and columns that no query of a row reaches hold NaN, which any use would spread."""
    for nq in (1, 3, 300):
        shape = Shape(1, 2, 1, nq, 700, 64, window=65, columns="shared")
        q, k, v = shape.qkv(torch.float32)
        edge = (700 - nq - 64) // 64 * 64  # of the tile where the first query's window begins
        index = shape.random_index(1.0)
        want = headstart.sparse_attention(q, k, v, index, window=65)
        k[:, :, :edge], v[:, :, :edge] = NAN, NAN
        for got, expected in zip(headstart.sparse_attention(q, k, v, index, window=65), want):
            assert torch.equal(got, expected) and got.isfinite().all()


@by_dtype
@pytest.mark.parametrize("padded", (False, True), ids=("whole", "padded"))
def test_index_builders(cpu_tier, dtype, padded):
    shape = Shape(2, 4, 2, 230, 300, 64, kv_start=(0, 130) if padded else None)
    q, k, v = shape.qkv(dtype)
    start = shape.start()
    for index in (
        headstart.a_shape_index(230, 300, sink=3, local=80, kv_start=start),
        headstart.vertical_slash_index(q, k, 40, 100, kv_start=start),
        headstart.block_topk_index(q, k, 2, kv_start=start),
        headstart.adaptive_block_index(q, k, 0.7, kv_start=start, block_q=128),
    ):
        check(q, k, v, index, shape)


@by_dtype
def test_every_block_is_dense_attention(cpu_tier, dtype):
    shape = Shape(1, 3, 1, 150, 150, 64)
    q, k, v = shape.qkv(dtype)
    out, _ = check(q, k, v, shape.all_blocks(), shape)
    dense = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True)
    assert error(out, dense) <= 2 * FLOOR[dtype] * float(dense.abs().max())


@by_dtype
def test_empty_rows_and_lists(cpu_tier, dtype):
    shape = Shape(1, 2, 2, 200, 200, 64, heads_index=2)
    count = torch.tensor([[[0, 1, 0, 2], [0, 0, 0, 0]]], dtype=torch.int32)
    ids = torch.tensor([0, 3], dtype=torch.int32).repeat(1, 2, 4, 1)
    columns = torch.tensor([[[0], [1]]], dtype=torch.int32), torch.tensor([[[[7]], [[150]]]], dtype=torch.int32)
    for index in (BlockIndex(count, ids), BlockIndex(count, ids, *columns), BlockIndex(count * 0, ids[..., :0])):
        out, lse = check(*shape.qkv(dtype), index, shape)
        nothing = ~dense_mask(index, shape).any(-1)
        assert nothing.any() and (out[nothing] == 0).all() and (lse[nothing] == -INF).all()


@by_dtype
@pytest.mark.parametrize("nq", (1, 16, 90))
def test_columns(cpu_tier, dtype, nq):
    """A key named by a block and by a column counts once; columns alone; more columns than fit a tile."""
    shape = Shape(1, 4, 2, nq, 300, 64)
    lists = torch.full((1, 1, shape.rows), 2, dtype=torch.int32), torch.tensor([1, 4], dtype=torch.int32)
    blocks = (lists[0], lists[1].repeat(1, 1, shape.rows, 1))
    for rows in {1, shape.rows}:
        for keys in (range(300), range(64, 128), (0, 63, 64, 127, 128, 299), range(0, 300, 2)):
            ids = torch.tensor(keys, dtype=torch.int32).repeat(1, 1, rows, 1)
            columns = torch.full((1, 1, rows), len(keys), dtype=torch.int32), ids
            check(*shape.qkv(dtype), BlockIndex(*blocks, *columns), shape)
            check(*shape.qkv(dtype), BlockIndex(blocks[0] * 0, blocks[1], *columns), shape)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values behind other strides and addresses."""
    b, h, n, d = x.shape
    offset = torch.full((x.numel() + 3,), NAN, dtype=x.dtype)[3:].view(x.shape)
    wide = torch.full((b + 1, h + 1, n + 5, d + 8), NAN, dtype=x.dtype)
    odd_rows = torch.full((b, h, n, d + 1), NAN, dtype=x.dtype)
    return {
        "heads after tokens": x.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens first": x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "misaligned storage": offset.copy_(x),
        "slice of a larger tensor": wide[1:, :h, 5:, 8:].copy_(x),
        "odd row stride": odd_rows[..., 1:].copy_(x),
    }


@by_dtype
@pytest.mark.parametrize("nq", (2, 100))
def test_strides_do_not_matter(cpu_tier, dtype, nq):
    shape = Shape(2, 4, 2, nq, 130, 72, heads_index=4, columns="own")
    q, k, v = shape.qkv(dtype)
    index = shape.random_index()
    expected = check(q, k, v, index, shape)
    for (name, lq), lk, lv in zip(layouts(q).items(), layouts(k).values(), layouts(v).values()):
        for got, want in zip(headstart.sparse_attention(lq, lk, lv, index), expected):
            assert torch.equal(got, want), name
    for part in (k[:, :1], k[:1]):  # the same keys and values for all heads, or all batches
        shared, copied = part.expand_as(k), part.expand_as(k).clone()
        pairs = zip(*(headstart.sparse_attention(q, x, x, index) for x in (shared, copied)))
        assert all(torch.equal(got, want) for got, want in pairs)


def test_index_layouts_do_not_matter(cpu_tier):
    shape = Shape(2, 4, 2, 150, 200, 16)
    q, k, v = shape.qkv(torch.float32)
    for columns in ("none", "shared", "own"):
        one = shape.with_(batch=1, columns=columns).random_index()
        parts = [t for t in (one.block_count, one.block_index, one.column_count, one.column_index) if t is not None]
        expected = headstart.sparse_attention(
            q, k, v, BlockIndex(*(t.repeat(2, 4, *[1] * (t.dim() - 2)) for t in parts))
        )
        for view in (
            lambda t: t.expand(2, 4, *t.shape[2:]),
            lambda t: t.expand(2, -1, *t.shape[2:]),
            lambda t: t.expand(1, 2, *t.shape[2:]),
            lambda t: t.repeat(2, 2, *[1] * (t.dim() - 2)).transpose(0, 1),
            lambda t: t.repeat(2, 1, *[1] * (t.dim() - 2)).mT.contiguous().mT,
            lambda t: torch.stack([t, t - 9], -1)[..., 0],
        ):
            got = headstart.sparse_attention(q, k, v, BlockIndex(*(view(t) for t in parts)))
            assert all(torch.equal(a, b) for a, b in zip(got, expected))


@by_dtype
@pytest.mark.parametrize("nq", (1, 150))
@pytest.mark.parametrize("scale", (-0.3, 0.0, 1.0, 30.0, 1e-30))
def test_scale(cpu_tier, dtype, nq, scale):
    shape = Shape(1, 4, 2, nq, 200, 64, columns="shared")
    check(*shape.qkv(dtype), shape.all_blocks(), shape, scale)
    check(*shape.qkv(dtype), shape.random_index(), shape, scale)


@by_dtype
@pytest.mark.parametrize("nq", (1, 192))
@pytest.mark.parametrize("size, scale", ((1e4, None), (1e4, 1.0), (1e4, 1e4), (3e4, -1.0), (1e-4, 1e4)))
def test_extreme_logits(cpu_tier, dtype, nq, size, scale):
    """One key far ahead of all others, at logits up to 1e13 (scores 6e9 and more): attention is that key's value."""
    shape = Shape(1, 2, 1, nq, 192, 64)
    direction = torch.randn(64).sign()
    q = (direction * size).repeat(1, 2, nq, 1).to(dtype)
    k = torch.full((1, 1, 192, 1), -1.0).index_fill(2, torch.tensor([0]), 1.0) * direction * size
    k = (k * (-1 if scale is not None and scale < 0 else 1)).to(dtype)
    v = torch.randn(1, 1, 192, 64).to(dtype)
    out, lse = headstart.sparse_attention(q, k, v, shape.all_blocks(), scale=scale)
    exact_out, exact_lse = by_torch(q, k, v, dense_mask(shape.all_blocks(), shape), scale, torch.float64)
    assert error(out, exact_out) <= FLOOR[dtype] * 4
    assert error(lse, exact_lse) <= 1e-6 * float(exact_lse.abs().max())


@by_dtype
def test_equal_extreme_logits(cpu_tier, dtype):
    """Logits of 1e9 that are all the same: the mean of the values, however large the common part."""
    shape = Shape(1, 1, 1, 192, 192, 64)
    q, k = torch.full((1, 1, 192, 64), 9999.0, dtype=dtype), torch.full((1, 1, 192, 64), 7777.0, dtype=dtype)
    check(q, k, torch.randn(1, 1, 192, 64).to(dtype), shape.all_blocks(), shape, scale=1.0)


@by_dtype
@pytest.mark.parametrize("where", ("q", "k", "v"))
@pytest.mark.parametrize("nq, token", ((1, 0), (70, 0), (70, 40), (70, 69), (150, 100)))
def test_nan_propagates(cpu_tier, dtype, where, nq, token):
    """A query whose own numbers, or those of a key that it attends, are NaN is NaN; one with neither need not be."""
    shape = Shape(1, 2, 1, nq, max(nq, 70), 64)
    inputs = dict(zip("qkv", shape.qkv(dtype)))
    index = shape.all_blocks()
    inputs[where][0, 0, token, 5] = NAN
    out, lse = headstart.sparse_attention(*inputs.values(), index)
    hit = dense_mask(index, shape)[0, :, :, token]
    if where == "q":
        hit = torch.zeros_like(hit).index_fill(1, torch.tensor([token]), True) & torch.tensor([[True], [False]])
    row = out[0] if where != "v" else out[0, :, :, 5:6]
    assert row.isnan().all(-1)[hit].all(), "a NaN was hidden"
    if where != "v":
        assert lse[0].isnan()[hit].all(), "a NaN was hidden in lse"
        assert lse[0].isfinite()[~hit].all()
        assert where == "k" or out[0][~hit].isfinite().all()


@by_dtype
def test_result_does_not_depend_on_threads(cpu_tier, dtype):
    before = torch.get_num_threads()
    try:
        for nq, nk in ((300, 300), (1, 2000), (4, 1100)):
            shape = Shape(1, 4, 2, nq, nk, 64, heads_index=4, columns="own")
            q, k, v = shape.qkv(dtype)
            index = shape.random_index()
            results = []
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                results.append(headstart.sparse_attention(q, k, v, index))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other)), (nq, nk)
    finally:
        torch.set_num_threads(before)


@by_dtype
@pytest.mark.parametrize("columns", ("none", "shared", "own"))
@pytest.mark.parametrize("window", (None, 70))
def test_decode_equals_prefill(cpu_tier, dtype, columns, window):
    shape = Shape(1, 4, 2, 600, 600, 64, columns=columns)
    q, k, v = shape.qkv(dtype)
    whole = shape.random_index(0.7)
    out, lse = headstart.sparse_attention(q, k, v, whole, window=window)
    last = [None if t is None else t[:, :, -1:] for t in (whole.column_count, whole.column_index)]
    index = BlockIndex(whole.block_count[:, :, -1:], whole.block_index[:, :, -1:], *last)
    for n in (1, 2, 4, 5, 8, 9, 24):  # 4 heads share a list: from 5 queries on by the prefill kernel
        few, few_lse = headstart.sparse_attention(q[:, :, -n:], k, v, index, window=window)
        assert error(few, out[:, :, -n:]) <= 2 * FLOOR[dtype] * max(1, float(out.abs().max())), n
        assert error(few_lse, lse[:, :, -n:]) <= 1e-5, n


@pytest.mark.parametrize("where", ("q", "kv"))
def test_offsets_past_2_to_the_31(cpu_tier, where):
    """Tokens 2^24 elements apart: a 32-bit product of position and stride would wrap. Most pages are never touched."""
    shape = Shape(1, 2, 2, 132, 132, 8)
    stride = 2**24
    try:
        far = torch.empty(132 * stride, dtype=torch.bfloat16).as_strided((1, 2, 132, 8), (0, 64, stride, 1))
    except RuntimeError as failure:
        pytest.skip(f"no address space: {failure}")
    q, k, v = shape.qkv(torch.bfloat16)
    expected = headstart.sparse_attention(q, k, v, shape.all_blocks())
    if where == "q":
        q = far.copy_(q)
    else:
        k, v = far.copy_(k), far.as_strided((1, 2, 132, 8), (0, 64, stride, 1), 1024).copy_(v)
    for nq in (132, 3):  # prefill, decode
        index = shape.with_(nq=nq).all_blocks()
        got = headstart.sparse_attention(q[:, :, -nq:], k, v, index)
        assert error(got[0], expected[0][:, :, -nq:]) < 0.02 and error(got[1], expected[1][:, :, -nq:]) < 1e-4


def test_sizes_of_zero(cpu_tier):
    for shape in (
        Shape(1, 2, 1, 0, 5, 16),
        Shape(0, 2, 1, 5, 5, 16),
        Shape(1, 2, 1, 70, 0, 16, causal=False),
        Shape(1, 2, 1, 1, 0, 16, causal=False),
    ):
        q, k, v = shape.qkv(torch.bfloat16)
        out, lse = headstart.sparse_attention(q, k, v, shape.all_blocks(), causal=shape.causal)
        assert out.shape == q.shape and (out == 0).all() and lse.shape == q.shape[:3] and (lse == -INF).all()


@pytest.mark.parametrize("nq", (1, 100))
@pytest.mark.parametrize("start", (-7, 100, 130, 2**31 - 1, -(2**31)))
def test_kv_start_outside_the_keys(cpu_tier, nq, start):
    """Before the first key is no padding; at or past the last is nothing but padding."""
    shape = Shape(1, 2, 1, nq, 100, 16, columns="shared", kv_start=(min(max(start, 0), 100),))
    check(*shape.qkv(torch.float32), shape.random_index(), shape, kv_start=torch.tensor([start], dtype=torch.int32))


def test_any_shape(cpu_tier):
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
        check(*shape.qkv(dtype), shape.random_index(), shape)

    run()


# --- merge -----------------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("head_dim", (8, 72, 128))
def test_merge_of_two_halves_is_the_whole(cpu_tier, dtype, head_dim):
    shape = Shape(2, 4, 2, 150, 260, head_dim, kv_start=(0, 250))
    q, k, v = shape.qkv(dtype)
    odd = torch.arange(5, dtype=torch.int32)
    halves = []
    for ids in (odd[0::2], odd[1::2]):
        count = torch.full((1, 1, 3), len(ids), dtype=torch.int32)
        index = BlockIndex(count, ids.repeat(1, 1, 3, 1))
        halves += headstart.sparse_attention(q, k, v, index, kv_start=shape.start())
    out, lse = poisoned(lambda: headstart.merge_attention(*halves), q)
    whole = check(q, k, v, shape.all_blocks(), shape)
    assert error(out, whole[0]) <= 2 * FLOOR[dtype] * float(whole[0].abs().max())
    assert error(lse, whole[1]) <= 1e-5


@by_dtype
def test_merge_numbers(cpu_tier, dtype):
    a, b = torch.randn(2, 2, 3, 70, 72).to(dtype)
    lse_a, lse_b = torch.randn(2, 2, 3, 70) * 20
    lse_a[:, 0], lse_b[:, 1] = -INF, -INF
    lse_b[:, 0, 5] = -INF  # neither side saw anything
    lse_a[:, 2, 3], lse_b[:, 2, 3] = 1e30, 1e30  # far beyond exp
    a = a.masked_fill((lse_a == -INF).unsqueeze(-1), 0)
    b = b.masked_fill((lse_b == -INF).unsqueeze(-1), 0)
    both = torch.stack([lse_a, lse_b]).double()
    weight = both.softmax(0).nan_to_num(0.0).unsqueeze(-1)
    exact = weight[0] * a + weight[1] * b, both.logsumexp(0)
    plain = (weight[0].to(dtype) * a + weight[1].to(dtype) * b), torch.logaddexp(lse_a, lse_b)
    near = ~(exact[1] > 1e3)
    views = a.transpose(1, 2).contiguous().transpose(1, 2), lse_a.mT.contiguous().mT, b, lse_b
    for merge in (headstart.merge_attention, reference.merge_attention):
        for inputs in ((a, lse_a, b, lse_b), views):
            out, lse = poisoned(lambda merge=merge, inputs=inputs: merge(*inputs), a)
            assert_close(lse[near], exact[1][near], plain[1][near], "lse")
            assert (lse[:, 2, 3] == 1e30).all() and (out[:, 0, 5] == 0).all() and (lse[:, 0, 5] == -INF).all()
            assert_close(out, exact[0], plain[0], f"out of {merge.__module__}")
    for broken in ((a * NAN, lse_a, b, lse_b), (a, lse_a * NAN, b, lse_b), (a, lse_a, b, lse_b * NAN)):
        assert headstart.merge_attention(*broken)[0][:, 2].isnan().all()


# --- which kernel runs -----------------------------------------------------------------------------------------------

SCRIPT = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import headstart
    from headstart import _library
    q = torch.randn(1, 2, 70, 16)
    index = headstart.block_topk_index(q, q, 1)
    out, _ = headstart.sparse_attention(q, q, q, index)
    headstart.merge_attention(out, torch.zeros(1, 2, 70), out, torch.zeros(1, 2, 70))
scores = (q @ q.mT / 4).masked_fill(~index.to_mask(70, 70), -torch.inf)
assert torch.allclose(out, scores.softmax(-1) @ q, atol=1e-5)
print(_library.cpu_tier())
for w in caught:
    if "headstart" in str(w.message):
        print("WARNED", w.category.__name__, w.message)
"""


def run_script(path: Path, **environment: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if name != "HEADSTART_ISA"}
    env |= {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()


PACKAGE = Path(headstart.__file__).parent


@pytest.mark.parametrize("wanted", ("generic", "no_such_tier", None))
def test_isa_is_chosen_by_the_environment(wanted):
    if not _library.cpu_tiers():
        pytest.skip(f"no compiled CPU kernels: {_library.cpu.error}")
    tier, *warned = run_script(PACKAGE.parent, **({} if wanted is None else {"HEADSTART_ISA": wanted}))
    assert tier == "generic" if wanted == "generic" else tier in _library.cpu_tiers()
    if wanted == "no_such_tier":
        tiers = " ".join(_library.cpu_tiers())
        words = f"headstart: HEADSTART_ISA: expected one of {tiers}, got no_such_tier; using {tier}"
        assert warned == [f"WARNED RuntimeWarning {words}"]
    else:
        assert not warned


def test_without_the_library_operators_still_run_and_say_so_once(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "headstart", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    tier, *warned = run_script(tmp_path)
    assert (
        tier == "None" and len(warned) == 1 and warned[0].startswith("WARNED RuntimeWarning headstart: the cpu kernels")
    )
    assert f"Cause: {tmp_path}/headstart/_cpu.so does not exist" in warned[0] and "Cure: run `make build`" in warned[0]

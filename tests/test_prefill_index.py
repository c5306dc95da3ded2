"""The index builders of sparse prefill: what they choose, wherever they run."""

from __future__ import annotations

import pytest
import torch

import headstart
import shapes
from backends import (
    STEMS,
    Ops,
    expect_no_wait,
    expect_same_when_replayed,
    gpu_kernel,
    interpreted,
    on_gpu,
    places,
    to_gpu,
)
from headstart.reference import prefill_index as reference
from judges import prefill_index as judge
from judges.prefill_index import INF, NAN, by_builder, by_check, by_dtype, by_shape, inputs, same
from judges.sparse_attention import by_torch, dense_mask
from shapes import Shape
from tolerances import assert_close

STEM = STEMS["prefill_index"]
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
hs = torch.ops.headstart
every_kernel = places("cpu", "interpreter", "lanes", "cuda", "triton")
all_but_triton = places("reference", "cpu", "interpreter", "lanes", "cuda")  # there, each case would compile kernels


# --- every builder chooses the best -----------------------------------------------------------------------------------

CASES = {  # and how many queries of a row are sampled
    "grouped heads": (Shape(1, 2, 1, 130, 200, 64), FLOAT16, 4),
    "float32, nothing divides": (Shape(1, 1, 1, 150, 277, 72), FLOAT32, 4),
    "two sequences, a chunk": (Shape(2, 1, 1, 70, 210, 40), BFLOAT16, 3),
    "one query": (Shape(1, 2, 2, 1, 400, 32), FLOAT16, 5),
    "a few queries": (Shape(1, 2, 2, 17, 70, 8), FLOAT32, 16),
    "large blocks": (Shape(1, 1, 1, 300, 300, 128, block_q=128, block_k=128), BFLOAT16, 4),
    "wide key blocks": (Shape(1, 1, 1, 300, 320, 16, block_k=128), FLOAT16, 2),
    "tall query blocks": (Shape(1, 1, 1, 270, 300, 16, block_q=128), FLOAT16, 33),
    "left padding": (Shape(3, 1, 1, 130, 130, 16, kv_start=(0, 70, 130)), FLOAT16, 4),
    "left padding, a chunk": (Shape(2, 1, 1, 60, 200, 16, kv_start=(64, 180)), FLOAT32, 7),
    "head dim 256": (Shape(1, 1, 1, 70, 130, 256), FLOAT16, 8),
}


@pytest.mark.parametrize("shape, dtype, samples", CASES.values(), ids=CASES)
def test_chooses_the_best(ops, shape, dtype, samples):
    q, k = inputs(shape, dtype)
    judge.check_vertical_slash(ops, shape, q, k)
    judge.check_topk(ops, shape, q, k)
    judge.check_adaptive(ops, shape, 4 * q, k)
    judge.check_adaptive(ops, shape, 4 * q, k, samples=samples)


@places("reference", "cpu", "lanes", "cuda")
@by_check
@by_dtype
@by_shape(shapes.BUILDERS)
def test_chooses_the_best_in_every_dtype(ops, check, shape, dtype):
    check(ops, shape, *inputs(shape, dtype))


@places("cuda")
@by_check
@by_dtype
@by_shape([Shape(1, 4, 2, nq, nk, d) for nq, nk, d in ((200, 200, 64), (1024, 1024, 64), (1000, 3000, 40),
                                                       (1000, 3000, 128), (1000, 3000, 256))])  # fmt: skip
def test_chooses_the_best_of_many_keys(ops, check, shape, dtype):
    check(ops, shape, *inputs(shape, dtype))


@places("cuda", "triton")
@pytest.mark.parametrize("d", [8, 72, 128, 256])
@pytest.mark.parametrize("stride", [4, 16])
def test_chooses_the_best_over_many_tiles(ops, stride, d):
    if ops.kind == "triton" and d != 72:
        pytest.skip("each compiles kernels, and the interpreter ran such")
    shape = Shape(1, 4, 2, 1100, 2300, d, kv_start=(90,))
    q, k = inputs(shape, BFLOAT16)
    judge.check_vertical_slash(ops, shape, q, k, vertical=1100, slash=700)
    judge.check_topk(ops, shape, q, k, top_k=9)
    judge.check_adaptive(ops, shape, 4 * q, k, stride=stride)


@places("reference", "cpu", "lanes", "cuda")
@pytest.mark.parametrize("head_dim", (8, 72, 136, 256))
@by_dtype
def test_head_dims(ops, head_dim, dtype):
    shape = Shape(1, 1, 1, 70, 140, head_dim)
    q, k = inputs(shape, dtype)
    judge.check_vertical_slash(ops, shape, q, k)
    judge.check_topk(ops, shape, q, k, top_k=1, sink=0, local=0)
    judge.check_adaptive(ops, shape, 4 * q, k, sink=0, local=0)
    judge.check_adaptive(ops, shape, 4 * q, k, sink=0, local=0, samples=4)


@places("reference", "cpu", "lanes", "cuda", "triton")
def test_many_keys(ops):
    """Several splits of the keys, several tiles of key blocks, and more columns than a block has threads."""
    shape = Shape(1, 2, 1, 100, 9000, 8, kv_start=(1500,))
    q, k = inputs(shape, FLOAT16)
    judge.check_vertical_slash(ops, shape, q, k, vertical=1500, slash=2000)
    judge.check_topk(ops, shape, q, k, top_k=50)


@places("reference", "cpu", "lanes", "cuda", "triton")
@pytest.mark.parametrize("stride", (4, 8, 16, 32))
def test_adaptive_over_several_tiles_and_jobs(ops, stride):
    shape = Shape(1, 2, 1, 1100, 1300, 8, kv_start=(90,))
    q, k = inputs(shape, BFLOAT16)
    judge.check_adaptive(ops, shape, 4 * q, k, stride=stride, max_blocks=12)


@places("reference", "cpu", "lanes", "cuda", "triton")
@pytest.mark.parametrize("samples, dtype", ((5, FLOAT16), (64, FLOAT32)), ids=str)
def test_sampled_adaptive_over_several_tiles_and_jobs(ops, samples, dtype):
    large = Shape(1, 1, 1, 300, 700, 24, block_q=128, block_k=128, kv_start=(170,))
    for shape in (Shape(1, 2, 1, 600, 1300, 8, kv_start=(90,)), large):
        q, k = inputs(shape, dtype)
        judge.check_adaptive(ops, shape, 4 * q, k, stride=4, samples=samples, sink=0, local=0)


@places("reference", "cpu")
@by_check
def test_any_shape(ops, check):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    size = st.sampled_from((64, 128))

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(
        st.sampled_from(((1, 1), (3, 1), (4, 2))), st.integers(1, 300), st.integers(0, 300), st.integers(1, 10),
        size, size, st.none() | st.integers(0, 600), st.sampled_from((0.25, 1.0)), st.integers(0, 2**16),
    )  # fmt: skip
    def run(heads, nq, more, dims, block_q, block_k, start, sharpness, seed):
        torch.manual_seed(seed)
        start = None if start is None else (min(start, nq + more),)
        shape = Shape(1, *heads, nq, nq + more, 8 * dims, 1, block_q, block_k, kv_start=start)
        q, k, _ = shape.qkv(FLOAT32)
        check(ops, shape, sharpness * q, k)

    run()


# --- options ----------------------------------------------------------------------------------------------------------

SMALL = Shape(1, 1, 1, 200, 300, 24), Shape(1, 1, 1, 130, 210, 24, kv_start=(70,))
VERTICAL_SLASH = (
    dict(vertical=1, slash=1, sink=0, local=0),
    dict(vertical=10**5, slash=10**5),
    dict(last_q=1, sink=0, local=1),
    dict(last_q=150, sink=0, local=1),
    dict(last_q=10**4, local=0),
    dict(last_q=10**4, local=0, scale=-0.2),
    dict(vertical=100, slash=400, max_blocks=2, max_columns=11, sink=4, local=1),
    dict(scale=-3.0, sink=0, local=0),  # the largest weight belongs to the smallest product
    dict(sink=10**6, local=10**6),
)
TOP_K = tuple(dict(top_k=n, sink=a, local=b) for n, a, b in ((1, 0, 0), (2, 100, 100), (10**6, 0, 0), (3, 0, 200)))
ADAPTIVE = (
    dict(threshold=1e-6, sink=0, local=0),
    dict(threshold=1.0),
    dict(stride=4, threshold=0.5, sink=0, local=0),
    dict(stride=32, threshold=0.6, sink=100, local=70),
    dict(stride=16, threshold=0.99, max_blocks=2),
    dict(stride=16, threshold=0.95, max_blocks=2),
    dict(max_blocks=1, sink=70, local=70),
    dict(scale=-0.1, threshold=0.7),
    dict(scale=-3.0, threshold=0.7),
    dict(scale=0.0, threshold=0.7, sink=0, local=0),
    dict(samples=1, stride=32, threshold=0.9),
    dict(samples=2, scale=0.0, threshold=0.7),
    dict(samples=3, scale=-3.0),
    dict(samples=4, stride=16, threshold=0.7, sink=0, local=0),
    dict(samples=4, scale=-3.0, threshold=0.6, sink=0, local=0),
    dict(samples=4, scale=0.0, threshold=0.7, sink=0, local=0),
    dict(samples=5, stride=4, threshold=0.5, max_blocks=3),
    dict(samples=64, threshold=0.8, scale=-0.3),
)
MORE_VERTICAL_SLASH = (
    dict(vertical=1, slash=1),
    dict(vertical=100, slash=400, max_blocks=2, max_columns=11, last_q=150),
    dict(vertical=100, slash=400, max_blocks=1, max_columns=5),
    dict(scale=2.0, sink=0, local=0),
    dict(scale=-0.2, sink=0, local=0),
    dict(scale=-0.5, sink=0, local=0),
    dict(scale=0.0, sink=0, local=0),
)
MORE_TOP_K = dict(top_k=1, sink=1, local=1), dict(top_k=4, sink=65, local=0)
MORE_ADAPTIVE = dict(stride=16, threshold=0.95), dict(scale=-0.5), dict(max_blocks=10**6, scale=1.5)


def with_patterns(vertical_slash, top_k, adaptive) -> list[tuple[str, dict]]:
    by_pattern = {"vertical-slash": vertical_slash, "block top-k": top_k, "adaptive": adaptive}
    return [(pattern, options) for pattern, several in by_pattern.items() for options in several]


OPTIONS = with_patterns(VERTICAL_SLASH, TOP_K, ADAPTIVE)
MORE = with_patterns(MORE_VERTICAL_SLASH, MORE_TOP_K, MORE_ADAPTIVE)


@all_but_triton
@pytest.mark.parametrize("pattern, options", OPTIONS, ids=str)
def test_options(ops, pattern, options):
    """Each with one shape and one dtype, in turns."""
    turn = OPTIONS.index((pattern, options))
    shape, dtype = SMALL[turn % 2], shapes.DTYPES[turn % 3]
    judge.CHECKS[pattern](ops, shape, *inputs(shape, dtype), **options)


@places("cpu", "cuda")
@by_shape(shapes.BUILDERS[:3] + shapes.BUILDERS[5:6] + shapes.BUILDERS[-2:])
@pytest.mark.parametrize("pattern, options", OPTIONS + MORE, ids=str)
def test_options_of_larger_shapes(ops, pattern, shape, options):
    judge.CHECKS[pattern](ops, shape, *inputs(shape), **options)


@places("cpu", "cuda")
@by_dtype
@by_shape(shapes.BUILDERS)
def test_adaptive_options_in_every_dtype(ops, shape, dtype):
    q, k = inputs(shape, dtype)
    for samples in (1, 33):
        judge.check_adaptive(ops, shape, 4 * q, k, samples=samples)
    thresholds = 1 - torch.rand(shape.heads_q)
    judge.check_adaptive(ops, shape, 4 * q, k, stride=16, max_blocks=2, head_threshold=thresholds)
    judge.check_adaptive(ops, shape, 4 * q, k, stride=32, max_blocks=2)


@all_but_triton
def test_adaptive_threshold_per_head(ops):
    shape = Shape(2, 4, 2, 300, 400, 32, kv_start=(0, 90))
    if ops.kind == "interpreter":
        shape = Shape(1, 4, 2, 60, 210, 32, kv_start=(20,))
    q, k = inputs(shape)
    thresholds = torch.tensor([0.2, 0.9, 1.0, 0.5])
    judge.check_adaptive(ops, shape, 3 * q, k, head_threshold=thresholds)
    wide = torch.stack([thresholds, -thresholds], 1)[:, 0]  # any stride
    judge.check_adaptive(ops, shape, 3 * q, k, head_threshold=wide)


@places("reference", "interpreter", "lanes", "cuda")
def test_a_threshold_of_nothing_leaves_the_forced_blocks(ops):
    """Where the values of `head_threshold` are not looked at (`_cpu.so` refuses 0)."""
    q, k = inputs(Shape(1, 2, 1, 60, 210, 32), FLOAT16)
    index = judge.built(ops.adaptive_block_index, q, k, head_threshold=torch.zeros(2))
    forced = headstart.a_shape_index(60, 210, sink=1, local=1)
    assert torch.equal(index.block_count, forced.block_count.expand(1, 2, -1))


# --- what was planted is found ----------------------------------------------------------------------------------------


def test_one_column_and_one_diagonal(ops):
    """Key 37 draws every query, and every query the key 200 before it: they are found, whatever the rest is."""
    n, d, column, offset = 640, 128, 37, 200
    code = torch.randn(n, d).sign()
    everyone = torch.randn(d).sign()
    q = 0.5 * everyone + code.roll(offset, 0)
    k = code.clone()
    k[column] = 2 * everyone
    q, k, shape = q[None, None], k[None, None], Shape(1, 1, 1, n, n, d)
    index = judge.built(ops.vertical_slash_index, q, k, 1, 64, sink=0, local=0)
    assert index.column_count.tolist() == [[[1]]] and index.column_index.tolist() == [[[[column]]]]
    blocks = judge.selected_blocks(index, shape)[0, 0]
    band = offset // 64  # offset 200 lies in bands 3 and 4, mostly in 3
    for r in range(10):
        assert blocks[r].nonzero().flatten().tolist() == ([r - band] if r >= band else [])
    index = judge.built(ops.vertical_slash_index, q, k, 1, 128, sink=0, local=1)
    row = judge.selected_blocks(index, shape)[0, 0, 9].nonzero().flatten().tolist()
    assert row == [9 - band, 9]


@pytest.mark.parametrize("top_k", (1, 3, 5))
def test_block_topk_is_minference(ops, top_k):
    """Algorithm 2 of the paper: pool, multiply, mask, top-k."""
    q, k = torch.randn(2, 1, 2, 512, 64)
    index = judge.built(ops.block_topk_index, q, k, top_k, sink=0, local=0)
    estimate = (q.double().unflatten(2, (8, 64)).mean(3) @ k.double().unflatten(2, (8, 64)).mean(3).mT) / 8
    estimate = estimate.masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -INF).softmax(-1)
    for h in range(2):
        for r in range(8):
            best = estimate[0, h, r].topk(min(top_k, r + 1)).indices.sort().values.tolist()
            assert index.block_index[0, h, r, : int(index.block_count[0, h, r])].tolist() == best


def test_a_sampled_query_finds_what_groups_blur(ops):
    """One key that one sampled query attends alone: its group's mean over 16 other keys hardly meets it."""
    shape = Shape(1, 1, 1, 256, 1024, 64)
    q, k = inputs(shape, FLOAT16)
    q[:, :, 207] = 8 * k[:, :, 333].sign()  # the first of four samples of the last row
    assert judge.sampled_shares(shape, q, k, 4, shape.head_dim**-0.5)[0, 0, 3, 0, 333 // 64] > 0.99
    given = dict(sink=0, local=0, stride=16, samples=4)
    index = judge.built(ops.adaptive_block_index, q, k, 0.1, **given)
    assert index.block_index[0, 0, 3, : int(index.block_count[0, 0, 3])].tolist() == [5]
    judge.check_adaptive(ops, shape, q, k, 0.1, **given)


def test_logits_of_150(ops):
    """Far past what exp holds in float32, both ways: the maximum is subtracted first."""
    shape = Shape(1, 1, 1, 200, 200, 64)
    q, k = (x.sign() for x in inputs(shape, FLOAT16))
    q[:, :, -40:] = k[:, :, 60:100]  # each of the last queries agrees with one key: 64, against about ±8
    scale = 150 / 64
    assert float((q[0, 0].double() @ k[0, 0].double().mT).max()) * scale == 150
    given = dict(last_q=40, sink=0, local=0, scale=scale)
    judge.check_vertical_slash(ops, shape, q, k, vertical=40, slash=64, **given)
    columns = judge.built(ops.vertical_slash_index, q, k, 40, 64, **given).column_index
    assert columns[0, 0, 0].tolist() == list(range(60, 100))
    judge.check_adaptive(ops, shape, q, k, scale=8 * scale, stride=8)
    judge.check_adaptive(ops, shape, -q, k, scale=8 * scale, stride=8)
    judge.check_adaptive(ops, shape, q, k, scale=scale, samples=32)


# --- ties -------------------------------------------------------------------------------------------------------------


@by_builder
def test_equal_scores_choose_the_lower_id(ops, build):
    q, k = torch.zeros(1, 1, 640, 8), torch.randn(1, 1, 640, 8)
    index = build(ops, q, k, sink=0, local=0)
    if index.column_count is not None:  # all columns and bands weigh the same only by their number of queries
        return
    for r in range(10):
        row = index.block_index[0, 0, r, : int(index.block_count[0, 0, r])].tolist()
        assert row == list(range(len(row)))


@every_kernel
@pytest.mark.parametrize("top_k, local, dtype", [(1, 0, FLOAT32), (4, 0, BFLOAT16), (5, 64, FLOAT16), (9, 0, FLOAT32)])
def test_equal_means_choose_the_lower_id(ops, top_k, local, dtype):
    """Whole numbers, alike within a block: means and scores are exact, many tie, and the choice is the reference's."""
    q, k = (torch.randint(-1, 2, (1, 2, blocks, 8)).repeat_interleave(64, 2).to(dtype) for blocks in (6, 13))
    q, k = q[:, :, :350], k[:, :, :800]
    given = dict(sink=0, local=local, kv_start=None, block_q=64, block_k=64)
    count, ids = reference.block_topk_index(q, k, top_k, **given)
    got = judge.built(ops.block_topk_index, q, k, top_k, **given)
    assert torch.equal(got.block_count, count) and torch.equal(got.block_index, ids)


# --- what does not matter, and what is not finite ---------------------------------------------------------------------


@every_kernel
@by_builder
def test_strides_do_not_matter(ops, build):
    slow = {"interpreter": Shape(1, 2, 2, 20, 70, 24), "lanes": Shape(2, 4, 2, 66, 70, 24)}
    shape = slow.get(ops.kind, Shape(2, 4, 2, 200, 300, 24))
    for dtype in (BFLOAT16,) if ops.kind in slow else shapes.DTYPES:
        q, k, _ = shape.qkv(dtype)
        expected = build(ops, q, k)
        permuted = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
        odd = [torch.full((*x.shape[:3], 25), NAN, dtype=dtype)[..., 1:].copy_(x) for x in (q, k)]
        assert same(build(ops, *permuted), expected) and same(build(ops, *odd), expected)
        one = k[:, :1].expand_as(k)
        assert same(build(ops, q, one), build(ops, q, one.clone()))


@places("cpu")
@by_builder
@by_dtype
def test_threads_do_not_matter(ops, build, dtype):
    q, k, _ = Shape(2, 4, 2, 200, 300, 24).qkv(dtype)
    expected = build(ops, q, k)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same(build(ops, q, k), expected), threads
    finally:
        torch.set_num_threads(before)


@every_kernel
@by_builder
def test_kv_start_outside_the_keys(ops, build):
    """Before the first key is no padding; at or past the last is nothing but padding."""
    starts = torch.tensor([-50, 130, 131, 1000, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    shape = Shape(7, 1, 1, 20, 130, 16) if ops.kind == "interpreter" else Shape(7, 2, 1, 70, 130, 16)
    q, k, _ = shape.qkv(FLOAT32)
    expected = build(ops, q, k, kv_start=starts.clamp(0, 130))
    assert same(build(ops, q, k, kv_start=starts), expected)


@every_kernel
@by_builder
@pytest.mark.parametrize("where", ("q", "k"))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_inf_give_a_valid_index(ops, build, where):
    """Nonsense in, some index out: ids ascend and lie inside the keys, so that attention can show the NaN."""
    shape = Shape(3, 1, 1, 20, 130, 8) if ops.kind == "interpreter" else Shape(3, 2, 1, 300, 300, 8)
    for share in (0.01,) if ops.kind == "interpreter" else (0.01, 1.0):
        check_not_finite(ops, build, where, shape, share)


@places("cpu", "cuda")
@by_builder
@pytest.mark.parametrize("where", ("q", "k"))
@pytest.mark.parametrize("share", (0.0005, 0.05, 1.0))
def test_nan_and_inf_among_many_keys_give_a_valid_index(ops, build, where, share):
    check_not_finite(ops, build, where, Shape(3, 2, 1, 2100, 2100, 8), share)


def check_not_finite(ops, build, where, shape, share):
    given = dict(zip("qk", inputs(shape)))
    for sequence, value in zip(given[where], (NAN, INF, -INF)):
        sequence.masked_fill_(torch.rand_like(sequence) < share, value)
    judge.chosen(build(ops, **given), shape)


# --- the lane model's registers ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fragments_are_those_of_the_ptx_isa():
    from lane_model.prefill_index import fragment_layout

    a, b, c = fragment_layout()
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):  # the ISA's a0 ... a7
            row = group if i in (0, 1, 4, 5) else group + 8
            column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
            assert a[lane, i // 2, i % 2].tolist() == [row, column]
        for i in range(4):
            assert b[lane, i // 2, i % 2].tolist() == [thread * 2 + (i & 1) + (0 if i < 2 else 8), group]
            assert c[lane, i].tolist() == [group if i < 2 else group + 8, thread * 2 + (i & 1)]


# --- Triton's kernels alone -------------------------------------------------------------------------------------------


@places("interpreter")
def test_heads_taken_in_turns_by_a_small_workspace(ops, monkeypatch):
    from headstart.triton import prefill_index as module

    q, k = inputs(Shape(1, 3, 1, 70, 130, 16), FLOAT16)
    whole = judge.built(ops.adaptive_block_index, q, k)
    monkeypatch.setattr(module, "WORKSPACE", 4 * 9 * 3 * 2)  # two heads of 9 query groups and 3 blocks
    assert same(judge.built(ops.adaptive_block_index, q, k), whole)


@interpreted
@pytest.mark.parametrize("samples", (3, 64))
def test_sampled_shares_alone(interpreter, poisoned, samples):
    """Joined to a mass of nothing, the kernel leaves the reference's shares; where a row sees no block, the mass."""
    from headstart.triton.prefill_index import _join_sampled_shares

    shape = Shape(2, 2, 1, 200, 300, 24, block_k=128, kv_start=(0, 230))
    q, k = inputs(shape)
    mass = torch.full((2, 2, shape.rows, shape.blocks), -1.0)
    _join_sampled_shares(mass, q, k, samples, shape.start(), None, shape.block_q, shape.block_k)
    given = dict(kv_start=shape.start(), scale=shape.head_dim**-0.5, block_q=shape.block_q, block_k=shape.block_k)
    shares = reference.sampled_shares(q, k, samples, **given).amax(-2)
    seen = judge.any_in_block(judge.visible_keys(shape), shape).expand_as(mass)
    assert (mass[~seen] == -1).all()
    torch.testing.assert_close(mass[seen], shares[seen], atol=2e-6, rtol=2e-5)


@pytest.fixture(params=[pytest.param("interpreter", marks=interpreted), pytest.param("gpu", marks=pytest.mark.gpu)])
def select(request):
    """Triton's selection, of scores on the CPU."""
    request.getfixturevalue(request.param)
    from headstart.triton.block_select import select

    if request.param == "gpu":
        return on_gpu(select, "select")
    request.getfixturevalue("poisoned")
    return select


@pytest.mark.parametrize("entries", (1, 7, 64, 300, 2500, 9000))
@pytest.mark.parametrize("room", (0.0, 0.1, 0.5, 1.0))
def test_top_k_of_scores_that_tie(select, entries, room):
    judge.check_top_k_of_scores_that_tie(select, (1, 2), entries, max(1, round(room * entries)))


@pytest.mark.gpu
@pytest.mark.parametrize("entries, capacity", [(50, 9), (2048, 300), (2048, 2048), (131072, 1000)])
def test_top_k_of_many_scores_that_tie(gpu, entries, capacity):
    from headstart.triton.block_select import select

    judge.check_top_k_of_scores_that_tie(on_gpu(select, "select"), (2, 3), entries, capacity)


@pytest.mark.parametrize("entries", (200, 3000))
@pytest.mark.parametrize("share", (0.3, 0.5, 1.0))
@pytest.mark.parametrize("room", (0.2, 1.0))
def test_share_of_masses_that_tie(select, entries, share, room):
    judge.check_share_of_masses_that_tie(select, entries, share, max(1, round(room * entries)))


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@places("cuda", "triton")
@by_builder
@pytest.mark.parametrize("n", [4096, 32768])
def test_long_inputs_give_the_index_of_the_cpu(ops, build, n):
    shape = Shape(1, 4, 2, n, n, 64)
    q, k, _ = shape.qkv(FLOAT32)
    got, want = build(ops, q, k), build(hs, q, k)
    assert same(build(ops, q, k), got), "the same input gives another index"
    for a, b in zip(judge.chosen(got, shape), judge.chosen(want, shape), strict=True):
        # A near tie between two scores may fall either way.
        assert float((a != b).sum() / b.sum()) < 0.005


@places("cuda", "triton")
@by_builder
def test_the_same_input_gives_the_same_index(ops, build):
    q, k = inputs(Shape(1, 4, 2, 2000, 2000, 128), BFLOAT16)
    first = build(ops, q, k)
    assert all(same(build(ops, q, k), first) for _ in range(5))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cuda", "triton"])
@by_builder
def test_in_a_cuda_graph(gpu, kind, build):
    operators = Ops(kind, {name: gpu_kernel(name, kind) for name in STEM.operators})
    q, k = (torch.randn(1, heads, 700, 64, dtype=BFLOAT16, device="cuda") for heads in (4, 2))

    def step():
        return judge.tensors(build(operators, q, k))

    def change():
        q.normal_()
        k.normal_()

    step()
    expect_no_wait(step)
    expect_same_when_replayed(step, change)


@pytest.mark.gpu
@by_builder
def test_attention_of_an_index_on_a_gpu(gpu, build):
    """Index and attention, one after the other, without waiting for the GPU."""
    shape = Shape(1, 4, 2, 500, 500, 128)
    q, k, v = (to_gpu(x) for x in (*inputs(shape, BFLOAT16), shape.qkv(BFLOAT16)[2]))

    def step():
        index = build(hs, q, k)
        results = headstart.sparse_attention(q, k, v, index)
        headstart.merge_attention(*results, *results)
        return index, results

    index, results = step()
    assert all(x.is_cuda and x.dtype == torch.int32 for x in judge.tensors(index))
    mask, on_cpu = dense_mask(index.to("cpu"), shape), [x.cpu() for x in (q, k, v)]
    exact, plain = by_torch(*on_cpu, mask, dtype=torch.float64), by_torch(*on_cpu, mask)
    for result, *bar, what in zip(results, exact, plain, ("out", "lse")):
        assert_close(result.cpu(), *bar, what)
    expect_no_wait(step)

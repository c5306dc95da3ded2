"""The Triton kernels of the index builders, without a GPU: their choices through the interpreter, held to the truth of
`test_prefill_index.py`, and their machine code for sm_80 and sm_90.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import headstart
import test_prefill_index as truth
from headstart import _library
from headstart.reference import prefill_index as reference
from headstart.reference.sparse_attention import compact
from shapes import Shape
from triton_testing import (
    SHARED_MEMORY,
    compile_launch,
    compiled,
    interpreted,
    resources,
    run_in_the_interpreter,
    surrounded,
)

pytest.importorskip("triton", reason="triton is not installed")
OPERATORS = ("vertical_slash_index", "block_topk_index", "adaptive_block_index")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
INF = math.inf


@compiled
@pytest.mark.slow
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture
def kernels(interpreter, poisoned):
    from headstart.triton import block_select, prefill_index

    return prefill_index, block_select


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch, kernels):
    """`headstart.*_index` call the Triton kernels, interpreted."""
    from headstart.ops import prefill_index as ops

    for name in OPERATORS:
        monkeypatch.setattr(ops, f"_{name}", _library.triton_kernels[name])


def inputs(shape: Shape, dtype: torch.dtype = FLOAT16) -> list[torch.Tensor]:
    """q and k between NaN tokens."""
    heads = (shape.heads_q, shape.nq), (shape.heads_kv, shape.nk)
    return [surrounded(shape.batch, h, n, shape.head_dim, dtype=dtype) for h, n in heads]


# --- choices ---------------------------------------------------------------------------------------------------------

SHAPES = {
    "grouped heads": (Shape(1, 2, 1, 130, 200, 64), FLOAT16),
    "float32, nothing divides": (Shape(1, 1, 1, 150, 277, 72), FLOAT32),
    "two sequences, a chunk": (Shape(2, 1, 1, 70, 210, 40), BFLOAT16),
    "one query": (Shape(1, 2, 2, 1, 400, 32), FLOAT16),
    "a few queries": (Shape(1, 2, 2, 17, 70, 8), FLOAT32),
    "large blocks": (Shape(1, 1, 1, 300, 300, 128, block_q=128, block_k=128), BFLOAT16),
    "wide key blocks": (Shape(1, 1, 1, 300, 320, 16, block_k=128), FLOAT16),
    "tall query blocks": (Shape(1, 1, 1, 270, 300, 16, block_q=128), FLOAT16),
    "left padding": (Shape(3, 1, 1, 130, 130, 16, kv_start=(0, 70, 130)), FLOAT16),
    "left padding, a chunk": (Shape(2, 1, 1, 60, 200, 16, kv_start=(64, 180)), FLOAT32),
    "head dim 256": (Shape(1, 1, 1, 70, 130, 256), FLOAT16),
}
SAMPLES = (4, 4, 3, 5, 16, 4, 2, 33, 4, 7, 8)  # for each of the shapes
by_case = pytest.mark.parametrize("shape, dtype", SHAPES.values(), ids=SHAPES.keys())
PLAIN = Shape(1, 1, 1, 200, 300, 24)
PADDED = Shape(1, 1, 1, 130, 210, 24, kv_start=(70,))


def by_options(options):
    """Each with one shape, in turns."""
    return pytest.mark.parametrize("options, shape", list(zip(options, itertools.cycle((PLAIN, PADDED)))), ids=str)


@interpreted
@by_case
def test_vertical_slash(shape, dtype, builders):
    truth.check_vertical_slash(shape, *inputs(shape, dtype))


@interpreted
@pytest.mark.parametrize("shape, dtype", list(SHAPES.values())[1::3], ids=list(SHAPES)[1::3])
def test_block_topk(shape, dtype, builders):
    truth.check_topk(shape, *inputs(shape, dtype))


@interpreted
@by_case
def test_adaptive(shape, dtype, builders):
    q, k = inputs(shape, dtype)
    truth.check_adaptive(shape, 4 * q, k)


@interpreted
@by_options(
    (
        dict(vertical=10**5, slash=10**5),
        dict(last_q=1, sink=0, local=1),
        dict(last_q=10**4, local=0),
        dict(vertical=100, slash=400, max_blocks=2, max_columns=11, sink=4, local=1),
        dict(scale=-3.0, sink=0, local=0),
        dict(sink=10**6, local=10**6),
    )
)
def test_vertical_slash_options(options, shape, builders):
    truth.check_vertical_slash(shape, *inputs(shape, FLOAT32), **options)


@interpreted
@by_options(((1, 0, 0), (2, 100, 100), (10**6, 0, 0), (3, 0, 200)))
def test_block_topk_options(options, shape, builders):
    top_k, sink, local = options
    truth.check_topk(shape, *inputs(shape, FLOAT32), top_k, sink, local)


@interpreted
@by_options(
    (
        dict(threshold=1e-6, sink=0, local=0),
        dict(threshold=1.0),
        dict(stride=4, threshold=0.5, sink=0, local=0),
        dict(stride=32, threshold=0.6, sink=100, local=70),
        dict(stride=16, max_blocks=2, threshold=0.99),
        dict(max_blocks=1, sink=70, local=70),
        dict(scale=-3.0, threshold=0.7),
        dict(scale=0.0, threshold=0.7, sink=0, local=0),
    )
)
def test_adaptive_options(options, shape, builders):
    q, k = inputs(shape, FLOAT32)
    truth.check_adaptive(shape, 4 * q, k, **options)


@interpreted
@pytest.mark.parametrize("shape, dtype, samples", [(*case, n) for case, n in zip(SHAPES.values(), SAMPLES)],
                         ids=[f"{name}, {n} samples" for name, n in zip(SHAPES, SAMPLES)])  # fmt: skip
def test_adaptive_sampled(shape, dtype, samples, builders):
    q, k = inputs(shape, dtype)
    truth.check_adaptive(shape, 4 * q, k, samples=samples)


@interpreted
@by_options(
    (
        dict(samples=1, stride=32, threshold=0.9),
        dict(samples=4, stride=16, threshold=0.7, sink=0, local=0),
        dict(samples=5, stride=4, threshold=0.5, max_blocks=3),
        dict(samples=64, threshold=0.8, scale=-0.3),
        dict(samples=3, scale=-3.0),
        dict(samples=4, scale=-3.0, threshold=0.6, sink=0, local=0),
        dict(samples=4, scale=0.0, threshold=0.7, sink=0, local=0),
        dict(samples=2, scale=0.0, threshold=0.7),
    )
)
def test_adaptive_sampled_options(options, shape, builders):
    q, k = inputs(shape, FLOAT32)
    truth.check_adaptive(shape, 4 * q, k, **options)


@interpreted
def test_a_sampled_query_finds_what_groups_blur(builders):
    """One key that one sampled query attends alone: its group's mean over 16 other keys hardly meets it."""
    shape = Shape(1, 1, 1, 256, 1024, 64)
    q, k = inputs(shape)
    q[:, :, 207] = 8 * k[:, :, 333].sign()  # the first of four samples of the last row
    assert shares(q, k, shape, 4)[0, 0, 3, 0, 333 // 64] > 0.99
    given = dict(sink=0, local=0, stride=16)
    index = headstart.adaptive_block_index(q, k, 0.1, samples=4, **given)
    assert index.block_index[0, 0, 3, : int(index.block_count[0, 0, 3])].tolist() == [5]
    truth.check_adaptive(shape, q, k, 0.1, samples=4, **given)


def shares(q, k, shape: Shape, samples: int) -> torch.Tensor:
    given = dict(kv_start=shape.start(), scale=shape.head_dim**-0.5, block_q=shape.block_q, block_k=shape.block_k)
    return reference.sampled_shares(q, k, samples, **given)


@interpreted
@pytest.mark.parametrize("samples", (3, 64))
def test_sampled_shares_alone(samples, kernels):
    """Joined to a mass of nothing, the kernel leaves the reference's shares; where a row sees no block, the mass."""
    shape = Shape(2, 2, 1, 200, 300, 24, block_k=128, kv_start=(0, 230))
    q, k = inputs(shape, FLOAT32)
    mass = torch.full((2, 2, shape.rows, shape.blocks), -1.0)
    kernels[0]._join_sampled_shares(mass, q, k, samples, shape.start(), None, shape.block_q, shape.block_k)
    seen = truth.any_in_block(truth.visible_keys(shape), shape).expand_as(mass)
    assert (mass[~seen] == -1).all()
    torch.testing.assert_close(mass[seen], shares(q, k, shape, samples).amax(-2)[seen], atol=2e-6, rtol=2e-5)


@interpreted
def test_adaptive_threshold_per_head(builders):
    shape = Shape(1, 2, 1, 60, 210, 32, kv_start=(20,))
    q, k = inputs(shape)
    thresholds = torch.tensor([0.4, 0.9])
    wide = torch.stack([thresholds, -thresholds], 1)[:, 0]  # any stride
    truth.check_adaptive(shape, 3 * q, k, head_threshold=wide)
    index = headstart.adaptive_block_index(q, k, head_threshold=torch.zeros(2))
    forced = headstart.a_shape_index(60, 210, sink=1, local=1)
    assert torch.equal(index.block_count, forced.block_count.expand(1, 2, -1))


@interpreted
def test_logits_of_150(builders):
    """Far past what exp holds in float32, both ways: the maximum is subtracted first."""
    shape = Shape(1, 1, 1, 200, 200, 64)
    q, k = (x.sign() for x in inputs(shape))
    q[:, :, -40:] = k[:, :, 60:100]  # each of the last queries agrees with one key: 64, against about ±8
    scale = 150 / 64
    assert float((q[0, 0].double() @ k[0, 0].double().mT).max()) * scale == 150
    given = dict(last_q=40, sink=0, local=0, scale=scale)
    truth.check_vertical_slash(shape, q, k, vertical=40, slash=64, **given)
    columns = headstart.vertical_slash_index(q, k, 40, 64, **given).column_index
    assert columns[0, 0, 0].tolist() == list(range(60, 100))
    truth.check_adaptive(shape, q, k, scale=8 * scale, stride=8)
    truth.check_adaptive(shape, -q, k, scale=8 * scale, stride=8)
    truth.check_adaptive(shape, q, k, scale=scale, samples=32)


@interpreted
def test_heads_taken_in_turns_by_a_small_workspace(builders, kernels, monkeypatch):
    q, k = inputs(Shape(1, 3, 1, 70, 130, 16))
    whole = headstart.adaptive_block_index(q, k)
    monkeypatch.setattr(kernels[0], "WORKSPACE", 4 * 9 * 3 * 2)  # two heads of 9 query groups and 3 blocks
    assert truth.same(headstart.adaptive_block_index(q, k), whole)


@interpreted
@truth.by_builder
def test_strides_do_not_matter(build, builders):
    q, k = inputs(Shape(1, 1, 1, 66, 70, 24))
    expected = build(q, k)
    permuted = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    odd = [torch.full((*x.shape[:3], 25), math.nan, dtype=x.dtype)[..., 1:].copy_(x) for x in (q, k)]
    assert truth.same(build(*permuted), expected) and truth.same(build(*odd), expected)


@interpreted
@truth.by_builder
@pytest.mark.parametrize("start", (-50, 2**31 - 1))
def test_kv_start_outside_the_keys(build, start, builders):
    q, k = inputs(Shape(1, 1, 1, 70, 130, 16))
    near = torch.tensor([min(max(start, 0), 130)], dtype=torch.int32)
    assert truth.same(build(q, k, kv_start=near * 0 + start), build(q, k, kv_start=near))


@interpreted
@truth.by_builder
@pytest.mark.parametrize("value, share", ((math.nan, 0.01), (-INF, 0.01)))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_inf_give_a_valid_index(build, value, share, builders):
    shape = Shape(1, 1, 1, 70, 130, 8)
    q, k = (x.clone() for x in inputs(shape, FLOAT32))
    k.masked_fill_(torch.rand_like(k) < share, value)
    index = build(q, k)
    truth.selected_blocks(index, shape)
    if index.column_count is not None:
        truth.listed(index.column_count, index.column_index, shape.nk)


@interpreted
def test_equal_means_choose_the_lower_id(builders):
    """Whole numbers, alike within a block: means and scores are exact, many tie, and the choice is the reference's."""
    q, k = (torch.randint(-1, 2, (1, 2, n, 1, 8)).expand(-1, -1, -1, 64, -1).flatten(2, 3).half() for n in (3, 12))
    index = headstart.block_topk_index(q, k, 5, sink=0, local=64)
    expected = reference.block_topk_index(q, k, 5, sink=0, local=64, kv_start=None, block_q=64, block_k=64)
    assert torch.equal(index.block_count, expected[0]) and torch.equal(index.block_index, expected[1])


# --- the selection alone ---------------------------------------------------------------------------------------------


def every_entry(entries: int) -> dict:
    """One row that sees all entries and is forced to none, as for columns."""
    return dict(nq=entries, nk=entries, block_q=entries, block_k=1)


@interpreted
@pytest.mark.parametrize("entries", (1, 7, 64, 300, 2500, 9000))
@pytest.mark.parametrize("room", (0.0, 0.1, 0.5, 1.0))
def test_top_k_of_scores_that_tie(entries, room, kernels):
    scores = torch.randint(-3, 4, (1, 2, 1, entries)) * 0.5
    scores = scores.masked_fill(torch.rand(scores.shape) < 0.2, -INF).masked_fill(torch.rand(scores.shape) < 0.05, INF)
    scores[scores == 0] *= torch.randint(0, 2, (int((scores == 0).sum()),)) * 2 - 1.0  # -0 and 0 are one value
    capacity = max(1, round(room * entries))
    got = kernels[1].select(scores, capacity, **every_entry(entries))
    expected = compact(reference.keep_best(scores, capacity), capacity)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@interpreted
@pytest.mark.parametrize("entries", (200, 3000))
@pytest.mark.parametrize("share", (0.3, 0.5, 1.0))
@pytest.mark.parametrize("room", (0.2, 1.0))
def test_share_of_masses_that_tie(entries, share, room, kernels):
    """Masses are small whole numbers and so is their sum, so every partial sum is exact and the reference's."""
    mass = torch.randint(0, 5, (2, 1, 1, entries)).float()
    mass[..., 0] += 4096 - mass[..., 1:].sum(-1) % 4096
    capacity = max(1, round(room * entries))
    got = kernels[1].select(mass, capacity, sink=2, share=share, **every_entry(entries))
    key = mass.clone()
    key[..., :2] = INF
    order = key.sort(dim=-1, descending=True, stable=True).indices
    before = mass.gather(-1, order).cumsum(-1) - mass.gather(-1, order)
    take = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, before < share * mass.sum(-1, keepdim=True))
    take[..., :2] = True
    expected = compact(take & reference.keep_best(key, capacity), capacity)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


# --- machine code ----------------------------------------------------------------------------------------------------

KERNELS = {
    "strided_score_kernel": "adaptive_block_index",
    "block_mass_kernel": "adaptive_block_index",
    "sampled_share_kernel": "adaptive_block_index",
    "select_kernel": "adaptive_block_index",
    "pool_mean_kernel": "block_topk_index",
    "pooled_score_kernel": "block_topk_index",
    "last_query_lse_kernel": "vertical_slash_index",
    "last_query_sums_kernel": "vertical_slash_index",
    "band_mass_kernel": "vertical_slash_index",
    "spread_bands_kernel": "vertical_slash_index",
}
ARGUMENTS = {"adaptive_block_index": (0.9,), "block_topk_index": (100,), "vertical_slash_index": (1000, 6096)}
OPTIONS = {"sampled_share_kernel": dict(samples=4)}
MULTIPLY = (
    "strided_score_kernel",
    "sampled_share_kernel",
    "pooled_score_kernel",
    "last_query_lse_kernel",
    "last_query_sums_kernel",
)


@compiled
@pytest.mark.parametrize("d", [128, 256])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile(name, capability, d, monkeypatch, tmp_path, record_property, capsys):
    from headstart.triton import block_select, prefill_index, vertical_slash

    if d != 128 and name not in (*MULTIPLY, "pool_mean_kernel"):
        pytest.skip("the same for every head dim")
    builder = KERNELS[name]
    q, k = torch.empty(1, 4, 8192, d, dtype=BFLOAT16), torch.empty(1, 2, 8192, d, dtype=BFLOAT16)

    def call():
        _library.triton_kernels[builder](q, k, *ARGUMENTS[builder], **OPTIONS.get(name, {}))

    binary = compile_launch([prefill_index, vertical_slash, block_select], monkeypatch, name, capability, call)
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    if name in MULTIPLY:
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in binary.asm["ptx"], "no tensor cores in it"
    used = resources(binary, tmp_path)
    if used is not None:
        record_property("resources", str(used))
        with capsys.disabled():
            print(f"\nsm_{capability} {name} D={d}: {used}", end=" ")
        assert used["stack"] == 0, f"spills: {used}"


@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_selection_among_many_keys_compiles(capability, monkeypatch, tmp_path):
    from headstart.triton import block_select

    def call():
        block_select.select(torch.empty(1, 1, 1, 2**17), 1000, **every_entry(2**17))

    used = resources(compile_launch([block_select], monkeypatch, "select_kernel", capability, call), tmp_path)
    assert used is None or used["stack"] == 0, f"spills: {used}"

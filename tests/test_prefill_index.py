"""The index builders of sparse prefill: every tier against float64 scores computed here, with ties allowed for.

A selection is right if it is the best by exact scores, up to a tie within rounding. Where scores are forced (infinite),
it must be the reference's, to the id.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import headstart
import shapes
from headstart import BlockIndex
from headstart.reference import prefill_index as reference
from shapes import DTYPES, Shape

NAN, INF = math.nan, math.inf
TIE = 1e-5  # relative to the largest score
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_shape = functools.partial(pytest.mark.parametrize, "shape", ids=str)


# --- the truth -------------------------------------------------------------------------------------------------------


def starts(shape: Shape) -> torch.Tensor:
    """[B, 1, 1, 1]"""
    return torch.tensor(shape.kv_start or (0,) * shape.batch)[:, None, None, None]


def visible_keys(shape: Shape) -> torch.Tensor:
    """bool [B, 1, Nq, Nk]: what a query may see."""
    position = torch.arange(shape.nq)[:, None] + shape.nk - shape.nq
    keys = torch.arange(shape.nk)
    return (keys <= position) & (keys >= starts(shape))


def any_in_block(mask: torch.Tensor, shape: Shape) -> torch.Tensor:
    """bool [..., Nq, Nk] to [..., R, T]."""
    mask = F.pad(mask, (0, -shape.nk % shape.block_k, 0, -shape.nq % shape.block_q))
    return mask.unflatten(-1, (-1, shape.block_k)).any(-1).unflatten(-2, (-1, shape.block_q)).any(-2)


def forced_blocks(shape: Shape, sink: int, local: int) -> torch.Tensor:
    """bool [B, 1, R, T]: blocks with a sink, or a key of a query's window, by looking at every pair."""
    position = torch.arange(shape.nq)[:, None] + shape.nk - shape.nq
    keys = torch.arange(shape.nk)
    wanted = (keys < starts(shape) + sink) | (keys > position - local)
    return any_in_block(visible_keys(shape) & wanted, shape)


def double(shape: Shape, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.double(), k.double().repeat_interleave(shape.heads_q // shape.heads_kv, 1)


def selected_blocks(index: BlockIndex, shape: Shape) -> torch.Tensor:
    """bool [B, H, R, T] of a builder's lists, which must be ascending, inside the keys and within capacity."""
    return listed(index.block_count, index.block_index, shape.blocks)


def listed(count: torch.Tensor, ids: torch.Tensor, limit: int) -> torch.Tensor:
    capacity = ids.shape[-1]
    assert count.dtype == ids.dtype == torch.int32
    assert (count >= 0).all() and (count <= capacity).all(), "a count outside the capacity"
    used = torch.arange(capacity) < count.unsqueeze(-1)
    assert ((ids >= 0) & (ids < limit))[used].all(), "an id outside the keys"
    assert (ids.diff(dim=-1) > 0)[used[..., 1:]].all(), "ids out of order"
    assert (ids[~used] == 0).all(), "unused entries are not 0"
    mask = torch.zeros(*count.shape, limit + 1, dtype=torch.bool)
    return mask.scatter_(-1, torch.where(used, ids, limit).long(), True)[..., :limit]


def assert_best(selected: torch.Tensor, score: torch.Tensor, count: int, same_forced: torch.Tensor | None = None):
    """`selected` bool [..., N] are the `count` highest of `score`, up to ties; -inf is never taken."""
    allowed = (score > -INF).sum(-1)
    expected = allowed.clamp(max=count)
    assert torch.equal(selected.sum(-1), expected), "not as many as there is room for"
    finite = score.masked_fill(~score.isfinite(), 0)
    tie = TIE * finite.abs().amax(-1, keepdim=True)
    worst = score.sort(-1, descending=True).values.gather(-1, (expected - 1).clamp(min=0).unsqueeze(-1))
    assert (score >= worst - tie)[selected].all(), "took one that is not among the best"
    rest = (score <= worst + tie) | (expected == 0).unsqueeze(-1)
    assert rest[~selected].all(), "left one of the best out"
    if same_forced is not None:
        forced = score == INF
        assert torch.equal(selected & forced, same_forced & forced), "forced entries differ from the reference's"


# --- A-shape ---------------------------------------------------------------------------------------------------------


WINDOWS = ((0, 0), (0, 1), (1, 0), (1, 1), (64, 64), (65, 63), (100, 130), (10**6, 10**6))


def check_a_shape(shape: Shape, sink: int, local: int):
    sizes = dict(block_q=shape.block_q, block_k=shape.block_k)
    index = headstart.a_shape_index(shape.nq, shape.nk, sink=sink, local=local, kv_start=shape.start(), **sizes)
    expected = forced_blocks(shape, sink, local)
    assert torch.equal(selected_blocks(index, shape), expected if shape.kv_start else expected[:1])


@by_shape(shapes.BUILDERS)
@pytest.mark.parametrize("sink, local", WINDOWS)
def test_a_shape(shape, sink, local):
    check_a_shape(shape, sink, local)


def test_a_shape_any_size():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    small, size = st.integers(0, 300), st.sampled_from((64, 128))

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(st.integers(1, 400), small, small, small, st.none() | st.integers(0, 800), size, size)
    def run(nq, more, sink, local, start, block_q, block_k):
        nk = nq + more
        start = None if start is None else (min(start, nk),)
        shape = Shape(1, 1, 1, nq, nk, 8, block_q=block_q, block_k=block_k, kv_start=start)
        check_a_shape(shape, sink, local)

    run()


# --- vertical-slash --------------------------------------------------------------------------------------------------


def last_query_sums(shape: Shape, q, k, last_q: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 sums of the last queries' softmax down columns [B, H, Nk] and along diagonals [B, H, Nk]."""
    q, k = double(shape, q, k)
    seen = visible_keys(shape)[..., -last_q:, :]
    weights = (q[:, :, -last_q:] @ k.mT * scale).masked_fill(~seen, -INF).softmax(-1).nan_to_num(0.0)
    diagonal = torch.zeros(*weights.shape[:2], shape.nk, dtype=torch.float64)
    for i in range(weights.shape[2]):
        position = shape.nk - weights.shape[2] + i
        diagonal[..., : position + 1] += weights[:, :, i, : position + 1].flip(-1)
    return weights.sum(-2), diagonal


def band_scores(shape: Shape, diagonal: torch.Tensor, local: int) -> torch.Tensor:
    """Mass of each band, by walking every position that a query can have before its row's last key."""
    bands = shape.nk // shape.block_k + 2 + shape.block_q // shape.block_k
    whole = shape.block_q >= shape.block_k  # else rows end alternately inside and at the end of a key block
    edge = shape.block_k - 1 - (shape.nk - shape.nq + shape.block_q - 1) % shape.block_k if whole else 0
    width = max(shape.block_q, shape.block_k)
    offsets = torch.arange(shape.nk)
    mass = torch.zeros(*diagonal.shape[:2], bands, dtype=torch.float64)
    for before in range(width):
        mass.index_add_(-1, (before + offsets + edge) // shape.block_k, diagonal / width)
    if local > 0:
        mass[..., : (local - 1 + edge) // shape.block_k + 1] = INF
    return mass


def check_vertical_slash(shape: Shape, q, k, vertical=30, slash=150, last_q=64, sink=30, local=100, scale=None, **caps):
    given = dict(last_q=last_q, sink=sink, local=local, kv_start=shape.start(), scale=scale)
    given |= dict(block_q=shape.block_q, block_k=shape.block_k) | caps
    index = headstart.vertical_slash_index(q, k, vertical, slash, **given)
    options = dict(max_blocks=None, max_columns=None) | given
    ref = BlockIndex(*reference.vertical_slash_index(q, k, vertical, slash, **options))
    columns = listed(index.column_count, index.column_index, shape.nk)[:, :, 0]
    column_sum, diagonal = last_query_sums(
        shape, q, k, min(last_q, shape.nq), shape.head_dim**-0.5 if scale is None else scale
    )
    start, keys = starts(shape)[..., 0], torch.arange(shape.nk)
    score = column_sum.masked_fill((keys >= start) & (keys < start + sink), INF).masked_fill(keys < start, -INF)
    room = min(vertical, caps.get("max_columns") or vertical, shape.nk)
    assert index.column_index.shape[-1] == room
    assert_best(columns, score, room, listed(ref.column_count, ref.column_index, shape.nk)[:, :, 0])

    # The last row sees every band that any row sees; the others must show the same bands.
    room = min(-(-slash // shape.block_k), caps.get("max_blocks") or 10**9, shape.blocks)
    assert index.block_index.shape[-1] == room
    blocks = selected_blocks(index, shape)
    visible = any_in_block(visible_keys(shape), shape)
    mass = band_scores(shape, diagonal, local)
    last = [
        (min((r + 1) * shape.block_q, shape.nq) - 1 + shape.nk - shape.nq) // shape.block_k for r in range(shape.rows)
    ]
    kept = torch.zeros_like(mass, dtype=torch.bool)
    kept[..., : last[-1] + 1] = blocks[:, :, -1, : last[-1] + 1].flip(-1)
    for r, anchor in enumerate(last):
        expected = kept[..., : anchor + 1].flip(-1) & visible[:, :, r, : anchor + 1]
        assert torch.equal(blocks[:, :, r, : anchor + 1], expected), f"row {r} has other bands than the last"
    seen = torch.zeros_like(mass, dtype=torch.bool)
    seen[..., : last[-1] + 1] = visible[:, :, -1, : last[-1] + 1].flip(-1)
    worst = mass.sort(-1, descending=True).values[..., room - 1 : room]
    tie = TIE * mass.masked_fill(mass == INF, 0).amax(-1, keepdim=True)
    assert (kept.sum(-1) <= room).all()
    assert (mass >= worst - tie)[kept].all(), "took a band that is not among the best"
    assert (mass <= worst + tie)[seen & ~kept].all(), "left one of the best bands out"
    forced = seen & (mass == INF) & (torch.arange(mass.shape[-1]) < room)
    assert kept[forced].all(), "a local band is missing"
    return index


@by_dtype
@by_shape(shapes.BUILDERS)
def test_vertical_slash(cpu_tier, dtype, shape):
    q, k, _ = shape.qkv(dtype)
    check_vertical_slash(shape, q, k)


@by_shape(shapes.BUILDERS[:3] + shapes.BUILDERS[-2:])
@pytest.mark.parametrize(
    "options",
    (
        dict(vertical=1, slash=1, sink=0, local=0),
        dict(vertical=1, slash=1),
        dict(vertical=10**5, slash=10**5),
        dict(last_q=1, sink=0, local=1),
        dict(last_q=10**4, local=0),
        dict(vertical=100, slash=400, max_blocks=2, max_columns=11, sink=4, local=1),
        dict(vertical=100, slash=400, max_blocks=1, max_columns=5),
        dict(scale=2.0, sink=0, local=0),
        dict(scale=-0.2, sink=0, local=0),
        dict(scale=0.0, sink=0, local=0),
        dict(sink=10**6, local=10**6),
    ),
    ids=str,
)
def test_vertical_slash_options(cpu_tier, shape, options):
    q, k, _ = shape.qkv(torch.float32)
    check_vertical_slash(shape, q, k, **options)


@pytest.mark.parametrize("scale", (-3.0, -0.5))
def test_negative_scale(cpu_tier, scale):
    """The largest weight belongs to the smallest product."""
    shape = Shape(1, 2, 1, 200, 300, 64)
    q, k, _ = shape.qkv(torch.float32)
    check_vertical_slash(shape, q, k, sink=0, local=0, scale=scale)
    check_adaptive(shape, q, k, scale=scale)


def test_one_column_and_one_diagonal(cpu_tier):
    """Key 37 draws every query, and every query the key 200 before it: they are found, whatever the rest is."""
    n, d, column, offset = 640, 128, 37, 200
    code = torch.randn(n, d).sign()
    everyone = torch.randn(d).sign()
    q = 0.5 * everyone + code.roll(offset, 0)
    k = code.clone()
    k[column] = 2 * everyone
    index = headstart.vertical_slash_index(q[None, None], k[None, None], 1, 64, sink=0, local=0)
    assert index.column_count.tolist() == [[[1]]] and index.column_index.tolist() == [[[[column]]]]
    blocks = selected_blocks(index, Shape(1, 1, 1, n, n, d))[0, 0]
    band = offset // 64  # offset 200 lies in bands 3 and 4, mostly in 3
    for r in range(10):
        assert blocks[r].nonzero().flatten().tolist() == ([r - band] if r >= band else [])
    index = headstart.vertical_slash_index(q[None, None], k[None, None], 1, 128, sink=0, local=1)
    row = selected_blocks(index, Shape(1, 1, 1, n, n, d))[0, 0, 9].nonzero().flatten().tolist()
    assert row == [9 - band, 9]


# --- block top-k -----------------------------------------------------------------------------------------------------


def block_means(x: torch.Tensor, block: int, first: torch.Tensor) -> torch.Tensor:
    """Float64 means of blocks of tokens from `first` [B] on."""
    b, h, n, d = x.shape
    means = torch.zeros(b, h, -(-n // block), d, dtype=torch.float64)
    for batch in range(b):
        for t in range(means.shape[2]):
            begin = max(t * block, int(first[batch]))
            if begin < min((t + 1) * block, n):
                means[batch, :, t] = x[batch, :, begin : (t + 1) * block].mean(1)
    return means


def check_topk(shape: Shape, q, k, top_k=3, sink=1, local=1):
    given = dict(sink=sink, local=local, kv_start=shape.start(), block_q=shape.block_q, block_k=shape.block_k)
    index = headstart.block_topk_index(q, k, top_k, **given)
    assert index.block_index.shape[-1] == min(top_k, shape.blocks)
    q64, k64 = double(shape, q, k)
    first = starts(shape).flatten()
    score = block_means(q64, shape.block_q, first - shape.nk + shape.nq) @ block_means(k64, shape.block_k, first).mT
    visible = any_in_block(visible_keys(shape), shape).expand_as(score)
    score = score.masked_fill(forced_blocks(shape, sink, local), INF).masked_fill(~visible, -INF)
    ref = BlockIndex(*reference.block_topk_index(q, k, top_k, **given))
    assert_best(selected_blocks(index, shape), score, top_k, selected_blocks(ref, shape))


@by_dtype
@by_shape(shapes.BUILDERS)
def test_block_topk(cpu_tier, dtype, shape):
    q, k, _ = shape.qkv(dtype)
    check_topk(shape, q, k)


@by_shape(shapes.BUILDERS[:3] + shapes.BUILDERS[-2:])
@pytest.mark.parametrize(
    "top_k, sink, local", ((1, 0, 0), (1, 1, 1), (2, 100, 100), (10**6, 0, 0), (4, 65, 0), (3, 0, 200))
)
def test_block_topk_options(cpu_tier, shape, top_k, sink, local):
    q, k, _ = shape.qkv(torch.float32)
    check_topk(shape, q, k, top_k, sink, local)


@pytest.mark.parametrize("top_k", (1, 3, 5))
def test_block_topk_is_minference(cpu_tier, top_k):
    """Algorithm 2 of the paper: pool, multiply, mask, top-k."""
    q, k = torch.randn(2, 1, 2, 512, 64)
    index = headstart.block_topk_index(q, k, top_k, sink=0, local=0)
    estimate = (q.double().unflatten(2, (8, 64)).mean(3) @ k.double().unflatten(2, (8, 64)).mean(3).mT) / 8
    estimate = estimate.masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -INF).softmax(-1)
    for h in range(2):
        for r in range(8):
            best = estimate[0, h, r].topk(min(top_k, r + 1)).indices.sort().values.tolist()
            assert index.block_index[0, h, r, : int(index.block_count[0, h, r])].tolist() == best


# --- adaptive --------------------------------------------------------------------------------------------------------


def antidiagonal_shares(shape: Shape, q, k, stride: int, scale: float) -> torch.Tensor:
    """Float64 shares [B, H, R, G, T]: softmax over key groups of the mean along each tile's antidiagonal."""
    q, k = double(shape, q, k)
    k = k.masked_fill(torch.arange(shape.nk)[:, None] < starts(shape), 0.0)
    q, k = (F.pad(x, (0, 0, 0, -x.shape[2] % stride)) for x in (q, k))
    score = sum(q[:, :, s::stride] @ k[:, :, stride - 1 - s :: stride].mT for s in range(stride)) * (scale / stride)
    group_q, group_k = (torch.arange(n) * stride for n in score.shape[-2:])
    last = (group_q + stride - 1).clamp(max=shape.nq - 1)[:, None] + shape.nk - shape.nq
    seen = (group_k <= last) & (group_k + stride > starts(shape)) & (last >= starts(shape))
    weights = score.masked_fill(~seen, -INF).softmax(-1).nan_to_num(0.0)
    rows, columns = shape.block_q // stride, shape.block_k // stride
    weights = F.pad(weights, (0, -weights.shape[-1] % columns, 0, -weights.shape[-2] % rows))
    return weights.unflatten(-1, (-1, columns)).sum(-1).unflatten(-2, (-1, rows))


def sampled_shares(shape: Shape, q, k, samples: int, scale: float) -> torch.Tensor:
    """Float64 shares [B, H, R, samples, T]: what every block gets of the exact attention of some of a row's queries."""
    q, k = double(shape, q, k)
    allowed = visible_keys(shape)
    weights = (q @ k.mT * scale).masked_fill(~allowed, -INF).softmax(-1).nan_to_num(0.0)
    shares = F.pad(weights, (0, -shape.nk % shape.block_k)).unflatten(-1, (-1, shape.block_k)).sum(-1)
    picked = [
        [min(r * shape.block_q + (i + 1) * shape.block_q // samples, shape.nq) - 1 for i in range(samples)]
        for r in range(shape.rows)
    ]
    return shares[:, :, torch.tensor(picked)]


def check_adaptive(
    shape: Shape,
    q,
    k,
    threshold=0.8,
    stride=8,
    sink=1,
    local=1,
    scale=None,
    max_blocks=None,
    head_threshold=None,
    samples=0,
):
    index = headstart.adaptive_block_index(
        q,
        k,
        threshold,
        stride,
        sink=sink,
        local=local,
        kv_start=shape.start(),
        scale=scale,
        block_q=shape.block_q,
        block_k=shape.block_k,
        max_blocks=max_blocks,
        head_threshold=head_threshold,
        samples=samples,
    )
    room = shape.blocks if max_blocks is None else min(max_blocks, shape.blocks)
    assert index.block_index.shape[-1] == room
    chosen = selected_blocks(index, shape)
    scale = shape.head_dim**-0.5 if scale is None else scale
    mass = antidiagonal_shares(shape, q, k, stride, scale)
    if samples == 0:
        mass = mass.sum(-2)
    else:
        mass = torch.maximum(mass.amax(-2), sampled_shares(shape, q, k, samples, scale).amax(-2))
    visible = any_in_block(visible_keys(shape), shape).expand_as(mass)
    forced = forced_blocks(shape, sink, local).expand_as(mass)
    assert not (chosen & ~visible).any(), "a block that no query of the row may see"
    assert (chosen | ~forced).all() or max_blocks is not None, "a forced block is missing"
    assert (chosen | ~forced).all(-1)[forced.sum(-1) <= room].all(), "a forced block is missing"
    mass = mass.masked_fill(~visible, 0.0)
    total = mass.sum(-1)
    share = torch.full((shape.heads_q, 1), threshold) if head_threshold is None else head_threshold[:, None]
    goal = share.double() * total
    tie = TIE * total
    held = (mass * chosen).sum(-1)
    full = chosen.sum(-1) == room
    assert ((held >= goal - tie) | full).all(), "less mass than asked for"
    free = chosen & ~forced
    lightest = mass.masked_fill(~free, INF).amin(-1)
    assert ((held - lightest < goal + tie) | ~free.any(-1)).all(), "more blocks than it takes"
    heaviest_left = mass.masked_fill(chosen | ~visible | forced, -INF).amax(-1)
    assert ((heaviest_left <= lightest + tie) | ~free.any(-1)).all(), "a heavier block was left out"
    assert (~free.any(-1))[(forced & ~chosen).any(-1)].all(), "forced blocks come first"


@by_dtype
@by_shape(shapes.BUILDERS)
def test_adaptive(cpu_tier, dtype, shape):
    q, k, _ = shape.qkv(dtype)
    check_adaptive(shape, 4 * q, k)


@by_shape(shapes.BUILDERS[:3] + shapes.BUILDERS[-2:])
@pytest.mark.parametrize(
    "options",
    (
        dict(threshold=1e-6, sink=0, local=0),
        dict(threshold=1.0),
        dict(stride=4, threshold=0.5, sink=0, local=0),
        dict(stride=16, threshold=0.95),
        dict(stride=32, threshold=0.6, sink=100, local=70),
        dict(max_blocks=2, threshold=0.99),
        dict(max_blocks=1, sink=70, local=70),
        dict(max_blocks=10**6, scale=1.5),
        dict(scale=-0.1, threshold=0.7),
        dict(scale=0.0, threshold=0.7, sink=0, local=0),
        dict(samples=1, stride=32, threshold=0.9),
        dict(samples=4, stride=16, threshold=0.7, sink=0, local=0),
        dict(samples=5, stride=4, threshold=0.5, max_blocks=3),
        dict(samples=64, stride=8, threshold=0.8, scale=-0.3),
    ),
    ids=str,
)
def test_adaptive_options(cpu_tier, shape, options):
    q, k, _ = shape.qkv(torch.float32)
    check_adaptive(shape, 4 * q, k, **options)


def test_adaptive_threshold_per_head(cpu_tier):
    shape = Shape(2, 4, 2, 300, 400, 32, kv_start=(0, 90))
    q, k, _ = shape.qkv(torch.float32)
    thresholds = torch.tensor([0.2, 0.9, 1.0, 0.5])
    check_adaptive(shape, 3 * q, k, head_threshold=thresholds)
    wide = torch.stack([thresholds, -thresholds], 1)[:, 0]  # any stride
    check_adaptive(shape, 3 * q, k, head_threshold=wide)


# --- all of them -----------------------------------------------------------------------------------------------------

BUILDERS = {
    "vertical_slash": lambda q, k, **more: headstart.vertical_slash_index(q, k, 40, 200, **more),
    "block_topk": lambda q, k, **more: headstart.block_topk_index(q, k, 3, **more),
    "adaptive": lambda q, k, **more: headstart.adaptive_block_index(q, k, 0.8, **more),
}
by_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def tensors(index: BlockIndex) -> list[torch.Tensor]:
    parts = (index.block_count, index.block_index, index.column_count, index.column_index)
    return [t for t in parts if t is not None]


def same(a: BlockIndex, b: BlockIndex) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b)))


@by_builder
def test_any_shape(cpu_tier, build):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    check = dict(zip(BUILDERS, (check_vertical_slash, check_topk, check_adaptive)))
    check = next(check[name] for name in BUILDERS if BUILDERS[name] is build)
    size = st.sampled_from((64, 128))

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(
        st.sampled_from(((1, 1), (3, 1), (4, 2))), st.integers(1, 300), st.integers(0, 300), st.integers(1, 10),
        size, size, st.none() | st.integers(0, 600), st.integers(0, 2**16),
    )  # fmt: skip
    def run(heads, nq, more, dims, block_q, block_k, start, seed):
        torch.manual_seed(seed)
        start = None if start is None else (min(start, nq + more),)
        shape = Shape(1, *heads, nq, nq + more, 8 * dims, 1, block_q, block_k, kv_start=start)
        check(shape, *shape.qkv(torch.float32)[:2])

    run()


@by_builder
@by_dtype
def test_strides_threads_and_memory_do_not_matter(cpu_tier, build, dtype):
    shape = Shape(2, 4, 2, 200, 300, 24)
    q, k, _ = shape.qkv(dtype)
    expected = build(q, k)
    permuted = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    odd = [torch.full((*x.shape[:3], 25), NAN, dtype=dtype)[..., 1:].copy_(x) for x in (q, k)]
    assert same(build(*permuted), expected) and same(build(*odd), expected)
    one = k[:, :1].expand_as(k)
    assert same(build(q, one), build(q, one.clone()))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            trash = [torch.full_like(t, -7) for t in tensors(expected)]
            del trash
            assert same(build(q, k), expected), threads
    finally:
        torch.set_num_threads(before)


@by_builder
@pytest.mark.parametrize("start", (-50, 300, 301, 1000, 2**31 - 1, -(2**31)))
def test_kv_start_outside_the_keys(cpu_tier, build, start):
    """Before the first key is no padding; at or past the last is nothing but padding."""
    shape = Shape(2, 2, 1, 200, 300, 16)
    q, k, _ = shape.qkv(torch.float32)
    near = min(max(start, 0), 300)
    expected = build(q, k, kv_start=torch.tensor([near, 0], dtype=torch.int32))
    assert same(build(q, k, kv_start=torch.tensor([start, 0], dtype=torch.int32)), expected)


@pytest.mark.parametrize("start", (-50, 301, 2**31 - 1))
def test_a_shape_kv_start_outside_the_keys(start):
    near = torch.tensor([min(max(start, 0), 300)], dtype=torch.int32)
    a, b = (headstart.a_shape_index(200, 300, sink=70, local=5, kv_start=s) for s in (near, near * 0 + start))
    assert same(a, b)


@by_builder
@pytest.mark.parametrize("where", ("q", "k"))
def test_nan_and_inf_give_a_valid_index(cpu_tier, build, where):
    """Nonsense in, some index out: ids ascend and lie inside the keys, so that attention can show the NaN."""
    shape = Shape(1, 2, 1, 2100, 2100, 8)
    for value in (NAN, INF, -INF):
        for share in (0.0005, 0.05, 1.0):
            inputs = dict(zip("qk", shape.qkv(torch.float32)))
            inputs[where].masked_fill_(torch.rand_like(inputs[where]) < share, value)
            index = build(**inputs)
            selected_blocks(index, shape)
            if index.column_count is not None:
                listed(index.column_count, index.column_index, shape.nk)


@by_builder
def test_equal_scores_choose_the_lower_id(cpu_tier, build):
    q, k = torch.zeros(1, 1, 640, 8), torch.randn(1, 1, 640, 8)
    index = build(q, k, sink=0, local=0)
    if index.column_count is not None:  # all columns and bands weigh the same only by their number of queries
        return
    for r in range(10):
        row = index.block_index[0, 0, r, : int(index.block_count[0, 0, r])].tolist()
        assert row == list(range(len(row)))

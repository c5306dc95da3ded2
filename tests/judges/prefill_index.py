"""How the index builders of sparse prefill are judged: against float64 scores computed here, with ties allowed for.

A selection is right if it is the best by exact scores, up to a tie within rounding. Where scores are forced (infinite),
it must be the reference's, to the id. `ops` has the builders under test, with the signatures of `torch.ops.headstart`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from headstart import BlockIndex
from headstart.reference import prefill_index as reference
from headstart.reference.sparse_attention import compact
from shapes import DTYPES, Shape

NAN, INF = math.nan, math.inf
TIE = 1e-5  # relative to the largest score
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_shape = functools.partial(pytest.mark.parametrize, "shape", ids=str)


def built(operator: Callable, *args, block_q=64, block_k=64, **options) -> BlockIndex:
    """What an operator returns, as an index."""
    tensors = operator(*args, block_q=block_q, block_k=block_k, **options)
    return BlockIndex(*tensors, block_q=block_q, block_k=block_k)


def inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Random q and k; before and after the tokens of each head is NaN, so that a read outside them shows."""
    found = []
    for heads, tokens in ((shape.heads_q, shape.nq), (shape.heads_kv, shape.nk)):
        x = torch.full((shape.batch, heads, tokens + 192, shape.head_dim), NAN, dtype=dtype)
        x[:, :, 64 : 64 + tokens] = torch.randn(shape.batch, heads, tokens, shape.head_dim)
        found.append(x[:, :, 64 : 64 + tokens])
    return found


# --- the truth --------------------------------------------------------------------------------------------------------


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


# --- vertical-slash ---------------------------------------------------------------------------------------------------


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


def check_vertical_slash(
    ops, shape: Shape, q, k, vertical=30, slash=150, last_q=64, sink=30, local=100, scale=None, **caps
):
    given = dict(last_q=last_q, sink=sink, local=local, kv_start=shape.start(), scale=scale)
    given |= dict(block_q=shape.block_q, block_k=shape.block_k) | caps
    index = built(ops.vertical_slash_index, q, k, vertical, slash, **given)
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


# --- block top-k ------------------------------------------------------------------------------------------------------


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


def check_topk(ops, shape: Shape, q, k, top_k=3, sink=1, local=1):
    given = dict(sink=sink, local=local, kv_start=shape.start(), block_q=shape.block_q, block_k=shape.block_k)
    index = built(ops.block_topk_index, q, k, top_k, **given)
    assert index.block_index.shape[-1] == min(top_k, shape.blocks)
    q64, k64 = double(shape, q, k)
    first = starts(shape).flatten()
    score = block_means(q64, shape.block_q, first - shape.nk + shape.nq) @ block_means(k64, shape.block_k, first).mT
    visible = any_in_block(visible_keys(shape), shape).expand_as(score)
    score = score.masked_fill(forced_blocks(shape, sink, local), INF).masked_fill(~visible, -INF)
    ref = BlockIndex(*reference.block_topk_index(q, k, top_k, **given))
    assert_best(selected_blocks(index, shape), score, top_k, selected_blocks(ref, shape))


# --- adaptive ---------------------------------------------------------------------------------------------------------


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
    ops, shape: Shape, q, k, threshold=0.8, stride=8, sink=1, local=1, scale=None, max_blocks=None, head_threshold=None,
    samples=0
):  # fmt: skip
    given = dict(stride=stride, sink=sink, local=local, kv_start=shape.start(), scale=scale, samples=samples)
    given |= dict(block_q=shape.block_q, block_k=shape.block_k, max_blocks=max_blocks, head_threshold=head_threshold)
    index = built(ops.adaptive_block_index, q, k, threshold, **given)
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


# --- all of them ------------------------------------------------------------------------------------------------------

CHECKS = {
    "vertical-slash": check_vertical_slash,
    "block top-k": check_topk,
    "adaptive": lambda ops, shape, q, k, **more: check_adaptive(ops, shape, 4 * q, k, **more),
    "adaptive, sampled": lambda ops, shape, q, k: check_adaptive(ops, shape, 4 * q, k, samples=4),
}
by_check = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
BUILDERS = {
    "vertical-slash": lambda ops, q, k, **more: built(ops.vertical_slash_index, q, k, 40, 200, **more),
    "block top-k": lambda ops, q, k, **more: built(ops.block_topk_index, q, k, 3, **more),
    "adaptive": lambda ops, q, k, **more: built(ops.adaptive_block_index, q, k, 0.8, **more),
    "adaptive, sampled": lambda ops, q, k, **more: built(ops.adaptive_block_index, q, k, 0.8, samples=4, **more),
}
by_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def tensors(index: BlockIndex) -> list[torch.Tensor]:
    parts = (index.block_count, index.block_index, index.column_count, index.column_index)
    return [t for t in parts if t is not None]


def same(a: BlockIndex, b: BlockIndex) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def chosen(index: BlockIndex, shape: Shape) -> list[torch.Tensor]:
    """The blocks and the columns of an index as masks; its lists must be valid."""
    masks = [selected_blocks(index, shape)]
    return masks if index.column_count is None else [*masks, listed(index.column_count, index.column_index, shape.nk)]


# --- the selection alone ----------------------------------------------------------------------------------------------


def every_entry(entries: int) -> dict:
    """One row that sees all entries and is forced to none, as for columns."""
    return dict(nq=entries, nk=entries, block_q=entries, block_k=1)


def check_top_k_of_scores_that_tie(select: Callable, rows: tuple[int, int], entries: int, capacity: int):
    scores = torch.randint(-3, 4, (*rows, 1, entries)) * 0.5
    scores = scores.masked_fill(torch.rand(scores.shape) < 0.2, -INF).masked_fill(torch.rand(scores.shape) < 0.05, INF)
    scores[scores == 0] *= torch.randint(0, 2, (int((scores == 0).sum()),)) * 2 - 1.0  # -0 and 0 are one value
    got = select(scores, capacity, **every_entry(entries))
    expected = compact(reference.keep_best(scores, capacity), capacity)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def check_share_of_masses_that_tie(select: Callable, entries: int, share: float, capacity: int):
    """Masses are small whole numbers and so is their sum, so every partial sum is exact and the reference's."""
    mass = torch.randint(0, 5, (2, 1, 1, entries)).float()
    mass[..., 0] += 4096 - mass[..., 1:].sum(-1) % 4096
    got = select(mass, capacity, sink=2, share=share, **every_entry(entries))
    key = mass.clone()
    key[..., :2] = INF
    order = key.sort(dim=-1, descending=True, stable=True).indices
    before = mass.gather(-1, order).cumsum(-1) - mass.gather(-1, order)
    take = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, before < share * mass.sum(-1, keepdim=True))
    take[..., :2] = True
    expected = compact(take & reference.keep_best(key, capacity), capacity)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])

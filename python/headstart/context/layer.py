"""One layer of a fixed context: the order of its keys and values, and thresholds, computed ahead of time.

Keys that are attended together are stored together:

    [ keys of cluster 0 | keys of cluster 1 | ... | keys of cluster C - 1 ][ kept: the first and the last keys ]
      0 ............................................................... M   M ............................. N

Every query attends the kept keys. M is a multiple of 64, so the kept keys are whole blocks of a `BlockIndex`. The keys
of the clusters that a query needs are the columns of the index.

The last queries of the context are the observation window. They show how scores are distributed. A table of the
quantiles of their scores says which threshold leaves out which share of the keys, so any density can be chosen later.
The same queries show how large the error of each head is at each share. Heads with a larger error get more keys. For
example, a head may look for one key that the mean of its cluster hides. Such a head keeps more keys.

Source: Squeezed Attention (Hooper et al., 2024, arXiv 2411.09688), section 3. The shares by measured error are new.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..ops.centroid_lookup import KeyClusters
from ..reference.centroid_lookup import log_scores, select

BLOCK = 64
SINK = 4  # this number of first keys is always kept
WINDOW = 100  # this number of last keys is always kept; their queries are the observation window
LEVELS = 257  # the entries of a quantile table, for shares of left out keys from 0 to 1
LARGEST_CLUSTER = 4  # clusters larger than this times the mean size are split
BUDGETS = ("measured", "equal", "global")
# `LayerContext.errors` are measured with these shares of the clustered keys left out.
SHARES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
ERROR_ELEMENTS = 2**23  # for each KV head, errors are measured with at most this number of attention weights
# The scores of the children of kept parents are calibrated at these sparsities.
PARENT_GRID = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
# The number of keys that the kept parents have, divided by the number that their children should keep.
PARENT_ROOM = 2.0


@dataclass(frozen=True)
class LayerContext:
    """A fixed context in one layer.

    - ``keys``, ``values`` [Hkv, N, D], in the order drawn above.
    - ``clusters``: the clusters of the first M keys.
    - ``queries`` [Hq, W, D]: the queries of the observation window.
    - ``scores`` float32 [Hkv, LEVELS]: quantiles of the ln of the scores, over the queries of the window. A share of
      i / (LEVELS - 1) of the clustered keys has at most the score of entry i. The score of a key is the best one of the
      query heads that share the KV head.
    - ``errors`` float32 [Hkv, len(SHARES)]: |o' - o|^2 / |o|^2, where o is the output and o' leaves out each of SHARES.
      It is a mean over the queries of the window and the query heads of a KV head. It never falls from one share to the
      next.
    - ``parent_scores``: like ``scores``, for the parents. None without parents.
    - ``child_scores`` float32 [len(PARENT_GRID), Hkv, LEVELS]: like ``scores``, for the clusters whose parents are kept
      when the children should leave out each share of PARENT_GRID (`parent_share`). None without parents.
    """

    keys: torch.Tensor
    values: torch.Tensor
    clusters: KeyClusters
    queries: torch.Tensor
    scores: torch.Tensor
    errors: torch.Tensor
    parent_scores: torch.Tensor | None = None
    child_scores: torch.Tensor | None = None

    @property
    def clustered(self) -> int:
        """M, the number of clustered keys."""
        return self.clusters.order.shape[1]

    @functools.cached_property
    def flat_clusters(self) -> KeyClusters:
        """The clusters without their parents."""
        return replace(self.clusters, parent_centroids=None, parent_offsets=None)


def arrange(
    k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor, clusters: float, parents: float | None, seed: int
) -> LayerContext:
    """Makes the context of a layer from k and v [Hkv, N, D] and the window's queries [Hq, W, D].

    `clusters` and `parents` are shares of the clustered keys.
    """
    n = k.shape[1]
    first, last = clustered_range(n)
    m = last - first
    count = max(1, round(m * clusters))
    options = {"parents": None if parents is None else max(1, min(count, round(m * parents)))}
    largest = LARGEST_CLUSTER * math.ceil(m / count)
    found = KeyClusters.build(k[:, first:last], count, seed=seed, max_size=largest, **options)

    def ordered(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([found.permute(x[:, first:last]), x[:, :first], x[:, last:]], 1)

    return with_scores(ordered(k), ordered(v), found, queries)


def clustered_range(n: int) -> tuple[int, int]:
    """The range [first, last) of the context's keys that are clustered."""
    m = max((n - SINK - WINDOW) // BLOCK, 1) * BLOCK
    first = min(SINK, n - m)
    return first, first + m


def with_scores(keys, values, clusters: KeyClusters, queries) -> LayerContext:
    sizes = clusters.cluster_offsets.diff(dim=-1)
    best = _best_scores(queries, clusters.centroids, sizes)
    scores = quantiles(best, sizes)
    layer = LayerContext(
        keys, values, clusters, queries, scores, _errors(keys, values, clusters, queries, best, scores)
    )
    if clusters.parent_centroids is None:
        return layer
    parents = _parent_sizes(clusters)
    parent_scores = quantiles(_best_scores(queries, clusters.parent_centroids, parents), parents)
    limits = [interpolate(parent_scores, parent_share(share)) for share in PARENT_GRID]
    children = [_child_quantiles(clusters, queries, limit) for limit in limits]
    return replace(layer, parent_scores=parent_scores, child_scores=torch.stack(children))


def _parent_sizes(clusters: KeyClusters) -> torch.Tensor:
    """The number of keys of each parent, int32 [Hkv, P]."""
    return clusters.cluster_offsets.gather(1, clusters.parent_offsets.long()).diff(dim=-1)


def _logits(queries: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The scaled products of queries and centroids, float32 [1, Hkv, G, W, C]."""
    heads, group = len(centroids), len(queries) // len(centroids)
    grouped = queries.float().unflatten(0, (heads, group))
    return (grouped @ centroids.float().mT[:, None] / math.sqrt(queries.shape[-1]))[None]


def _best_scores(queries, centroids, sizes) -> torch.Tensor:
    """The ln of the best score over the group, float32 [Hkv, W, C]. It is -inf for an empty cluster."""
    counted = torch.ones_like(sizes, dtype=torch.bool)[:, None, None]
    return log_scores(_logits(queries, centroids), sizes[:, None, None], counted[None]).amax(2)[0]


def quantiles(scores: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Quantiles float32 [Hkv, LEVELS] of scores [Hkv, W, C]. Cluster j counts as sizes[j] keys."""
    flat, order = scores.flatten(1).sort(dim=-1)
    weight = sizes[:, None].expand(scores.shape).flatten(1).gather(1, order).double()
    below = weight.cumsum(1) / weight.sum(1, keepdim=True)
    levels = torch.linspace(0, 1, LEVELS, dtype=torch.float64, device=scores.device).expand(len(scores), -1)
    places = torch.searchsorted(below, levels.contiguous()).clamp(max=flat.shape[1] - 1)
    # An empty cluster has no keys and a score of -inf. The least finite score replaces it.
    least = flat.masked_fill(flat == -math.inf, 0).amin(1, keepdim=True)
    return torch.maximum(flat.gather(1, places), least)


def _errors(keys, values, clusters: KeyClusters, queries, best_scores, scores) -> torch.Tensor:
    """Computes `LayerContext.errors`. A query sees no later key of the window. A long context uses fewer queries."""
    heads, group = len(keys), len(queries) // len(keys)
    m, n, w = clusters.order.shape[1], keys.shape[1], queries.shape[1]
    step = math.ceil(group * w * n / ERROR_ELEMENTS)
    behind = torch.zeros(w, 1, n, dtype=torch.bool, device=keys.device)
    last = min(w, n - m)
    behind[:, 0, n - last :] = torch.ones(w, last, dtype=torch.bool, device=keys.device).triu_(1 + last - w)
    behind, table = behind[::step], []
    for h in range(heads):
        q, best = queries[h * group : (h + 1) * group, ::step].float().transpose(0, 1), best_scores[h, ::step]
        p = (q @ keys[h].float().mT / math.sqrt(q.shape[-1])).masked_fill_(behind, -math.inf).softmax(-1)
        v = F.pad(values[h].float(), (0, 1), value=1.0)  # the ones add up the weights
        ends = clusters.cluster_offsets[h].tolist()
        parts = torch.stack([p[..., a:b] @ v[a:b] for a, b in itertools.pairwise(ends)])  # [C, W, G, D + 1]
        kept = torch.stack([best > interpolate(scores[h : h + 1], share) for share in SHARES], 1)  # [W, shares, C]
        outs = kept.float() @ parts.flatten(2).transpose(0, 1) + (p[..., m:] @ v[m:]).flatten(1)[:, None]
        sums, weights = outs.unflatten(-1, q.shape[1:2] + v.shape[-1:]).split([v.shape[-1] - 1, 1], -1)
        out = sums / weights.clamp(min=1e-20)
        error, size = ((out - out[:, :1]).square().sum(-1), out[:, :1].square().sum(-1).clamp(min=1e-20))
        table.append((error / size).mean((0, 2)))
    return torch.stack(table).cummax(1).values


def _child_quantiles(clusters: KeyClusters, queries: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Quantiles of the clusters whose parents have an ln score above `limit` [Hkv].

    As in the lookup, the sum of the scores is over these clusters only. Clusters of other parents get a lower score
    than all of them.
    """
    sizes, children = clusters.cluster_offsets.diff(dim=-1), clusters.parent_offsets.diff(dim=-1).long()
    every = torch.ones(1, len(sizes), 1, children.shape[1], dtype=torch.bool, device=sizes.device)
    kept, _ = select(
        _logits(queries, clusters.parent_centroids), _parent_sizes(clusters), every, limit.exp()[:, None], block_q=1
    )
    parent_of = torch.stack([torch.arange(len(c), device=c.device).repeat_interleave(c) for c in children])
    counted = kept.gather(-1, parent_of[None, :, None].expand(*kept.shape[:3], -1))
    scores = log_scores(_logits(queries, clusters.centroids), sizes[:, None, None], counted[:, :, None]).amax(2)[0]
    return quantiles(scores, sizes)


# --- thresholds ------------------------------------------------------------------------------------------------------


def thresholds(
    layers: Sequence[LayerContext], density: float, budget: str, hierarchical: bool
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Thresholds that keep a share of `density` of all clustered keys. The ln of a score must be above the threshold.

    Every layer has two: float32 [Hkv] for the clusters, and float32 [Hkv] for the parents, or None if not
    `hierarchical`.

    Args:
        budget: with "measured", every head leaves out the share that `head_shares` gives it. With "equal", all heads
            leave out the same share. With "global", all heads and layers have one threshold, and heads with widely
            spread attention keep more keys.
    """
    if budget == "measured":
        shares = head_shares([layer.errors for layer in layers], 1 - density)
    else:
        shares = [torch.full_like(layer.errors[:, 0], 1 - density) for layer in layers]
    if hierarchical:
        tables = [_child_tables(layer.child_scores, share) for layer, share in zip(layers, shares, strict=True)]
    else:
        tables = [layer.scores for layer in layers]
    if budget == "global":
        pooled = torch.cat([table.flatten() for table in tables]).sort().values
        tables = [pooled.expand(len(table), -1) for table in tables]
    own = [interpolate(table, share) for table, share in zip(tables, shares, strict=True)]
    parents = [None] * len(layers)
    if hierarchical:
        parents = [interpolate(la.parent_scores, parent_share(share)) for la, share in zip(layers, shares, strict=True)]
    return list(zip(own, parents, strict=True))


def head_shares(errors: Sequence[torch.Tensor], left_out: float) -> list[torch.Tensor]:
    """The share of the keys that every head leaves out, float32 [Hkv] for every layer.

    `errors` is [Hkv, len(SHARES)] for every layer. The mean of the result is `left_out`, and the sum of the errors is
    the least possible. At a given price for a key, every head takes the share with the least total of error and price.
    Bisection finds the price. The answers at the last two prices are mixed so that the mean is `left_out`.
    """
    table = torch.cat(list(errors))
    shares = torch.tensor(SHARES, device=table.device)
    few, many = torch.zeros_like(table[:, 0]), torch.ones_like(table[:, 0])
    low, high = -30.0, 10.0  # log2 of the price
    for _ in range(50):
        price = (low + high) / 2
        taken = shares[(table - 2**price * shares).argmin(-1)]
        if taken.mean() > left_out:
            many, high = taken, price
        else:
            few, low = taken, price
    a, b = few.mean(), many.mean()
    mixed = torch.lerp(few, many, ((left_out - a) / (b - a).clamp(min=1e-6)).clamp(0, 1))
    return list(mixed.split([len(x) for x in errors]))


def interpolate(table: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    """Interpolates a table [H, n] of values at n levels from 0 to 1: row h at level share[h], float32 [H].

    At level 0 the result is -inf, because nothing is left out.
    """
    share = torch.as_tensor(share, dtype=table.dtype, device=table.device).expand(len(table))
    place = share * (table.shape[1] - 1)
    low = place.long().clamp(max=table.shape[1] - 2)
    found = torch.lerp(*table.gather(1, torch.stack([low, low + 1], 1)).unbind(1), place - low)
    return found.masked_fill(share <= 0, -math.inf)


def parent_share(share: torch.Tensor | float) -> torch.Tensor:
    """The share of the keys that parents leave out, if their children should leave out `share`."""
    return (1 - PARENT_ROOM * (1 - torch.as_tensor(share))).clamp(min=0)


def _child_tables(child_scores: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The tables [Hkv, LEVELS] of all heads, each interpolated between the two sparsities around the head's share."""
    grid = torch.tensor(PARENT_GRID, dtype=share.dtype, device=share.device)
    above = torch.searchsorted(grid, share).clamp(1, len(grid) - 1)
    weight = (share - grid[above - 1]) / (grid[above] - grid[above - 1])
    heads = torch.arange(len(share), device=share.device)
    return torch.lerp(child_scores[above - 1, heads], child_scores[above, heads], weight[:, None])


# --- relocation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: pair i of a key at position p is rotated by the angle p · inv_freq[i].

    If ``interleaved``, pair i is the values 2i and 2i + 1; otherwise it is the values i and len(inv_freq) + i. Values
    after the pairs stay the same.
    """

    inv_freq: tuple[float, ...]
    interleaved: bool

    def shift(self, x: torch.Tensor, by: int) -> torch.Tensor:
        """Keys or centroids [..., D] moved by `by` positions. The result is computed in float64 and rounded once."""
        pairs = len(self.inv_freq)
        angle = by * torch.tensor(self.inv_freq, dtype=torch.float64, device=x.device)
        cos, sin = angle.cos(), angle.sin()
        turned = x[..., : 2 * pairs].double()
        a, b = (turned[..., 0::2], turned[..., 1::2]) if self.interleaved else turned.split(pairs, -1)
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack([a, b], -1).flatten(-2) if self.interleaved else torch.cat([a, b], -1)
        return torch.cat([turned.to(x.dtype), x[..., 2 * pairs :]], -1)


def concat_layers(chunks: Sequence[LayerContext], rope: Rope) -> LayerContext:
    """Joins one layer of several contexts, one after another. The last context keeps its positions.

    The kept keys of every context stay kept, and the clusters stay the same. The thresholds are those of the last
    window.
    """
    lengths = [chunk.keys.shape[1] for chunk in chunks]
    shifts = [-sum(lengths[i + 1 :]) for i in range(len(chunks))]

    def shifted(pick) -> list[torch.Tensor]:
        return [rope.shift(pick(chunk), by) if by else pick(chunk) for chunk, by in zip(chunks, shifts, strict=True)]

    def in_order(parts: list[torch.Tensor]) -> torch.Tensor:
        clustered = [x[:, : chunk.clustered] for x, chunk in zip(parts, chunks, strict=True)]
        kept = [x[:, chunk.clustered :] for x, chunk in zip(parts, chunks, strict=True)]
        return torch.cat(clustered + kept, 1)

    def offsets(pick) -> torch.Tensor:
        parts, end = [pick(chunks[0].clusters)], pick(chunks[0].clusters)[:, -1:]
        for chunk in chunks[1:]:
            parts.append(pick(chunk.clusters)[:, 1:] + end)
            end = parts[-1][:, -1:]
        return torch.cat(parts, 1)

    before = [sum(chunk.clustered for chunk in chunks[:i]) for i in range(len(chunks))]
    parents = {}
    if all(chunk.clusters.parent_centroids is not None for chunk in chunks):
        parents["parent_centroids"] = torch.cat(shifted(lambda chunk: chunk.clusters.parent_centroids), 1)
        parents["parent_offsets"] = offsets(lambda clusters: clusters.parent_offsets)
    clusters = KeyClusters(
        torch.cat(shifted(lambda chunk: chunk.clusters.centroids), 1),
        offsets(lambda clusters: clusters.cluster_offsets),
        torch.cat([chunk.clusters.order + first for chunk, first in zip(chunks, before, strict=True)], 1),
        **parents,
    )
    keys, values = in_order(shifted(lambda chunk: chunk.keys)), in_order([chunk.values for chunk in chunks])
    return with_scores(keys, values, clusters, chunks[-1].queries)

"""What is computed ahead of time of the keys and values that many questions share: their order, and thresholds.

A layer's keys are stored so that what is attended together lies together:

    [ keys of cluster 0 | keys of cluster 1 | ... | keys of cluster C - 1 ][ kept: the first and the last keys ]
      0 ............................................................... M   M ............................. N

M is a multiple of 64, so the kept keys, which every query attends, are whole blocks of a `BlockIndex`, and the
clusters that a query needs are its columns. Queries of the context's end, the observation window, tell how scores are
distributed, and so which threshold leaves out which share of the keys: a table of quantiles, from which any sparsity
can be asked for later.

Source: Squeezed Attention (Hooper et al., 2024, arXiv 2411.09688), section 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..ops.centroid_lookup import KeyClusters
from ..reference.centroid_lookup import log_scores, select

BLOCK = 64
SINK = 4  # first keys, always kept
WINDOW = 100  # last keys, always kept at least, and the queries that calibrate
LEVELS = 257  # of a quantile table, from no sparsity to all of it
LARGEST_CLUSTER = 4  # times the mean size; larger ones are split
# Sparsities at which scores under kept parents were calibrated.
PARENT_GRID = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
# Parents keep this many times the keys that their children shall keep.
PARENT_ROOM = 3.0


@dataclass(frozen=True)
class LayerContext:
    """A fixed context in one layer.

    - ``keys``, ``values`` [Hkv, N, D], in the order drawn above;
    - ``clusters``: of the first M keys;
    - ``queries`` [Hq, W, D]: of the observation window;
    - ``scores`` float32 [Hkv, LEVELS]: entry i is the ln of the score that a share of i / (LEVELS - 1) of the clustered
      keys does not exceed, for a query of the window and the best of a KV head's query heads;
    - ``parent_scores``, with parents: the same of the parents;
    - ``child_scores`` float32 [len(PARENT_GRID), Hkv, LEVELS], with parents: of the clusters under the parents that are
      kept at each sparsity of PARENT_GRID.
    """

    keys: torch.Tensor
    values: torch.Tensor
    clusters: KeyClusters
    queries: torch.Tensor
    scores: torch.Tensor
    parent_scores: torch.Tensor | None = None
    child_scores: torch.Tensor | None = None

    @property
    def clustered(self) -> int:
        """M."""
        return self.clusters.order.shape[1]

    @functools.cached_property
    def flat_clusters(self) -> KeyClusters:
        """Without their parents."""
        return replace(self.clusters, parent_centroids=None, parent_offsets=None)


def arrange(
    k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor, clusters: float, parents: float | None, seed: int
) -> LayerContext:
    """A layer's context of k and v [Hkv, N, D] and the window's queries [Hq, W, D]; with parents, call `calibrate`.

    `clusters` and `parents` are shares of the clustered keys.
    """
    n = k.shape[1]
    first, last = clustered_range(n)
    m = last - first
    count = max(1, round(m * clusters))
    limits = {"parents": None if parents is None else max(1, min(count, round(m * parents)))}
    largest = LARGEST_CLUSTER * math.ceil(m / count)
    found = KeyClusters.build(k[:, first:last], count, seed=seed, max_size=largest, **limits)

    def ordered(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([found.permute(x[:, first:last]), x[:, :first], x[:, last:]], 1)

    return with_scores(ordered(k), ordered(v), found, queries)


def clustered_range(n: int) -> tuple[int, int]:
    """[first, last) of the context's keys that are clustered."""
    m = max((n - SINK - WINDOW) // BLOCK, 1) * BLOCK
    first = min(SINK, n - m)
    return first, first + m


def with_scores(keys, values, clusters: KeyClusters, queries) -> LayerContext:
    sizes = clusters.cluster_offsets.diff(dim=-1)
    scores = _best_scores(queries, clusters.centroids, sizes)
    parent_scores = None
    if clusters.parent_centroids is not None:
        parents = _parent_sizes(clusters)
        parent_scores = quantiles(_best_scores(queries, clusters.parent_centroids, parents), parents)
    return LayerContext(keys, values, clusters, queries, quantiles(scores, sizes), parent_scores)


def _parent_sizes(clusters: KeyClusters) -> torch.Tensor:
    """In keys, int32 [Hkv, P]."""
    return clusters.cluster_offsets.gather(1, clusters.parent_offsets.long()).diff(dim=-1)


def _logits(queries: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """float32 [1, Hkv, G, W, C]."""
    heads, group = len(centroids), len(queries) // len(centroids)
    grouped = queries.float().unflatten(0, (heads, group))
    return (grouped @ centroids.float().mT[:, None] / math.sqrt(queries.shape[-1]))[None]


def _best_scores(queries, centroids, sizes) -> torch.Tensor:
    """ln of the best score over the group, float32 [Hkv, W, C]; -inf where a cluster is empty."""
    counted = torch.ones_like(sizes, dtype=torch.bool)[:, None, None]
    return log_scores(_logits(queries, centroids), sizes[:, None, None], counted[None]).amax(2)[0]


def quantiles(scores: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """float32 [Hkv, LEVELS] of scores [Hkv, W, C], in which cluster j counts as sizes[j] keys."""
    flat, order = scores.flatten(1).sort(dim=-1)
    weight = sizes[:, None].expand(scores.shape).flatten(1).gather(1, order).double()
    below = weight.cumsum(1) / weight.sum(1, keepdim=True)
    levels = torch.linspace(0, 1, LEVELS, dtype=torch.float64, device=scores.device).expand(len(scores), -1)
    at = torch.searchsorted(below, levels.contiguous()).clamp(max=flat.shape[1] - 1)
    # An empty cluster has no keys and a score of -inf: the least finite score stands in for it.
    least = flat.masked_fill(flat == -math.inf, math.inf).amin(1, keepdim=True)
    return torch.maximum(flat.gather(1, at), least)


# --- thresholds ------------------------------------------------------------------------------------------------------


def thresholds(tables: Sequence[torch.Tensor], sparsity: float, per_head: bool) -> list[torch.Tensor]:
    """The ln of the score that a share of `sparsity` of the keys does not exceed, float32 [Hkv] of every layer.

    Args:
        tables: [Hkv, LEVELS] of every layer.
        per_head: every head leaves out that share; else one threshold serves all heads and layers, and heads whose
            attention is spread keep more than those that look at a few keys.
    """
    if per_head:
        return [_interpolate(table, sparsity) for table in tables]
    pooled = torch.cat([table.flatten() for table in tables]).sort().values
    one = _interpolate(pooled, sparsity)
    return [one.expand(len(table)) for table in tables]


def _interpolate(table: torch.Tensor, level: float) -> torch.Tensor:
    """Of [..., n] values at n levels from 0 to 1."""
    at = level * (table.shape[-1] - 1)
    low = min(int(at), table.shape[-1] - 2)
    return torch.lerp(table[..., low], table[..., low + 1], at - low)


def parent_sparsity(sparsity: float) -> float:
    """Of the first level, where the clusters below shall leave out `sparsity` of the keys."""
    return max(0.0, 1 - PARENT_ROOM * (1 - sparsity))


def calibrate(layers: Sequence[LayerContext]) -> list[LayerContext]:
    """Adds `child_scores`: of the clusters below the parents that a query keeps, with their own sum, as the lookup
    computes them. Parents are kept by a threshold of all layers together, so this comes after all are arranged."""
    tables: list[list[torch.Tensor]] = [[] for _ in layers]
    for sparsity in PARENT_GRID:
        limits = thresholds([layer.parent_scores for layer in layers], parent_sparsity(sparsity), per_head=False)
        for table, layer, limit in zip(tables, layers, limits, strict=True):
            table.append(_child_quantiles(layer, limit))
    return [replace(layer, child_scores=torch.stack(table)) for layer, table in zip(layers, tables, strict=True)]


def _child_quantiles(layer: LayerContext, limit: torch.Tensor) -> torch.Tensor:
    """With the parents whose ln score exceeds `limit` [Hkv]; clusters of the others score less than any."""
    clusters, queries = layer.clusters, layer.queries
    sizes, children = clusters.cluster_offsets.diff(dim=-1), clusters.parent_offsets.diff(dim=-1).long()
    every = torch.ones(1, len(sizes), 1, children.shape[1], dtype=torch.bool, device=sizes.device)
    kept, _ = select(
        _logits(queries, clusters.parent_centroids), _parent_sizes(clusters), every, limit.exp()[:, None], block_q=1
    )
    parent_of = torch.stack([torch.arange(len(c), device=c.device).repeat_interleave(c) for c in children])
    counted = kept.gather(-1, parent_of[None, :, None].expand(*kept.shape[:3], -1))
    scores = log_scores(_logits(queries, clusters.centroids), sizes[:, None, None], counted[:, :, None]).amax(2)[0]
    return quantiles(scores, sizes)


def child_thresholds(tables: Sequence[torch.Tensor], sparsity: float, per_head: bool) -> list[torch.Tensor]:
    """`thresholds` of `child_scores`, between the two sparsities of PARENT_GRID that enclose this one."""
    above = next(i for i, s in enumerate(PARENT_GRID) if s >= sparsity)
    below = max(above - 1, 0)
    share = (sparsity - PARENT_GRID[below]) / (PARENT_GRID[above] - PARENT_GRID[below]) if above else 0.0
    pairs = zip(*(thresholds([t[i] for t in tables], sparsity, per_head) for i in (below, above)), strict=True)
    return [torch.lerp(low, high, share) for low, high in pairs]


# --- relocation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: pair i of a key at position p is turned by p · inv_freq[i].

    ``interleaved``: pair i is values 2i and 2i + 1, else values i and len(inv_freq) + i. Values past the pairs stay.
    """

    inv_freq: tuple[float, ...]
    interleaved: bool

    def shift(self, x: torch.Tensor, by: int) -> torch.Tensor:
        """Keys or centroids [..., D] as they would be `by` positions later; computed in float64, rounded once."""
        pairs = len(self.inv_freq)
        angle = by * torch.tensor(self.inv_freq, dtype=torch.float64, device=x.device)
        cos, sin = angle.cos(), angle.sin()
        turned = x[..., : 2 * pairs].double()
        a, b = (turned[..., 0::2], turned[..., 1::2]) if self.interleaved else turned.split(pairs, -1)
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack([a, b], -1).flatten(-2) if self.interleaved else torch.cat([a, b], -1)
        return torch.cat([turned.to(x.dtype), x[..., 2 * pairs :]], -1)


def join(chunks: Sequence[LayerContext], rope: Rope) -> LayerContext:
    """One layer's chunks, each of which ends where the next begins; the last stays where it is.

    What is kept of every chunk stays kept, and clusters stay as they are; the thresholds are those of the last window.
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
        torch.cat([chunk.clusters.order + at for chunk, at in zip(chunks, before, strict=True)], 1),
        **parents,
    )
    keys, values = in_order(shifted(lambda chunk: chunk.keys)), in_order([chunk.values for chunk in chunks])
    return with_scores(keys, values, clusters, chunks[-1].queries)

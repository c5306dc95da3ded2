"""Centroid lookup and the clustering of the keys, in plain torch: what the kernels must compute, written to be read.

Scores are computed in the log domain, in float32. For float64 inputs, which the tests use as the truth, they are
float64. No size in the lookup depends on data, so it does not synchronise with the host. The clustering does, but it
runs offline.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def log_scores(logits: torch.Tensor, sizes: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """ln(exp(logit_j) / sum_i size_i exp(logit_i)), with the sum over the `counted` clusters, and -inf for the others.

    Shapes broadcast to [..., C]. The sum is computed by logsumexp, which subtracts the maximum.
    """
    counted = counted & (sizes > 0)
    weights = sizes.clamp(min=1).to(logits.dtype).log()
    total = (logits + weights).masked_fill(~counted, -math.inf).logsumexp(-1, keepdim=True)
    return (logits - total).masked_fill(~counted, -math.inf)


def select(
    logits: torch.Tensor, sizes: torch.Tensor, counted: torch.Tensor, threshold: torch.Tensor, block_q: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept bool, best log score), both [B, Hkv, rows, C], of logits [B, Hkv, G, queries, C].

    A row keeps a cluster if any query of its block and of its group of heads does. `sizes` is [Hkv, C], `counted` is
    [B or 1, Hkv, rows or 1, C], `threshold` is [Hkv or 1, G or 1].
    """
    queries = logits.shape[3]
    row_of_query = torch.arange(queries, device=logits.device) // block_q
    of_query = counted[:, :, row_of_query] if counted.shape[2] > 1 else counted
    scores = log_scores(logits, sizes[:, None, None], of_query.unsqueeze(2))
    # Comparing with a NaN threshold or score gives false, so the cluster is kept.
    kept = ~(scores <= threshold.to(scores.dtype).clamp(min=0).log()[..., None, None]) & (scores != -math.inf)
    return _of_rows(kept, scores, block_q)


def _of_rows(kept: torch.Tensor, scores: torch.Tensor, block_q: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins the clusters that queries keep over their blocks and groups.

    `kept` and `scores` are [B, Hkv, G, queries, C]. Returns the kept clusters and their best scores [B, Hkv, rows, C].
    """
    queries = scores.shape[3]

    def over_block(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, -queries % block_q), value=-math.inf).unflatten(2, (-1, block_q)).amax(3)

    best = over_block(scores.masked_fill(~kept, -math.inf).amax(2))
    return over_block(kept.to(scores.dtype).amax(2)) > 0, best


def centroid_lookup(
    q,
    centroids,
    cluster_offsets,
    threshold,
    *,
    scale: float,
    block_q: int,
    max_columns: int,
    parent_centroids=None,
    parent_offsets=None,
    parent_threshold=None,
):
    b, hq, nq, d = q.shape
    hkv, c, _ = centroids.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q.reshape(b, hkv, hq // hkv, nq, d)
    sizes = cluster_offsets.diff(dim=-1).clamp(min=0)
    threshold = _of_heads(threshold, hkv, hq)
    block_q = max(1, min(block_q, nq))
    counts, columns = [], []
    # At most 2^23 scores or columns at a time, but at least one block of queries.
    chunk = max(1, 2**23 // max(1, b * max(hq * block_q * c, hkv * max_columns))) * block_q
    for first in range(0, max(nq, 1), chunk):
        part = q[:, :, :, first : first + chunk].to(work)
        counted = torch.ones(1, hkv, 1, c, dtype=torch.bool, device=q.device)
        if parent_centroids is not None:
            bounds = cluster_offsets.long().gather(1, parent_offsets.long())
            logits = part @ parent_centroids.to(work).mT[:, None] * scale
            parents = torch.ones_like(counted[..., :1])
            kept, _ = select(
                logits, bounds.diff(dim=-1).clamp(min=0), parents, _of_heads(parent_threshold, hkv, hq), block_q
            )
            counted = kept.gather(-1, _parent_of_cluster(parent_offsets, c)[None, :, None].expand(*kept.shape[:3], c))
        kept, best = select(part @ centroids.to(work).mT[:, None] * scale, sizes, counted, threshold, block_q)
        taken = fill(kept, best, sizes, max_columns)
        counts.append(taken.sum(-1, dtype=torch.int32))
        columns.append(expand_runs(cluster_offsets, taken, max_columns))
    return torch.cat(counts, 2), torch.cat(columns, 2)


def centroid_top_p(q, centroids, cluster_offsets, mass: float, *, scale: float, block_q: int, max_columns: int):
    """(column_count, column_index) of the fewest best-scoring clusters that hold `mass` of every query's attention."""
    b, hq, nq, d = q.shape
    hkv = centroids.shape[0]
    sizes = cluster_offsets.diff(dim=-1).clamp(min=0)
    logits = q.reshape(b, hkv, hq // hkv, nq, d).float() @ centroids.float().mT[:, None] * scale
    scores = log_scores(logits, sizes[:, None, None], torch.ones_like(sizes, dtype=torch.bool)[None, :, None, None])
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    held = ranked.exp() * sizes[None, :, None, None].expand_as(order).gather(-1, order)
    before = held.cumsum(-1) - held
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(
        -1, order, ((before < mass) | (mass == 1)) & (ranked != -math.inf)
    )
    kept, best = _of_rows(kept, scores, max(1, min(block_q, nq)))
    taken = fill(kept, best, sizes, max_columns)
    return taken.sum(-1, dtype=torch.int32), expand_runs(cluster_offsets, taken, max_columns)


def _of_heads(threshold: torch.Tensor, hkv: int, hq: int) -> torch.Tensor:
    """Reshapes a threshold of one value, [Hkv] or [Hq] to [Hkv or 1, G or 1]."""
    return threshold.reshape(hkv, hq // hkv) if threshold.numel() == hq else threshold.reshape(-1, 1)


def _parent_of_cluster(parent_offsets: torch.Tensor, clusters: int) -> torch.Tensor:
    """The parent of every cluster, int64 [Hkv, C]."""
    ids = torch.arange(clusters, device=parent_offsets.device, dtype=parent_offsets.dtype)
    ids = ids.expand(parent_offsets.shape[0], -1).contiguous()
    parents = parent_offsets.shape[1] - 1
    return (torch.searchsorted(parent_offsets.contiguous(), ids, right=True) - 1).clamp(0, parents - 1)


def fill(kept: torch.Tensor, best: torch.Tensor, sizes: torch.Tensor, capacity: int) -> torch.Tensor:
    """The number of keys of each cluster that a row takes, int64 [B, Hkv, R, C].

    A row takes all keys of the kept clusters if they fit. Otherwise it takes the clusters with the best scores, and the
    last one is cut to fit. Of two clusters with equal scores, the one with the lower id comes first.
    """
    sizes = torch.where(kept, sizes[None, :, None].long(), 0)
    order = best.masked_fill(~kept, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    ranked = sizes.gather(-1, order)
    room = (capacity - (ranked.cumsum(-1) - ranked)).clamp(min=0)
    return torch.zeros_like(sizes).scatter(-1, order, torch.minimum(ranked, room))


def expand_runs(cluster_offsets: torch.Tensor, taken: torch.Tensor, capacity: int) -> torch.Tensor:
    """The positions of the first taken[j] keys of every cluster j, in ascending order, int32 [B, Hkv, R, capacity]."""
    ends = taken.cumsum(-1)
    slots = torch.arange(capacity, device=taken.device)
    slots = slots.expand(*taken.shape[:-1], capacity).contiguous()
    cluster = torch.searchsorted(ends, slots, right=True).clamp(max=taken.shape[-1] - 1)
    starts = cluster_offsets[:, :-1].long()[None, :, None].expand_as(taken)
    position = (starts - (ends - taken)).gather(-1, cluster) + slots
    return torch.where(slots < ends[..., -1:], position, 0).to(torch.int32)


# --- clustering (offline) -------------------------------------------------------------------------------------------


def cluster(
    k: torch.Tensor,
    num_clusters: int,
    seed: int,
    parents: int | None,
    max_size: int | None = None,
    iterations: int = 10,
) -> tuple[torch.Tensor, ...]:
    """k [Hkv, N, D] to (centroids, cluster_offsets, order), or with parents (..., parent_centroids, parent_offsets).

    Keys and centroids are clustered by cosine. A centroid is the mean of its cluster's keys, which are not normalised
    for it. The children of a parent are contiguous clusters. The keys of a cluster are contiguous, in ascending order.
    """
    assigned = spherical_kmeans(k, num_clusters, seed, iterations)
    if max_size is not None:
        assigned = split(assigned, num_clusters, max_size)
        num_clusters = int(assigned.max()) + 1
    if parents is not None:
        parents = min(parents, num_clusters)
        order, offsets = _runs(assigned, num_clusters)
        means = _means(k, order, offsets)
        parent_of = spherical_kmeans(means, parents, seed, iterations)
        by_parent, parent_offsets = _runs(parent_of, parents)
        assigned = by_parent.argsort(-1).gather(1, assigned)
    order, offsets = _runs(assigned, num_clusters)
    result = (_means(k, order, offsets).to(k.dtype), offsets.to(torch.int32), order.to(torch.int32))
    if parents is None:
        return result
    parent_keys = offsets.gather(1, parent_offsets)
    return *result, _means(k, order, parent_keys).to(k.dtype), parent_offsets.to(torch.int32)


def _runs(assigned: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [H, N] to (order [H, N], offsets [H, count + 1]).

    The members of label j are order[offsets[j] : offsets[j + 1]].
    """
    sizes = torch.zeros(assigned.shape[0], count, dtype=torch.int64, device=assigned.device)
    sizes.scatter_add_(1, assigned, torch.ones_like(assigned))
    return assigned.argsort(dim=-1, stable=True), F.pad(sizes.cumsum(1), (1, 0))


def split(assigned: torch.Tensor, count: int, max_size: int) -> torch.Tensor:
    """New labels [H, N], in which no cluster has more than max_size members.

    A larger cluster is cut, in the order of its members, into pieces of nearly equal size. Empty clusters are left out.
    So heads can end with different numbers of labels.
    """
    order, offsets = _runs(assigned, count)
    sizes = offsets.diff(dim=-1)
    pieces = -(-sizes // max_size)
    member = assigned.gather(1, order)
    rank = torch.arange(assigned.shape[1], device=assigned.device) - offsets.gather(1, member)
    piece = rank * pieces.gather(1, member) // sizes.gather(1, member)
    label = (pieces.cumsum(1) - pieces).gather(1, member) + piece
    return torch.empty_like(assigned).scatter_(1, order, label)


def _sums(x: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sums of x [H, N, D] over the runs of `order`, float32 [H, runs, D]. Unlike atomics, it adds in a fixed order."""
    h, n, d = x.shape
    rows = (order + n * torch.arange(h, device=x.device)[:, None]).flatten()
    starts = (offsets[:, :-1] + n * torch.arange(h, device=x.device)[:, None]).flatten()
    return F.embedding_bag(rows, x.reshape(h * n, d).float(), starts, mode="sum").unflatten(0, (h, -1))


def _means(x: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Means of x [H, N, D] over the runs of `order`, float32 [H, runs, D]. The mean of an empty run is 0."""
    return _sums(x, order, offsets) / offsets.diff(dim=-1).clamp(min=1).unsqueeze(-1)


SETTLED = 0.01  # stop when this share of the points moves, or less: further rounds add only 0.001 to the mean cosine


def spherical_kmeans(x: torch.Tensor, count: int, seed: int, iterations: int) -> torch.Tensor:
    """Labels int64 [H, N] of x [H, N, D], clustered by cosine. Every head is clustered separately.

    It begins with k-means++ in at most 16 rounds. Each round draws many centres at once, by their squared distance from
    the centres of earlier rounds. A cluster that becomes empty restarts at one of the points that fit worst. It ends
    after `iterations` rounds, or as soon as at most the share `SETTLED` of the points moves.
    """
    x = F.normalize(x.float(), dim=-1)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    centres = _initial_centres(x, count, generator)
    labels, fit = _nearest(x, centres)
    for _ in range(iterations):
        order, offsets = _runs(labels, count)
        centres = F.normalize(_sums(x, order, offsets), dim=-1)
        empty = offsets.diff(dim=-1) == 0
        if bool(empty.any()):
            worst = fit.topk(int(empty.sum(1).max()), largest=False).indices
            spare = worst.gather(1, (empty.cumsum(1) - 1).clamp(0, worst.shape[1] - 1))
            restart = x.gather(1, spare.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            centres = torch.where(empty.unsqueeze(-1), restart, centres)
        before, (labels, fit) = labels, _nearest(x, centres)
        if (labels != before).sum() <= SETTLED * labels.numel():
            break
    return labels


def _initial_centres(x: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    h, n, d = x.shape
    distance = torch.ones(h, n, device=x.device)
    rounds = min(count, 16)
    drawn = [count * (r + 1) // rounds - count * r // rounds for r in range(rounds)]
    centres = []
    for number in drawn:
        # Draws without replacement: each point gets an exponential random number / its weight, and the smallest win.
        race = torch.empty(h, n).exponential_(generator=generator).to(x.device)
        winners = (race / distance.clamp(min=1e-9)).topk(number, largest=False).indices
        centres.append(x.gather(1, winners.unsqueeze(-1).expand(-1, -1, d)))
        distance = torch.minimum(distance, 1 - _nearest(x, centres[-1])[1])
    return torch.cat(centres, 1)


def _nearest(x: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, cosine) [H, N] of the nearest centre. It computes 2^20 cosines at a time, which fit a CPU's cache."""
    chunk = max(1, 2**20 // (x.shape[0] * centres.shape[1]))
    fits, labels = zip(*((part @ centres.mT).max(-1) for part in x.split(chunk, 1)), strict=True)
    return torch.cat(labels, 1), torch.cat(fits, 1)

"""Centroid lookup: which keys of a fixed context a block of queries needs, found by comparing it with centroids.

Squeezed Attention (Hooper et al., 2024, arXiv 2411.09688) clusters the keys of a context that many requests share
ahead of time, and attends only the clusters whose centroid scores above a threshold. Here keys are stored in cluster
order, so a cluster is a run of positions; a selection is made per KV head (over its group of query heads) and per
block of queries; and the result is the columns of a `BlockIndex`, which `sparse_attention` attends in place.

Kernels: `csrc/cpu/centroid_lookup.cpp`, `csrc/cuda/centroid_lookup.cu`, `triton/centroid_lookup.py`; the maths in plain
torch, and the clustering: `reference/centroid_lookup.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import _library
from ..reference import centroid_lookup as reference
from . import _checks


@dataclass(frozen=True)
class KeyClusters:
    """The clusters of a fixed context's N keys, every KV head by itself.

    - ``centroids`` [Hkv, C, D]: the mean of each cluster's keys; 0 where the cluster is empty;
    - ``cluster_offsets`` int32 [Hkv, C + 1]: cluster j is the permuted keys ``cluster_offsets[j]`` to
      ``cluster_offsets[j + 1]``; from 0 to N;
    - ``order`` int32 [Hkv, N]: the permuted key i is key ``order[i]`` of the context;
    - ``parent_centroids`` [Hkv, P, D] and ``parent_offsets`` int32 [Hkv, P + 1], optional: parent p's children are the
      clusters ``parent_offsets[p]`` to ``parent_offsets[p + 1]``; from 0 to C.
    """

    centroids: torch.Tensor
    cluster_offsets: torch.Tensor
    order: torch.Tensor
    parent_centroids: torch.Tensor | None = None
    parent_offsets: torch.Tensor | None = None

    def __post_init__(self):
        op = "KeyClusters"
        _checks.tensor(op, "centroids", self.centroids, _checks.FLOAT_DTYPES, ("Hkv", "C", "D"))
        _check_clusters(op, self.centroids, self.cluster_offsets, self.parent_centroids, self.parent_offsets)
        heads = self.centroids.shape[0]
        _checks.tensor(op, "order", self.order, torch.int32, (heads, "N"), like=self.centroids)

    @classmethod
    def build(
        cls,
        k: torch.Tensor,
        num_clusters: int,
        *,
        seed: int = 0,
        parents: int | None = None,
        max_size: int | None = None,
    ) -> KeyClusters:
        """Clusters the keys k [Hkv, N, D] of a fixed context by K-means on their directions (cosine).

        A centroid is the mean of the keys as they are, in k's dtype. The same seed gives the same clusters. `parents`
        adds a level above: the centroids themselves, clustered into so many. `max_size` cuts larger clusters into
        pieces and leaves empty ones out, so there may be more clusters or fewer than asked for; heads that end with
        fewer than others have empty ones at the end.
        """
        op = "KeyClusters.build"
        _checks.tensor(op, "k", k, _checks.FLOAT_DTYPES, ("Hkv", "N", "D"))
        n = k.shape[1]
        _checks.expect(1 <= num_clusters <= n, op, "num_clusters", f"1 to {n}, the number of keys", num_clusters)
        if parents is not None:
            _checks.expect(1 <= parents <= num_clusters, op, "parents", f"1 to {num_clusters}", parents)
        if max_size is not None:
            _checks.expect(max_size >= 1, op, "max_size", "a positive number", max_size)
        _checks.expect(bool(torch.isfinite(k).all()), op, "k", "finite keys", "inf or nan")
        return cls(*reference.cluster(k, num_clusters, seed, parents, max_size)).validate(op)

    def permute(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values [..., Hkv, N, D] of the context, in cluster order."""
        heads, n = self.order.shape
        _checks.expect(
            x.dim() >= 3 and x.shape[-3:-1] == (heads, n),
            "KeyClusters.permute",
            "x",
            f"[..., {heads}, {n}, D]",
            _checks.describe(x),
        )
        return x.gather(-2, self.order.long().unsqueeze(-1).expand(x.shape))

    def to(self, device: torch.device | str) -> KeyClusters:
        """The same clusters on another device."""
        tensors = (self.centroids, self.cluster_offsets, self.order, self.parent_centroids, self.parent_offsets)
        return KeyClusters(*(None if t is None else t.to(device) for t in tensors))

    def validate(self, op: str = "KeyClusters.validate") -> KeyClusters:
        """Reads the data and raises a ValueError that names the damaged tensor, if one is; returns self."""
        n, c = self.order.shape[1], self.centroids.shape[1]
        _check_offsets(op, "cluster_offsets", self.cluster_offsets, n)
        in_order = torch.arange(n, device=self.order.device, dtype=torch.int32).expand_as(self.order)
        is_permutation = torch.equal(self.order.sort(-1).values, in_order)
        _checks.expect(is_permutation, op, "order", f"a permutation of 0 to {n - 1} a head", "a repeat or a gap")
        for argument, x in (("centroids", self.centroids), ("parent_centroids", self.parent_centroids)):
            _checks.expect(x is None or bool(torch.isfinite(x).all()), op, argument, "finite numbers", "inf or nan")
        if self.parent_offsets is not None:
            _check_offsets(op, "parent_offsets", self.parent_offsets, c)
        return self


def centroid_lookup(
    q: torch.Tensor,
    clusters: KeyClusters,
    threshold: torch.Tensor | float,
    *,
    scale: float | None = None,
    block_q: int = 64,
    parent_threshold: torch.Tensor | float | None = None,
    max_columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of a fixed context that each block of queries attends.

    With n_j the number of keys of cluster j and c_j its centroid, cluster j is kept for a row where, for any query of
    the row's block and of the KV head's group::

        exp(scale * q·c_j) / sum_i n_i exp(scale * q·c_i) > threshold

    computed in the log domain; empty clusters are neither kept nor counted. With parents, parents are kept so first
    (n_p their keys, `parent_threshold`), and then only children of parents that the row kept are scored, the sum
    restricted to them.

    Args:
        q: [B, Hq, Nq, D], last dim contiguous; D a multiple of 8 up to 256.
        clusters: `KeyClusters` of Hkv heads in q's dtype, Hkv divides Hq, shared by the batch.
        threshold: a number, or float32 of one value, [Hkv] or [Hq]. 0 or less keeps every cluster. NaN is an error on
            the CPU, and keeps every cluster elsewhere.
        scale: 1 / sqrt(D) if None.
        block_q: queries that share a selection, any positive number; `sparse_attention` takes 64 and 128.
        parent_threshold: like `threshold`; needed where the clusters have parents, and None where not.
        max_columns: room for so many keys a row, all N if None. Past it the best-scoring clusters are kept, the last
            of them cut to fit.

    Returns:
        column_count int32 [B, Hkv, R] and column_index int32 [B, Hkv, R, min(max_columns, N)], R = ceil(Nq / block_q):
        positions among the permuted keys, ascending. Entries past the count are unspecified, as `sparse_attention`
        ignores them: a row has room for every key, and most of it is never touched.

    Raises:
        ValueError or RuntimeError: naming the argument, what was expected and what was got.

    Source: Squeezed Attention (arXiv 2411.09688), section 3, for grouped heads, blocks and batches.
    """
    op = "centroid_lookup"
    _checks.expect(isinstance(clusters, KeyClusters), op, "clusters", "KeyClusters", type(clusters).__name__)
    n = clusters.order.shape[1]

    def as_tensor(value):
        return (
            value
            if isinstance(value, torch.Tensor | None)
            else torch.full((1,), value, dtype=torch.float32, device=q.device)
        )

    return _centroid_lookup(
        q,
        clusters.centroids,
        clusters.cluster_offsets,
        as_tensor(threshold),
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        block_q=block_q,
        parent_centroids=clusters.parent_centroids,
        parent_offsets=clusters.parent_offsets,
        parent_threshold=as_tensor(parent_threshold),
        max_columns=n if max_columns is None else min(max_columns, n),
    )


def centroid_top_p(
    q: torch.Tensor,
    clusters: KeyClusters,
    mass: float,
    *,
    scale: float | None = None,
    block_q: int = 64,
    max_columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `centroid_lookup`, by the mass that is kept instead of a threshold: for every query the fewest best-scoring
    clusters, without regard to parents, whose keys hold a share of `mass` (0 to 1) of its attention, as the centroids
    estimate it: sum over them of n_j exp(scale * q·c_j) / sum_i n_i exp(scale * q·c_i).

    In plain torch on every device: a sort of all scores, which the threshold spares.

    Source: Double-P (size-weighted centroid top-p).
    """
    op = "centroid_top_p"
    _checks.expect(isinstance(clusters, KeyClusters), op, "clusters", "KeyClusters", type(clusters).__name__)
    good = isinstance(mass, float | int) and 0 < mass <= 1
    _checks.expect(good, op, "mass", "a share above 0 and up to 1", mass)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    _check(q, clusters.centroids, clusters.cluster_offsets, q.new_zeros(1).float(), scale, block_q, *(None,) * 4)
    n = clusters.order.shape[1]
    return reference.centroid_top_p(
        q,
        clusters.centroids,
        clusters.cluster_offsets,
        mass,
        scale=scale,
        block_q=block_q,
        max_columns=n if max_columns is None else min(max_columns, n),
    )


# --- the contract: checks, fake kernel, schema ----------------------------------------------------------------------


def _check_clusters(op, centroids, cluster_offsets, parent_centroids, parent_offsets):
    heads, count, d = centroids.shape
    _checks.expect(count > 0, op, "centroids", "at least one cluster", count)
    _checks.contiguous_last(op, "centroids", centroids)
    _checks.tensor(op, "cluster_offsets", cluster_offsets, torch.int32, (heads, count + 1), like=centroids)
    if (parent_centroids is None) != (parent_offsets is None):
        missing = "parent_offsets" if parent_offsets is None else "parent_centroids"
        _checks.fail(op, missing, "a tensor, since its partner is given", None)
    if parent_centroids is not None:
        _checks.tensor(op, "parent_centroids", parent_centroids, centroids.dtype, (heads, "P", d), like=centroids)
        _checks.contiguous_last(op, "parent_centroids", parent_centroids)
        parents = parent_centroids.shape[1]
        _checks.expect(parents > 0, op, "parent_centroids", "at least one parent", parents)
        _checks.tensor(op, "parent_offsets", parent_offsets, torch.int32, (heads, parents + 1), like=centroids)


def _check_threshold(op, argument, threshold, hkv, hq, like):
    shape = ("1, Hkv or Hq",) if threshold.dim() else ()
    _checks.tensor(op, argument, threshold, torch.float32, shape, like=like)
    size = threshold.numel()
    _checks.expect(size in (1, hkv, hq), op, argument, f"1, {hkv} or {hq} values", size)


def _check_offsets(op, argument, offsets, last):
    """Data: every head's offsets rise from 0 to `last` (to anything if None)."""
    ends = offsets[:, -1]
    good = (offsets[:, 0] == 0) & (offsets.diff(dim=-1) >= 0).all(-1) & ((ends == last) if last is not None else True)
    if not bool(good.all()):
        head = int((~good).nonzero()[0])
        wanted = f"offsets that rise from 0 to {last}" if last is not None else "offsets that rise from 0"
        _checks.fail(op, argument, wanted, f"{offsets[head].tolist()[:8]}... in head {head}, ending at {ends[head]}")


def _check(
    q,
    centroids,
    cluster_offsets,
    threshold,
    scale,
    block_q,
    parent_centroids,
    parent_offsets,
    parent_threshold,
    max_columns,
):
    op = "centroid_lookup"
    _checks.tensor(op, "q", q, _checks.FLOAT_DTYPES, ("B", "Hq", "Nq", "D"))
    hq, d = q.shape[1], q.shape[3]
    _checks.head_dim(op, d)
    _checks.contiguous_last(op, "q", q)
    _checks.tensor(op, "centroids", centroids, q.dtype, ("Hkv", "C", d), like=q)
    hkv = centroids.shape[0]
    _checks.expect(hkv > 0 and hq % hkv == 0, op, "centroids", f"a number of heads that divides q's {hq}", hkv)
    _check_clusters(op, centroids, cluster_offsets, parent_centroids, parent_offsets)
    _check_threshold(op, "threshold", threshold, hkv, hq, like=q)
    if (parent_centroids is None) != (parent_threshold is None):
        wanted = "None, since there are no parents" if parent_centroids is None else "a threshold for the parents"
        _checks.fail(op, "parent_threshold", wanted, "one" if parent_centroids is None else None)
    if parent_threshold is not None:
        _check_threshold(op, "parent_threshold", parent_threshold, hkv, hq, like=q)
    _checks.finite(op, "scale", scale)
    _checks.expect(block_q > 0, op, "block_q", "a positive number", block_q)
    if max_columns is not None:
        _checks.expect(max_columns >= 0, op, "max_columns", "no negative number", max_columns)


def _check_data(cluster_offsets, threshold, parent_offsets, parent_threshold, clusters):
    """On the CPU only, where reading data costs no synchronisation."""
    op = "centroid_lookup"
    _check_offsets(op, "cluster_offsets", cluster_offsets, None)
    if parent_offsets is not None:
        _check_offsets(op, "parent_offsets", parent_offsets, clusters)
    for argument, value in (("threshold", threshold), ("parent_threshold", parent_threshold)):
        _checks.expect(value is None or not bool(value.isnan().any()), op, argument, "numbers", "nan")


def _centroid_lookup_impl(
    q,
    centroids,
    cluster_offsets,
    threshold,
    *,
    scale,
    block_q,
    parent_centroids=None,
    parent_offsets=None,
    parent_threshold=None,
    max_columns=None,
):
    parents = (parent_centroids, parent_offsets, parent_threshold)
    _check(q, centroids, cluster_offsets, threshold, scale, block_q, *parents, max_columns)
    if max_columns is None:
        max_columns = int(cluster_offsets[:, -1].max())
    if q.device.type == "cpu":
        _check_data(cluster_offsets, threshold, parent_offsets, parent_threshold, centroids.shape[1])
    return reference.centroid_lookup(
        q,
        centroids,
        cluster_offsets,
        threshold,
        scale=scale,
        block_q=block_q,
        max_columns=max_columns,
        parent_centroids=parent_centroids,
        parent_offsets=parent_offsets,
        parent_threshold=parent_threshold,
    )


def _centroid_lookup_triton(
    q,
    centroids,
    cluster_offsets,
    threshold,
    *,
    scale,
    block_q,
    parent_centroids=None,
    parent_offsets=None,
    parent_threshold=None,
    max_columns=None,
):
    from ..triton import centroid_lookup as kernels

    parents = (parent_centroids, parent_offsets, parent_threshold)
    _check(q, centroids, cluster_offsets, threshold, scale, block_q, *parents, max_columns)
    return kernels.centroid_lookup(
        q,
        centroids,
        cluster_offsets,
        threshold,
        scale=scale,
        block_q=block_q,
        max_columns=int(cluster_offsets[:, -1].max()) if max_columns is None else max_columns,
        parent_centroids=parent_centroids,
        parent_offsets=parent_offsets,
        parent_threshold=parent_threshold,
    )


def _centroid_lookup_fake(
    q,
    centroids,
    cluster_offsets,
    threshold,
    *,
    scale,
    block_q,
    parent_centroids=None,
    parent_offsets=None,
    parent_threshold=None,
    max_columns=None,
):
    parents = (parent_centroids, parent_offsets, parent_threshold)
    _check(q, centroids, cluster_offsets, threshold, scale, block_q, *parents, max_columns)
    if max_columns is None:
        max_columns = torch.library.get_ctx().new_dynamic_size()
    rows = (q.shape[0], centroids.shape[0], -(-q.shape[2] // block_q))
    return q.new_empty(rows, dtype=torch.int32), q.new_empty((*rows, max_columns), dtype=torch.int32)


# The keys are not among the arguments, so without max_columns the op reads their number from cluster_offsets: a host
# synchronisation on a GPU, and an output size that depends on data. `headstart.centroid_lookup` always passes it.
_centroid_lookup = _library.define(
    "centroid_lookup",
    "(Tensor q, Tensor centroids, Tensor cluster_offsets, Tensor threshold, *, float scale, int block_q, "
    "Tensor? parent_centroids=None, Tensor? parent_offsets=None, Tensor? parent_threshold=None, "
    "SymInt? max_columns=None) -> (Tensor column_count, Tensor column_index)",
    reference=_centroid_lookup_impl,
    fake=_centroid_lookup_fake,
    triton=_centroid_lookup_triton,
)

"""Centroid lookup: comparing a block of queries with centroids finds the keys of a fixed context that it needs.

Squeezed Attention (Hooper et al., 2024, arXiv 2411.09688) takes a context that many requests share and clusters its
keys ahead of time. A query then attends only the clusters whose centroid scores above a threshold. headstart stores the
keys in cluster order, so a cluster is a run of positions. It makes one selection for each KV head (over its group of
query heads) and each block of queries. The result is the columns of a `BlockIndex`, with which `sparse_attention` reads
the keys in place.

Kernels: `csrc/cpu/centroid_lookup.cpp`, `csrc/cuda/centroid_lookup.cu`, `triton/centroid_lookup.py`. The maths in plain
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
    """The clusters of a fixed context's N keys. Every KV head has its own clusters.

    - ``centroids`` [Hkv, C, D], float32, float16 or bfloat16: the mean of each cluster's keys, 0 for an empty cluster.
    - ``cluster_offsets`` int32 [Hkv, C + 1], from 0 to N: cluster j is the permuted keys ``cluster_offsets[j]`` to
      ``cluster_offsets[j + 1]``.
    - ``order`` int32 [Hkv, N]: the permuted key i is key ``order[i]`` of the context.
    - ``parent_centroids`` [Hkv, P, D] and ``parent_offsets`` int32 [Hkv, P + 1], from 0 to C, optional: parent p's
      children are the clusters ``parent_offsets[p]`` to ``parent_offsets[p + 1]``.

    Raises a ValueError if a dtype, a shape or a device is wrong. `validate` checks the data.
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

        A centroid is the mean of its cluster's keys, not of their directions, in k's dtype.

        Args:
            k: [Hkv, N, D], float32, float16 or bfloat16.
            num_clusters: clusters of each head, 1 to N.
            seed: the same seed gives the same clusters.
            parents: adds a second level, where the centroids themselves are clustered into this number of parents.
            max_size: cuts clusters with more keys into pieces, and leaves empty clusters out. So the number of clusters
                may be larger or smaller than `num_clusters`. A head with fewer clusters than another has empty ones at
                the end.

        Raises:
            ValueError: an argument is wrong, or a key is not finite.
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
        """Puts keys or values x [..., Hkv, N, D] of the context in cluster order."""
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
        """Reads the data, raises a ValueError that names the tensor if one is damaged, and returns self."""
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

    Let n_j be the number of keys of cluster j, and c_j its centroid. A row is one block of queries of one KV head. It
    keeps cluster j if the following holds for any query of the block and any query head of the KV head's group::

        exp(scale * q·c_j) / sum_i n_i exp(scale * q·c_i) > threshold

    This is computed in the log domain. Empty clusters are neither kept nor counted. If the clusters have parents, the
    row first chooses parents in the same way, with the number of their keys as n and with `parent_threshold`. Then only
    the children of the parents that it keeps are scored, and the sum runs over them alone.

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16, last dim contiguous. D is a multiple of 8 up to 256.
        clusters: `KeyClusters` of Hkv heads in q's dtype, used for the whole batch. Hkv divides Hq.
        threshold: a number, or a float32 tensor of one value, [Hkv] or [Hq]. 0 or less keeps every cluster. NaN is an
            error on the CPU, and keeps every cluster on a GPU.
        scale: 1 / sqrt(D) if None.
        block_q: queries that share a selection, any positive number. `sparse_attention` needs 64 or 128.
        parent_threshold: like `threshold`. It must be given if the clusters have parents, and only then.
        max_columns: the most keys a row can get, all N if None. If the kept clusters have more keys, the row gets the
            best-scoring clusters, and the last of them is cut to fit.

    Returns:
        column_count int32 [B, Hkv, R] and column_index int32 [B, Hkv, R, min(max_columns, N)], R = ceil(Nq / block_q).
        The indices are positions among the permuted keys, in ascending order. Entries past the count are unspecified.
        `sparse_attention` ignores them. A row has room for every key, and most of that room is never written or read.

    Raises:
        ValueError or RuntimeError: an argument is wrong. The message names it, what was expected and what was got.

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
    """Like `centroid_lookup`, but selects clusters by the attention mass that they hold instead of by a threshold.

    The centroids estimate the share of a query's attention that the keys of cluster j hold::

        share_j = n_j exp(scale * q·c_j) / sum_i n_i exp(scale * q·c_i)

    For every query, the best-scoring clusters are kept, as few as hold at least `mass` of its attention together. A row
    keeps what any of its queries keeps. Parents are not used. The function runs in plain torch on every device, and
    sorts all scores, which `centroid_lookup` need not do.

    Args:
        mass: a share above 0 and up to 1.
        q, clusters, scale, block_q, max_columns: as in `centroid_lookup`.

    Returns:
        column_count int32 [B, Hkv, R] and column_index int32 [B, Hkv, R, min(max_columns, N)], as `centroid_lookup`.

    Raises:
        ValueError: an argument is wrong. The message names it, what was expected and what was got.

    Source: Double-P (size-weighted centroid top-p).
    """
    op = "centroid_top_p"
    _checks.expect(isinstance(clusters, KeyClusters), op, "clusters", "KeyClusters", type(clusters).__name__)
    good = isinstance(mass, float | int) and 0 < mass <= 1
    _checks.expect(good, op, "mass", "a share above 0 and up to 1", mass)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    threshold = q.new_zeros(1).float()
    parents = None, None, None
    _check(q, clusters.centroids, clusters.cluster_offsets, threshold, scale, block_q, *parents, max_columns, op=op)
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
    """Checks that every head's offsets rise from 0 to `last`, or to any number if it is None."""
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
    op="centroid_lookup",
):
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
    """Checks the offsets and thresholds. Only on the CPU, where reading data costs no synchronisation."""
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


# The keys are not among the arguments. So without max_columns the operator reads their number from cluster_offsets,
# which on a GPU synchronises with the host, and the output size depends on data. `headstart.centroid_lookup` always
# passes max_columns.
_centroid_lookup = _library.define(
    "centroid_lookup",
    "(Tensor q, Tensor centroids, Tensor cluster_offsets, Tensor threshold, *, float scale, int block_q, "
    "Tensor? parent_centroids=None, Tensor? parent_offsets=None, Tensor? parent_threshold=None, "
    "SymInt? max_columns=None) -> (Tensor column_count, Tensor column_index)",
    reference=_centroid_lookup_impl,
    fake=_centroid_lookup_fake,
    triton=_centroid_lookup_triton,
)

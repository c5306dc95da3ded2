"""centroid_lookup in the lane model."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lane_model import DTYPES, Tensor4, check, library


class CentroidLevel(ctypes.Structure):  # csrc/arguments.h
    _fields_ = [
        ("centroids", Tensor4),
        ("run_offsets", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("thresholds", ctypes.c_int64),
    ]

    def fill(self, centroids, offsets, threshold):
        """Returns what must outlive the call."""
        kept = [centroids, offsets.contiguous(), threshold.contiguous()]
        self.centroids = Tensor4(centroids.data_ptr(), 0, *centroids.stride()[:2])
        self.run_offsets, self.threshold = (x.data_ptr() for x in kept[1:])
        self.count, self.thresholds = centroids.shape[1], threshold.numel()
        return kept


class CentroidLookupArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("q", Tensor4),
        ("clusters", CentroidLevel),
        ("parents", CentroidLevel),
        *((name, ctypes.c_int64) for name in ("batch", "heads_q", "heads_kv", "nq", "head_dim", "block_q")),
        ("scale", ctypes.c_float),
        ("column_count", ctypes.c_void_p),
        ("column_index", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
    ]


def opened() -> ctypes.CDLL:
    kernels = library("centroid_lookup", "centroid_lookup.cu")
    kernels.centroid_lookup.restype = ctypes.c_char_p
    return kernels


@contextmanager
def operators(variant: str) -> Iterator[dict[str, Callable]]:
    kernels = opened()
    kernels.descending("descending" in variant)
    kernels.warp_groups("wgmma" in variant)
    try:
        yield {"centroid_lookup": centroid_lookup}
    finally:
        kernels.descending(False)
        kernels.warp_groups(False)


def centroid_lookup(
    q, centroids, cluster_offsets, threshold, *, scale, block_q, max_columns, parent_centroids=None,
    parent_offsets=None, parent_threshold=None
):  # fmt: skip
    """Into an index that was -7, between entries that must stay."""
    args = CentroidLookupArgs()
    args.dtype = DTYPES.index(q.dtype)
    args.q = Tensor4(q.data_ptr(), *q.stride()[:3])
    kept = args.clusters.fill(centroids, cluster_offsets, threshold)
    if parent_centroids is not None:
        kept += args.parents.fill(parent_centroids, parent_offsets, parent_threshold)
    args.batch, args.heads_q, args.nq, args.head_dim = q.shape
    args.heads_kv = centroids.shape[0]
    args.block_q = min(block_q, args.nq)
    args.scale, args.capacity = scale, max_columns
    rows = -(-args.nq // args.block_q)
    count = torch.full((args.batch, args.heads_kv, rows), -7, dtype=torch.int32)
    guarded = torch.full((count.numel() * max_columns + 64,), -7, dtype=torch.int32)
    args.column_count, args.column_index = count.data_ptr(), guarded[32:].data_ptr()
    check(opened().centroid_lookup(ctypes.byref(args)))
    assert (guarded[:32] == -7).all() and (guarded[-32:] == -7).all(), "a write outside the output"
    return count, guarded[32:-32].view(*count.shape, max_columns)

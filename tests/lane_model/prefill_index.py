"""The index builders in the lane model."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lane_model import DTYPES, Tensor4, check, library, pointer

NO_CAP = 2**40
UNWRITTEN = -7


class PrefillIndexArgs(ctypes.Structure):  # csrc/arguments.h
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("q", Tensor4),
        ("k", Tensor4),
        ("kv_start", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "heads_q", "heads_kv", "nq", "nk", "head_dim")),
        ("block_q", ctypes.c_int),
        ("block_k", ctypes.c_int),
        ("sink", ctypes.c_int64),
        ("local", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("block_count", ctypes.c_void_p),
        ("block_index", ctypes.c_void_p),
        ("block_capacity", ctypes.c_int64),
    ]


class VerticalSlashArgs(PrefillIndexArgs):
    _fields_ = [
        ("last_q", ctypes.c_int64),
        ("column_count", ctypes.c_void_p),
        ("column_index", ctypes.c_void_p),
        ("column_capacity", ctypes.c_int64),
    ]


class AdaptiveArgs(PrefillIndexArgs):
    _fields_ = [
        ("threshold", ctypes.c_float),
        ("head_threshold", ctypes.c_void_p),
        ("stride", ctypes.c_int),
        ("samples", ctypes.c_int64),
    ]


def opened() -> ctypes.CDLL:
    kernels = library("prefill_index", "prefill_index_*.cu")
    for build in (vertical_slash_index, block_topk_index, adaptive_block_index):
        getattr(kernels, build.__name__).restype = ctypes.c_char_p
    return kernels


@contextmanager
def operators(variant: str) -> Iterator[dict[str, Callable]]:
    kernels = opened()
    kernels.descending("descending" in variant)
    kernels.warp_groups("wgmma" in variant)
    try:
        yield {build.__name__: build for build in (vertical_slash_index, block_topk_index, adaptive_block_index)}
    finally:
        kernels.descending(False)
        kernels.warp_groups(False)


def vertical_slash_index(
    q, k, vertical_size, slash_size, *, last_q=64, sink=30, local=100, kv_start=None, scale=None, block_q=64,
    block_k=64, max_blocks=None, max_columns=None
):  # fmt: skip
    args = VerticalSlashArgs()
    capacity = min(-(-slash_size // block_k), max_blocks or NO_CAP)
    blocks = _describe(args, q, k, capacity, sink, local, kv_start, scale, block_q, block_k)
    args.last_q = last_q
    args.column_capacity = min(vertical_size, max_columns or NO_CAP, k.shape[2])
    columns = [_new(*q.shape[:2], 1), _new(*q.shape[:2], 1, args.column_capacity)]
    args.column_count, args.column_index = (x.data_ptr() for x in columns)
    return _run("vertical_slash_index", args, blocks + columns)


def block_topk_index(q, k, top_k, *, sink=1, local=1, kv_start=None, block_q=64, block_k=64):
    args = PrefillIndexArgs()
    blocks = _describe(args, q, k, top_k, sink, local, kv_start, None, block_q, block_k)
    return _run("block_topk_index", args, blocks)


def adaptive_block_index(
    q, k, threshold=0.95, *, stride=8, sink=1, local=1, kv_start=None, scale=None, block_q=64, block_k=64,
    max_blocks=None, head_threshold=None, samples=0
):  # fmt: skip
    args = AdaptiveArgs()
    blocks = _describe(args, q, k, max_blocks or NO_CAP, sink, local, kv_start, scale, block_q, block_k)
    args.threshold, args.stride, args.samples = threshold, stride, samples
    thresholds = None if head_threshold is None else head_threshold.contiguous()
    args.head_threshold = pointer(thresholds)
    return _run("adaptive_block_index", args, blocks)


def _describe(args, q, k, capacity, sink, local, kv_start, scale, block_q, block_k) -> list[torch.Tensor]:
    """Fills in what all builders take; the block lists that they write."""
    args.dtype = DTYPES.index(q.dtype)
    args.q, args.k = (Tensor4(x.data_ptr(), *x.stride()[:3]) for x in (q, k))
    args.kv_start = pointer(kv_start)
    args.batch, args.heads_q, args.nq, args.head_dim = q.shape
    args.heads_kv, args.nk = k.shape[1:3]
    args.block_q, args.block_k, args.sink, args.local = block_q, block_k, sink, local
    args.scale = q.shape[-1] ** -0.5 if scale is None else scale
    args.block_capacity = min(capacity, -(-args.nk // block_k))
    rows = args.batch, args.heads_q, -(-args.nq // block_q)
    blocks = [_new(*rows), _new(*rows, args.block_capacity)]
    args.block_count, args.block_index = (x.data_ptr() for x in blocks)
    return blocks


def _new(*shape: int) -> torch.Tensor:
    """A list that is not written yet, between memory that must stay so."""
    size = torch.Size(shape).numel()
    return torch.full((size + 64,), UNWRITTEN, dtype=torch.int32)[32 : 32 + size].view(shape)


def _run(name: str, args: PrefillIndexArgs, outputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    check(getattr(opened(), name)(ctypes.byref(args)))
    for x in outputs:
        whole = x.as_strided((x.numel() + 64,), (1,), 0)
        assert (whole[:32] == UNWRITTEN).all() and (whole[-32:] == UNWRITTEN).all(), "a write outside the output"
    return tuple(outputs)


def fragment_layout() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row, column) in the matrices a, b and c of mma.m16n8k16 of what each lane's registers hold."""
    shapes = (32, 4, 2, 2), (32, 2, 2, 2), (32, 4, 2)
    layout = tuple(torch.empty(shape, dtype=torch.int32) for shape in shapes)
    opened().fragment_layout(*(ctypes.c_void_p(x.data_ptr()) for x in layout))
    return layout

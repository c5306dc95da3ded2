"""The works of linear layers with int4 and with bitmap weights, beside torch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

import baselines
import headstart
import machine
from baselines import COPY, INT4, LINEAR
from headstart.ops.bitmap import BitmapWeight
from headstart.ops.int4_gemm import Int4Weight
from headstart.reference import int4_gemm as int4_reference
from machine import DTYPES
from measure import Rotation
from work import (
    BITMAP_VALUES,
    COMPRESS,
    ERROR_BAR,
    GROUP,
    INT4_GEMM,
    INT8_ACTIVATIONS,
    INT8_SMALL_GROUPS,
    SMALL_GROUP,
    SMALL_GROUP_ROWS,
    ZEROS,
    Work,
)

if TYPE_CHECKING:
    from cases import Spec


def int4_gemm(spec: Spec) -> list[Work]:
    """The same weight three times: for headstart, for torch's int4 operator, and in bf16. Each comes from memory."""
    n, k, m = spec.shape.n, spec.shape.k, spec.tokens
    dtype = DTYPES[spec.dtype]
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    packed = torch.ops.headstart.int4_pack(codes)
    x = torch.randn(m, k).to(dtype)

    def grouped(group_size: int) -> tuple[tuple[torch.Tensor, torch.Tensor], Int4Weight]:
        """Scales and zero points [N, K / group_size], and the weight with them."""
        scales = (0.001 + 0.01 * torch.rand(n, k // group_size)).to(dtype)
        zeros = torch.randint(4, 12, (n, k // group_size), dtype=torch.uint8)
        panels = [int4_reference.to_panels(part) for part in (scales, zeros)]
        return (scales, zeros), Int4Weight(packed, *panels, group_size, (n, k))

    def work(name: str, tensors: tuple[torch.Tensor, ...], call: Callable, exact: torch.Tensor, **given) -> Work:
        rotation = Rotation(tensors, machine.cold_bytes())
        return Work(
            name,
            lambda: call(*rotation.next()),
            flops=2 * m * n * k,
            bytes=sum(t.nbytes for t in tensors),
            cycle_bytes=rotation.bytes,
            limit="read" if m == 1 else "multiply",
            check=lambda out: baselines.relative_error(out, exact),
            error_bar=ERROR_BAR[spec.dtype],
            **given,
        )

    def ours(name: str, weight: Int4Weight, exact: torch.Tensor, **options) -> Work:
        def call(*w: torch.Tensor) -> torch.Tensor:
            return torch.ops.headstart.int4_gemm(x, *w, group_size=weight.group_size, n=n, **options)

        return work(name, (weight.packed, weight.scales, weight.zeros), call, exact)

    of_torch, weight = grouped(GROUP)
    exact = x.float() @ weight.dequantize().mT
    theirs = baselines.int4_weight(codes, *of_torch)
    works = [
        work(INT4, theirs, lambda *w: baselines.int4_gemm(x, *w, GROUP), exact, baseline=INT4),
        work(LINEAR, (weight.dequantize(dtype),), lambda w: F.linear(x, w), exact, baseline=LINEAR),
        ours(INT4_GEMM, weight, exact),
        ours(INT8_ACTIVATIONS, weight, exact, int8_activations=True),
    ]
    if m == SMALL_GROUP_ROWS:
        _, weight = grouped(SMALL_GROUP)
        works.append(ours(INT8_SMALL_GROUPS, weight, x.float() @ weight.dequantize().mT, int8_activations=True))
    return works


def pruned(spec: Spec) -> tuple[torch.Tensor, dict[str, BitmapWeight]]:
    """A weight whose random half is 0, and the same weight compressed, by the name of its values."""
    w = torch.randn(spec.shape.n, spec.shape.k).to(DTYPES[spec.dtype])
    w.masked_fill_(torch.rand(w.shape) < ZEROS, 0)
    return w, {name: BitmapWeight.compress(w, values, GROUP) for values, name in BITMAP_VALUES.items()}


def tensors_of(w: BitmapWeight) -> tuple[torch.Tensor, ...]:
    return tuple(t for t in (w.values, w.bitmask, w.row_offsets, w.scales) if t is not None)


def of_tensors(w: BitmapWeight, values, bitmask, row_offsets, scales=None) -> BitmapWeight:
    """Another weight of w's shape. It is made once for each copy, so that its checks are not timed."""
    return BitmapWeight(values, bitmask, row_offsets, w.shape, scales, w.group_size)


def cold_weights(w: BitmapWeight) -> tuple[Iterator[BitmapWeight], int]:
    """The weight's copies in turn, without end, and the bytes of all copies."""
    rotation = Rotation(tensors_of(w), machine.cold_bytes())
    return itertools.cycle([of_tensors(w, *copy) for copy in rotation.items]), rotation.bytes


def bitmap(spec: Spec) -> list[Work]:
    """To and from a dense weight that exists already; each comes from memory."""
    w, weights = pruned(spec)
    out = torch.empty_like(w)
    dense = Rotation((w,), machine.cold_bytes())
    works = [
        Work(
            COPY,
            lambda: out.copy_(*dense.next()),
            baseline=COPY,
            bytes=2 * w.nbytes,
            cycle_bytes=dense.bytes,
            limit="copy",
        )
    ]
    for name, c in weights.items():
        cold, cycle_bytes = cold_weights(c)
        exact = w if c.scales is None else c.decompress()
        works.append(
            Work(
                name,
                lambda cold=cold: next(cold).decompress(out),
                bytes=c.nbytes + w.nbytes,
                cycle_bytes=cycle_bytes,
                limit="copy",
                check=lambda got, exact=exact: float((got != exact).sum()),
            )
        )
    compress = Work(
        COMPRESS,
        lambda: BitmapWeight.compress(*dense.next()),
        bytes=w.nbytes,
        check=lambda got: float((got.decompress() != w).sum()),
    )
    return [*works, compress]


def bitmap_gemm(spec: Spec) -> list[Work]:
    """The same weight dense in bf16 and compressed; each comes from memory."""
    w, weights = pruned(spec)
    m, numbers = spec.tokens, dict(flops=2 * spec.tokens * w.numel(), limit="read" if spec.tokens == 1 else "gemm")
    x = torch.randn(m, spec.shape.k).to(w.dtype)
    dense = Rotation((w,), machine.cold_bytes())
    numbers_of_dense = dict(bytes=w.nbytes, cycle_bytes=dense.bytes, **numbers)
    works = [Work(LINEAR, lambda: F.linear(x, *dense.next()), baseline=LINEAR, **numbers_of_dense)]
    for name, c in weights.items():
        cold, cycle_bytes = cold_weights(c)
        exact = x.float() @ c.decompress().float().mT
        works.append(
            Work(
                name,
                lambda cold=cold: headstart.bitmap_gemm(x, next(cold)),
                bytes=c.nbytes,
                cycle_bytes=cycle_bytes,
                check=lambda out, exact=exact: baselines.relative_error(out, exact),
                error_bar=ERROR_BAR[spec.dtype],
                **numbers,
            )
        )
    return works

"""How int4_gemm is judged: against float64, weight by weight, row by row.

`op` is the operator under test, with the signature of `torch.ops.headstart.int4_gemm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from headstart.ops.int4_gemm import Int4Weight
from tolerances import assert_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_weight(n, k, group_size=32, symmetric=False, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    groups = 1 if group_size == -1 else -(-k // group_size)
    scales = (torch.rand(n, groups, generator=generator) + 0.1).to(dtype)
    zeros = None if symmetric else torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8)
    return codes, scales, zeros, Int4Weight._of_codes(codes, scales, zeros, group_size)


def exact(codes, scales, zeros, group_size):
    """The weight in float64, element by element as the definition says."""
    k = codes.shape[1]
    group = torch.arange(k) // (k if group_size == -1 else group_size)
    return (codes.double() - (8 if zeros is None else zeros.double()[:, group])) * scales.double()[:, group]


# Weights that are not plain int4 ones, as `random_wide_weight` makes them.
WIDE = ("4 bits with minimums", "8 bits, symmetric", "8 bits with zero points", "8 bits with minimums")


def random_wide_weight(kind, n, k, group_size, dtype=torch.float32, seed=0) -> tuple[Int4Weight, torch.Tensor]:
    """A weight of a kind of `WIDE`, and its values in float64 by the definition."""
    generator = torch.Generator().manual_seed(seed)
    bits = int(kind[0])
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    groups = 1 if group_size == -1 else -(-k // group_size)
    scales = ((torch.rand(n, groups, generator=generator) + 0.1) / 2**bits).to(dtype)
    shift = torch.zeros(n, groups, dtype=torch.float64)
    parts = {}
    if "minimums" in kind:
        parts["minimums"] = (torch.randn(n, groups, generator=generator) / 2).to(dtype)
        shift = parts["minimums"].double()
    elif "zero" in kind:
        parts["zeros"] = torch.randint(0, 256, (n, groups), generator=generator, dtype=torch.uint8)
        shift = -parts["zeros"].double() * scales.double()
    else:
        shift = -128 * scales.double()
    group = torch.arange(k) // (k if group_size == -1 else group_size)
    true = codes.double() * scales.double()[:, group] + shift[:, group]
    return Int4Weight.from_codes(codes, scales, group_size=group_size, bits=bits, **parts), true


def gemm(op: Callable, x, w: Int4Weight, bias=None, **options):
    options |= {} if w.minimums is None else {"minimums": w.minimums}
    options |= {} if w.bits == 4 else {"bits": w.bits}
    return op(x, w.packed, w.scales, w.zeros, bias, group_size=w.group_size, n=w.shape[0], **options)


def surrounded(*shape: int, dtype: torch.dtype, pad: int = 8) -> torch.Tensor:
    """Random rows between NaNs, so that a read outside them shows."""
    whole = torch.full((*shape[:-1], shape[-1] + 2 * pad), math.nan).to(dtype)
    whole[..., pad : pad + shape[-1]] = torch.randn(shape).to(dtype)
    return whole[..., pad : pad + shape[-1]]


def check(op, x, w: Int4Weight, true, bias=None):
    """Against float64, with the room that `F.linear` takes for the same weight in x's dtype."""
    want = x.double() @ true.T + (0 if bias is None else bias.double())
    out = gemm(op, x, w, bias)
    assert out.dtype == x.dtype and out.shape == want.shape and out.is_contiguous()
    assert_close(out, want, torch.nn.functional.linear(x, true.to(x.dtype), bias), "out")
    return out


def check_case(op, m, n, k, group_size, dtype, symmetric=False, scale_dtype=torch.float16, bias=True):
    *parts, w = random_weight(n, k, group_size, symmetric, dtype=scale_dtype)
    x = surrounded(m, k, dtype=dtype, pad=8 if (m + n) % 2 else 3)
    check(op, x, w, exact(*parts, group_size), torch.randn(n).to(dtype) if bias else None)


def check_wide_case(op, kind, m, n, k, group_size, dtype, scale_dtype=torch.float16, bias=True):
    w, true = random_wide_weight(kind, n, k, group_size, scale_dtype)
    x = surrounded(m, k, dtype=dtype, pad=8 if (m + n) % 2 else 3)
    check(op, x, w, true, torch.randn(n).to(dtype) if bias else None)


def check_every_weight(op, dtype, n, k, group_size, batches, symmetric=False):
    """One-hot rows, scales that are powers of two: every weight comes back exactly."""
    codes, _, zeros, _ = random_weight(n, k, group_size, symmetric)
    scales = 2.0 ** torch.randint(-3, 4, (n, -(-k // group_size)))
    want = exact(codes, scales, zeros, group_size).to(dtype)
    w = Int4Weight._of_codes(codes, scales, zeros, group_size)
    hot = torch.eye(k, dtype=dtype)
    for m in batches:
        assert torch.equal(torch.cat([gemm(op, rows, w) for rows in hot.split(m)]).T, want)


def check_batches(op, dtype, n, k, group_size, batches, rows=70):
    """A row's result does not depend, in any bit, on the rows beside it, nor a column's on the other columns."""
    w = random_weight(n, k, group_size, dtype=torch.float16)[3]
    x, bias = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
    whole = gemm(op, x, w, bias)
    for m in batches:
        assert torch.equal(torch.cat([gemm(op, part, w, bias) for part in x.split(m)]), whole), m
    first = Int4Weight(w.packed[:2], w.scales[:2], w.zeros[:2], group_size, (min(n, 32), k))
    assert torch.equal(gemm(op, x, first), gemm(op, x, w)[:, :32])


def check_zero_points(op, dtype, m=5):
    """Any byte may be a zero point, not only those that fit a code."""
    codes, scales, zeros, _ = random_weight(40, 160, 32)
    zeros = torch.randint(0, 256, zeros.shape, dtype=torch.uint8)
    zeros[:, 0], zeros[0, :], zeros[1, 1] = 255, 127, 128
    w = Int4Weight._of_codes(codes, scales, zeros, 32)
    check(op, torch.randn(m, 160).to(dtype), w, exact(codes, scales, zeros, 32))
    scales = torch.ones_like(scales)
    w = Int4Weight._of_codes(codes, scales, zeros, 32)
    hot = torch.eye(160, dtype=dtype)
    assert torch.equal(gemm(op, hot, w).T, exact(codes, scales, zeros, 32).to(dtype))


def check_strides(op, dtype):
    w = random_weight(40, 96, 32)[3]
    wide = torch.randn(3, 7, 2, 301).to(dtype)
    views = (
        wide[..., 5:101],
        wide[..., 1:97].transpose(0, 2),
        wide[:, :1, :, 200:296],
        wide[0, 0, 0, 3:99],
        wide[..., :96][:0],
        torch.randn(4, 2 * 96).to(dtype)[:, 96:],
        torch.randn(1, 96).to(dtype).expand(5, 96),
    )
    for x in views:
        out = gemm(op, x, w)
        assert out.shape == (*x.shape[:-1], 40) and torch.equal(out, gemm(op, x.contiguous(), w))
    odd = torch.empty(w.packed.numel() + 1, dtype=torch.int32)[1:].view(w.packed.shape).copy_(w.packed)
    moved = Int4Weight(odd, w.scales, w.zeros, 32, w.shape)
    assert torch.equal(gemm(op, views[0], moved), gemm(op, views[0], w))
    one = random_weight(5, 1, 32)[3]
    assert gemm(op, torch.randn(4, 6).to(dtype)[:, 2:3], one).shape == (4, 5)


def check_what_is_not_finite_stays_in_its_row(op, dtype):
    w = random_weight(40, 96, 32)[3]
    x = torch.randn(9, 96).to(dtype)
    want = gemm(op, x, w)
    x[4, 17] = torch.nan
    got = gemm(op, x, w)
    keep = torch.arange(9) != 4
    assert got[4].isnan().all() and torch.equal(got[keep], want[keep])

"""How bitmap_decompress and bitmap_gemm are judged: bits as integers, products against float64.

`op` is the operator under test, with the signature of `torch.ops.headstart.bitmap_decompress.out` or `bitmap_gemm`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from headstart.ops.bitmap import VALUE_DTYPES, BitmapWeight
from headstart.reference import bitmap as reference
from tolerances import assert_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_value_dtype = pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(reference.INTEGER[x.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def sparse(n: int, k: int, density: float = 0.5, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    return w.masked_fill(torch.rand(n, k, generator=generator) >= density, 0).to(dtype)


def random_bits(n: int, k: int, density: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Bit patterns of every kind, NaN and -0.0 among them; row 0 is full and row 1 empty."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    w = torch.randint(0, 256, (n, k * size), generator=generator, dtype=torch.uint8).view(reference.INTEGER[size])
    kept = torch.rand(n, k, generator=generator) < density
    kept[0] = True
    kept[1:2] = False
    return (w * kept).view(dtype)


def random_weight(n, k, density, dtype, values="same", group_size=32, seed=0) -> BitmapWeight:
    """Finite weights; the compressed tensors are the reference's."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    kept = torch.rand(n, k, generator=generator) < density
    kept[:1] = True
    kept[1:2] = False
    w = (w * kept).to(dtype)
    if values == "same":
        return BitmapWeight(*reference.compress(w), (n, k))
    codes, scales = reference.quantize(w, group_size, {"int8": 8, "int4": 4}[values])
    packed, bitmask, row_offsets = reference.compress(codes * (w != 0))
    packed = reference.pack_signed_nibbles(packed) if values == "int4" else packed
    return BitmapWeight(packed, bitmask, row_offsets, (n, k), scales, group_size)


def truth(w: BitmapWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight by the reference, in `dtype` (of the values or scales: bit by bit)."""
    out = torch.empty(w.shape, dtype=dtype)
    reference.decompress(w.values, w.bitmask, w.row_offsets, scales=w.scales, group_size=w.group_size, out=out)
    return out


def exact(w: BitmapWeight) -> torch.Tensor:
    """The weight in float64: value times scale, not rounded."""
    if w.scales is None:
        return truth(w, w.dtype).double()
    codes = truth(dataclasses.replace(w, scales=torch.ones_like(w.scales)), torch.float32)
    group = w.shape[1] if w.group_size == -1 else w.group_size
    return codes.double() * w.scales.double().repeat_interleave(group, 1)[:, : w.shape[1]]


def surrounded(x: torch.Tensor, offset: int = 0, pad: int = 64) -> torch.Tensor:
    """The same tensor `offset` elements from an aligned place, between elements that show where they are read."""
    flat = torch.empty(x.numel() + 2 * pad + offset, dtype=x.dtype)
    flat.view(torch.uint8).fill_(0x7F)  # NaN, or a large number
    start = pad + offset
    flat[start : start + x.numel()] = x.reshape(-1)
    return flat[start : start + x.numel()].view(x.shape)


def decompress(op: Callable, w: BitmapWeight, stride: int | None = None, offset: int = 0) -> torch.Tensor:
    """Into an output that was NaN; nothing outside of it may have been written."""
    n, k = w.shape
    stride = stride or k
    pad = 64
    flat = torch.empty(n * stride + offset + 2 * pad, dtype=w.dtype)
    flat.view(torch.uint8).fill_(0x7F)
    untouched = bits(flat).clone()
    out = flat[pad + offset :].as_strided((n, k), (stride, 1))
    op(w.values, w.bitmask, w.row_offsets, k, scales=w.scales, group_size=w.group_size, out=out)
    got = out.clone()
    bits(flat)[pad + offset :].as_strided((n, k), (stride, 1)).copy_(
        untouched[pad + offset :].as_strided((n, k), (stride, 1))
    )
    assert torch.equal(bits(flat), untouched), "a write outside the output"
    return got


def check_bits(op, n, k, density, dtype, offset=0, stride=None):
    w = random_bits(n, k, density, dtype)
    values, bitmask, row_offsets = reference.compress(w)
    compressed = BitmapWeight(surrounded(values, offset), surrounded(bitmask, offset), row_offsets, (n, k))
    got = decompress(op, compressed, stride, offset)
    assert same_bits(got, w)


def check_scaled(op, n, k, density, dtype, values, group_size, offset=0):
    w = random_weight(n, k, density, dtype, values, group_size)
    w = dataclasses.replace(w, values=surrounded(w.values, offset), scales=surrounded(w.scales))
    assert torch.equal(decompress(op, w), truth(w, dtype))


def check_slice(op, dtype, values="same"):
    """Rows of a larger weight, whose offsets do not begin at 0."""
    w = random_weight(40, 300, 0.5, dtype, values)
    part = slice(7, 29)
    scales = None if w.scales is None else w.scales[part]
    rows = dataclasses.replace(
        w, bitmask=w.bitmask[part], row_offsets=w.row_offsets[7:30], scales=scales, shape=(22, 300)
    )
    assert torch.equal(decompress(op, rows), truth(w, dtype)[part])
    # Rows in any order, one twice: only where a row begins matters.
    order = torch.tensor([5, 0, 5, 39])
    offsets = torch.cat([w.row_offsets[order], w.row_offsets[:1]])
    scales = None if w.scales is None else w.scales[order]
    rows = dataclasses.replace(w, bitmask=w.bitmask[order], row_offsets=offsets, scales=scales, shape=(4, 300))
    assert torch.equal(decompress(op, rows), truth(w, dtype)[order])


def check_damaged(op, dtype, values="same"):
    """Offsets and bits that point outside the values: nothing there is read, and those weights are 0."""
    w = random_weight(20, 300, 0.5, dtype, values)
    w = dataclasses.replace(w, values=surrounded(w.values, 1))
    last = int(w.row_offsets[-1])
    offsets = w.row_offsets.clone()
    offsets[2:9] = torch.tensor([last - 1, last, last + 1, last + 2**40, 2**62, last - 37, last - 200])
    damaged = dataclasses.replace(w, row_offsets=offsets)
    want, got = truth(damaged, dtype), decompress(op, damaged)
    assert torch.equal(got, want) and not torch.equal(want, truth(w, dtype))
    offsets[2:5] = torch.tensor([-1, -(2**40), -(2**62)])
    got = decompress(op, dataclasses.replace(w, row_offsets=offsets))
    assert torch.equal(got[5:], want[5:]) and (got[3:5] == 0).all() and got.float().abs().max() < 1e3
    # Pad bits are not columns.
    padded = w.bitmask.clone()
    padded[:, -1] |= 0xF0
    assert torch.equal(decompress(op, dataclasses.replace(w, bitmask=padded)), truth(w, dtype))


def check_far(op):
    """Values and output rows more than 2^31 elements from where their tensors begin; nothing between is touched."""
    n, k, first, stride = 4, 300, 2**31 + 13, 2**30
    w = random_bits(n, k, 0.5, torch.int8)
    values, bitmask, row_offsets = reference.compress(w)
    far, out = (torch.empty(size, dtype=torch.int8) for size in (first + len(values), 3 * stride + k))
    far[first:], out = values, out.as_strided((n, k), (stride, 1))
    op(far, bitmask, row_offsets + first, k, scales=None, group_size=-1, out=out)
    assert torch.equal(out, w)


# --- products --------------------------------------------------------------------------------------------------------


def gemm(op: Callable, x, w: BitmapWeight, bias=None) -> torch.Tensor:
    return op(x, w.values, w.bitmask, w.row_offsets, bias, cols=w.shape[1], scales=w.scales, group_size=w.group_size)


def rows_between_nan(m: int, k: int, dtype: torch.dtype, pad: int = 8) -> torch.Tensor:
    whole = torch.full((m + 2, k + 2 * pad), math.nan).to(dtype)
    whole[1:-1, pad : pad + k] = torch.randn(m, k).to(dtype)
    return whole[1:-1, pad : pad + k]


def check(op, x, w: BitmapWeight, bias=None):
    """Against float64, with the room that `F.linear` takes for the same weight in x's dtype."""
    true = exact(w)
    want = x.double() @ true.T + (0 if bias is None else bias.double())
    out = gemm(op, x, w, bias)
    assert out.dtype == x.dtype and out.shape == want.shape and out.is_contiguous()
    assert_close(out, want, torch.nn.functional.linear(x, true.to(x.dtype), bias), "out")
    return out


def check_case(op, m, n, k, dtype, values="same", group_size=32, density=0.5, scale_dtype=None, bias=True):
    w = random_weight(n, k, density, scale_dtype or dtype, values, group_size, seed=m)
    w = dataclasses.replace(w, values=surrounded(w.values, m % 3))
    x = rows_between_nan(m, k, dtype) if m % 2 else torch.randn(m, k).to(dtype)
    check(op, x, w, torch.randn(n).to(dtype) if bias else None)


def check_every_weight(op, dtype, n, k, batches, values="same", whole_powers=False):
    """Rows of x with a single one pick weights out, exactly: none is lost, moved or counted twice.

    With `whole_powers` scales are powers of two, for kernels that round more than the weight.
    """
    w = random_weight(n, k, 0.5, dtype, values, 16)
    if whole_powers and w.scales is not None:
        w = dataclasses.replace(w, scales=(2.0 ** torch.randint(-3, 4, w.scales.shape)).to(dtype))
    want, picks = truth(w, dtype), torch.eye(k, dtype=dtype)
    for batch in batches:
        for x in picks.split(batch):
            columns = x.argmax(1)
            assert torch.equal(gemm(op, x, w), want[:, columns].T), f"{batch} rows, from column {columns[0]}"


def check_what_is_not_finite(op, dtype, m):
    """Infinity in one weight, NaN in one row of x: they touch what they meet and nothing else."""
    w = random_weight(20, 300, 0.5, dtype)
    dense = truth(w, dtype)
    dense[3, 299] = math.inf
    w = BitmapWeight(*reference.compress(dense), (20, 300))
    x = 1 + torch.rand(m, 300).to(dtype)
    if m > 1:
        x[1] = math.nan
    out = gemm(op, x, w)
    clean = torch.arange(m) != 1
    assert (out[clean][:, 3] == math.inf).all()
    assert out[clean][:, torch.arange(20) != 3].isfinite().all() and out[~clean].isnan().all()


def check_strides(op, dtype):
    w = random_weight(33, 130, 0.5, dtype)
    for shape, x in (
        ((3, 5, 33), torch.randn(3, 5, 130)),
        ((5, 3, 33), torch.randn(3, 5, 130).transpose(0, 1)),
        ((4, 33), torch.randn(4, 137)[:, 3:133]),
        ((33,), torch.randn(130)),
        ((0, 33), torch.randn(0, 130)),
    ):
        x = x.to(dtype) if x.is_contiguous() else torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
        assert check(op, x, w).shape == shape
    # No columns: nothing to add but the bias.
    empty, bias = random_weight(5, 0, 0.5, dtype), torch.randn(5).to(dtype)
    assert torch.equal(gemm(op, torch.empty(2, 0, dtype=dtype), empty, bias), bias.expand(2, 5))

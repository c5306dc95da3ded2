"""Bitmap-sparse weights in plain torch: compression, decompression, the product.

A weight is kept if any of its bits is set. Elements are compared and moved as integers, so -0.0, NaN payloads and
subnormals come back unchanged. Rows are processed in chunks, so that no int64 tensor of the whole weight exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import int4_gemm

INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by the size of an element in bytes


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(INTEGER[x.element_size()])


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool [N, K] to uint8 [N, ceil(K / 8)]. Column 8 i is the lowest bit of byte i. Pad bits are 0."""
    eights = F.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (eights << torch.arange(8, device=mask.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmask: torch.Tensor, cols: int) -> torch.Tensor:
    """uint8 [N, ceil(cols / 8)] to bool [N, cols]."""
    places = torch.arange(8, device=bitmask.device, dtype=torch.uint8)
    return ((bitmask.unsqueeze(-1) >> places) & 1).flatten(1)[:, :cols].bool()


def count_bits(bitmask: torch.Tensor) -> torch.Tensor:
    """int64 [N]: the number of set bits of each row."""
    # Eight bytes at a time, in pieces that fit a cache: 134 M bits took 0.1 s. Byte by byte over the whole took 1.4 s.
    rows = max(1, 2**19 // max(bitmask.shape[1], 1))
    return torch.cat([_count_bits(part) for part in bitmask.split(rows)])


def _count_bits(bitmask: torch.Tensor) -> torch.Tensor:
    rows, size = bitmask.shape
    words = bitmask.new_zeros(rows, max(1, -(-size // 8)), dtype=torch.int64)
    words.view(torch.uint8)[:, :size] = bitmask
    pairs = words - ((words >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((eights * 0x0101010101010101) >> 56).sum(-1)  # the product's highest byte is the sum of all 8, at most 64


def compress(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = _bits(w) != 0
    row_offsets = F.pad(mask.sum(1, dtype=torch.int64).cumsum(0), (1, 0))
    return _bits(w)[mask].view(w.dtype), pack_bits(mask), row_offsets


def pack_signed_nibbles(values: torch.Tensor) -> torch.Tensor:
    """int8 [nnz], -8 to 7, to uint8 [ceil(nnz / 2)]. Value 2i is the low nibble, 2i + 1 the high, two's complement."""
    low, high = F.pad(values & 15, (0, len(values) % 2)).view(torch.uint8).unflatten(0, (-1, 2)).unbind(1)
    return low | (high << 4)


def _take(values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """The values at the positions `place`. A uint8 value is two signed nibbles."""
    if values.dtype != torch.uint8:
        return values[place]
    nibble = (values[place >> 1].to(torch.int8) >> (4 * (place & 1)).to(torch.int8)) & 15
    return (nibble ^ 8) - 8


def decompress(values, bitmask, row_offsets, *, scales, group_size: int, out: torch.Tensor) -> None:
    """Fills out [N, cols]. A position outside `values` is not read, and its weight is 0."""
    rows, cols = out.shape
    stored = values if scales is not None else _bits(values)
    count = len(values) * (2 if values.dtype == torch.uint8 else 1)
    if count == 0:
        out.zero_()
        return
    chunk = max(1, 2**22 // max(cols, 1))
    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        mask = unpack_bits(bitmask[part], cols)
        place = row_offsets[:-1][part, None] + mask.cumsum(1) - 1
        mask &= (place >= 0) & (place < count)
        dense = torch.where(mask, _take(stored, torch.where(mask, place, 0)), 0)
        if scales is None:
            _bits(out)[part] = dense
        else:
            group = cols if group_size == -1 else min(group_size, cols)
            scale = scales[part].float().repeat_interleave(group, 1)[:, :cols]
            out[part] = (dense.float() * scale).to(out.dtype)


def quantize(w: torch.Tensor, group_size: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K] to (signed codes int8 [N, K], scales [N, groups] in w's dtype). A weight of 0 gets code 0."""
    codes, scales, _ = int4_gemm.quantize(w, group_size, symmetric=True, bits=bits)
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8), scales


def bitmap_gemm(x, values, bitmask, row_offsets, bias=None, *, cols, scales, group_size) -> torch.Tensor:
    dtype = values.dtype if scales is None else torch.float32
    w = torch.empty(bitmask.shape[0], cols, dtype=dtype, device=x.device)
    decompress(values, bitmask, row_offsets, scales=scales, group_size=group_size, out=w)
    out = x.float() @ w.float().mT
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)

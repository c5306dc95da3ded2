"""The blocks of GGUF files in plain torch: their codes, scales and minimums, bit for bit as the file has them.

A row of a tensor is a run of blocks. A block has 32 weights (Q4_0, Q4_1, Q8_0) or 256 (Q4_K, Q5_K, Q6_K). Its parts,
with their sizes in bytes::

    Q4_0   d 2, codes 16                        w = d (code - 8)            low nibbles: weights 0 to 15, high: 16 to 31
    Q4_1   d 2, m 2, codes 16                   w = d code + m
    Q8_0   d 2, codes 32                        w = d code                  signed
    Q4_K   d 2, dmin 2, scales 12, codes 128    w = d sc code - dmin mn     32 weights share a 6-bit sc and mn
    Q5_K   as Q4_K, before the codes 32 bytes with the fifth bits
    Q6_K   low 128, high 64, sc 16, d 2         w = d sc (code - 32)        16 weights share a signed sc of 8 bits

d, dmin and m are float16. A product of d and sc has at most 19 bits, so it is exact in float32.

Source: the format's C code, https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Groups(NamedTuple):
    """Codes uint8 [N, K], and scales, and minimums or None, [N, groups]: the arguments of `Int4Weight.from_codes`."""

    codes: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None
    group_size: int
    bits: int


def unpack(kind: str, rows: torch.Tensor) -> Groups:
    """From the bytes of rows, uint8 [N, bytes of a row]; `kind` is one of `KINDS`."""
    block_bytes, read = KINDS[kind]
    codes, scales, minimums, bits = read(rows.unflatten(1, (-1, block_bytes)))
    n = rows.shape[0]
    codes, scales = codes.reshape(n, -1), scales.reshape(n, -1)
    minimums = None if minimums is None else minimums.reshape(n, -1)
    return Groups(codes, scales, minimums, codes.shape[1] // scales.shape[1], bits)


def dequantize(kind: str, rows: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] from the bytes of rows, as `unpack` takes them."""
    codes, scales, minimums, group_size, bits = unpack(kind, rows)
    values = codes.float().unflatten(1, (-1, group_size))
    if minimums is None:
        values = values.sub_(2 ** (bits - 1)).mul_(scales.float()[..., None])
    else:
        values = values.mul_(scales.float()[..., None]).add_(minimums.float()[..., None])
    return values.flatten(1)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16)


def _nibbles(b: torch.Tensor) -> torch.Tensor:
    """The low nibbles of the last dim, then the high ones."""
    return torch.cat((b & 15, b >> 4), -1)


def _q4_0(b: torch.Tensor):
    return _nibbles(b[..., 2:]), _half(b, 0), None, 4


def _q4_1(b: torch.Tensor):
    return _nibbles(b[..., 4:]), _half(b, 0), _half(b, 2), 4


def _q8_0(b: torch.Tensor):
    return b[..., 2:] ^ 128, _half(b, 0), None, 8


def _k_groups(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minimums of the eight groups of a block of Q4_K or Q5_K."""
    first, second, third = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), -1)
    minimum = torch.cat((second & 63, third >> 4 | (second >> 6) << 4), -1)
    return _half(b, 0).float() * scale, -(_half(b, 2).float() * minimum)


def _q4_k(b: torch.Tensor):
    return _nibbles(b[..., 16:].unflatten(-1, (4, 32))).flatten(-2), *_k_groups(b), 4


def _q5_k(b: torch.Tensor):
    low = _nibbles(b[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)  # [..., 8, 32]
    fifth = b[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8, device=b.device)[:, None] & 1
    return (low | fifth << 4).flatten(-2), *_k_groups(b), 8


def _q6_k(b: torch.Tensor):
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64)))  # of each half of the block
    shifts = 2 * torch.arange(4, dtype=torch.uint8, device=b.device)[:, None]
    high = (b[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(-2)
    scale = b[..., 192:208].contiguous().view(torch.int8)
    # The middle of 8 bits is 128, and that of the file's 6 is 32.
    return (low | high << 4).flatten(-2) + 96, _half(b, 208).float() * scale, None, 8


KINDS = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}

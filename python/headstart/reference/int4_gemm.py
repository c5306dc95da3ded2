"""Weights in 4 or 8 bits in plain torch: quantisation, the packed layout, the checkpoint formats, the product.

Codes are uint8 [N, K] with values 0 to 15, or 0 to 255 in 8 bits. A weight is ``(code - zero) * scale``, or
``code * scale + minimum``. Each `group_size` consecutive weights of a row share these numbers, so they are
[N, ceil(K / group_size)]. A group_size of -1 means one group a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

PANEL = 16  # output columns that stand together
WORDS = 4  # of a column that stand together: a slab


def slab(bits: int) -> int:
    """The number of k-values in a slab, which is the least group size."""
    return 128 // bits


# --- the packed layout (csrc/layouts/int4.h draws it) ---------------------------------------------------------------


def _shifts(device: torch.device) -> torch.Tensor:
    """[i, 1, h]: the lowest bit, within word t, of the code of k = 8 i + 2 t + h in a slab."""
    return 4 * torch.arange(4, device=device)[:, None, None] + 16 * torch.arange(2, device=device)


def pack(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    n, k = codes.shape
    padded = F.pad(codes, (0, -k % slab(bits), 0, -n % PANEL))
    if bits == 8:  # a word is four codes in order
        words = padded.contiguous().view(torch.int32).reshape(-(-n // PANEL), PANEL, -1, WORDS)
        return words.permute(0, 2, 3, 1).contiguous()
    slabs = padded.to(torch.int32).reshape(-(-n // PANEL), PANEL, -1, 4, 4, 2)  # [panel, column, slab, i, t, h]
    words = (slabs << _shifts(codes.device)).sum((3, 5), dtype=torch.int32)
    return words.permute(0, 2, 3, 1).contiguous()


def unpack(packed: torch.Tensor, n: int, k: int, bits: int = 4) -> torch.Tensor:
    return unpack_columns(packed.permute(0, 3, 1, 2).flatten(0, 1)[:n], k, bits)


def unpack_columns(words: torch.Tensor, k: int, bits: int) -> torch.Tensor:
    """uint8 [..., k] from the words [..., slabs, 4] of output columns."""
    if bits == 8:
        return words.contiguous().view(torch.uint8).flatten(-2)[..., :k]
    slabs = (words[..., None, :, None] >> _shifts(words.device)) & 15
    return slabs.flatten(-4)[..., :k].to(torch.uint8)


def to_panels(groups: torch.Tensor) -> torch.Tensor:
    """Scales or zeros [N, groups] to [ceil(N / 16), groups, 16]."""
    n, count = groups.shape
    padded = F.pad(groups, (0, 0, 0, -n % PANEL))
    return padded.reshape(-(-n // PANEL), PANEL, count).transpose(1, 2).contiguous()


def from_panels(panels: torch.Tensor, n: int) -> torch.Tensor:
    return panels.transpose(1, 2).flatten(0, 1)[:n]


# --- quantisation ---------------------------------------------------------------------------------------------------

CLIPS = tuple(1 - 0.025 * step for step in range(21))  # factors by which a group's range is cut, 1 down to 0.5


def quantize(
    w: torch.Tensor, group_size: int, symmetric: bool, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """w [N, K] to (codes uint8 [N, K], scales [N, groups] in w's dtype, zeros uint8 [N, groups] or None).

    Weights are rounded to the nearest code. Each group's range is cut by the factor in `CLIPS` that gives the least
    squared error. Every group can represent 0. The zero point of symmetric codes is 2^(bits - 1).
    """
    rows = max(1, 2**22 // max(w.shape[1], 1))
    parts = (_quantize_rows(part, group_size, symmetric, bits) for part in w.split(rows))
    codes, scales, zeros = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales), None if symmetric else torch.cat(zeros)


def _quantize_rows(w, group_size, symmetric, bits):
    n, k = w.shape
    group = k if group_size == -1 else group_size
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    groups = F.pad(w.float(), (0, -k % group)).unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    step = torch.maximum(-low, high) / (middle - 1) if symmetric else high / top - low / top
    tried = torch.empty_like(groups)
    best = None
    for clip in CLIPS:
        scale = (step * clip).to(w.dtype).float()
        scale = torch.where(scale == 0, 1, scale)
        zero = torch.full_like(scale, middle) if symmetric else (-low * clip / scale).round().clamp(0, top)
        torch.div(groups, scale, out=tried).round_().clamp_(-zero, top - zero)
        error = tried.mul_(scale).sub_(groups).square_().sum(-1, keepdim=True)
        if best is None:
            best = scale, zero, error
        else:
            better = error < best[2]
            best = tuple(torch.where(better, new, old) for new, old in zip((scale, zero, error), best, strict=True))
    scale, zero, _ = best
    codes = torch.div(groups, scale, out=tried).round_().add_(zero).clamp_(0, top).flatten(1)[:, :k].to(torch.uint8)
    return codes, scale.squeeze(-1).to(w.dtype), zero.squeeze(-1).to(torch.uint8)


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    minimums: torch.Tensor | None = None,
    bits: int = 4,
) -> torch.Tensor:
    """float32 [N, K] from codes [N, K], and scales, zeros and minimums [N, groups].

    Without zeros and minimums, every zero point is the middle code, 8 or 128. With minimums it is 0.
    """
    k = codes.shape[1]
    group = k if group_size == -1 else min(group_size, k)

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.float().repeat_interleave(group, 1)[:, :k]

    if minimums is not None:
        return codes.float() * spread(scales) + spread(minimums)
    return (codes.float() - (2 ** (bits - 1) if zeros is None else spread(zeros))) * spread(scales)


# --- nibbles of checkpoints -----------------------------------------------------------------------------------------

SEQUENTIAL = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds column j of eight


def pack_nibbles(codes: torch.Tensor, places: tuple[int, ...] = SEQUENTIAL) -> torch.Tensor:
    """uint8 [R, C] to int32 [R, ceil(C / 8)]. Column j of each eight columns goes to nibble places[j]."""
    shifts = 4 * torch.tensor(places, device=codes.device)
    eights = F.pad(codes.to(torch.int32), (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    return (eights << shifts).sum(-1, dtype=torch.int32)


def unpack_nibbles(words: torch.Tensor, columns: int, places: tuple[int, ...] = SEQUENTIAL) -> torch.Tensor:
    """int32 [R, ceil(columns / 8)] to uint8 [R, columns]."""
    shifts = 4 * torch.tensor(places, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1)[:, :columns].to(torch.uint8)


# --- the product ----------------------------------------------------------------------------------------------------

ROUNDED_COLUMNS = 256  # the most columns of x that share a scale


def round_to_int8(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x rounded to 8-bit integers times a scale, float32 [..., K].

    Each row has a scale for every group, or for every `ROUNDED_COLUMNS` columns of a longer group.
    """
    k = x.shape[-1]
    group = k if group_size == -1 else min(group_size, k)
    parts = []
    for start in range(0, k, group):
        for columns in x[..., start : start + group].float().split(ROUNDED_COLUMNS, -1):
            scale = columns.abs().amax(-1, keepdim=True) / 127
            scale = torch.where(scale < 1e-30 / 127, 0, scale)  # the reciprocal of a smaller one overflows
            parts.append((columns * torch.where(scale > 0, 1 / scale, 0)).round() * scale)
    return torch.cat(parts, -1) if parts else x.float()


def weight_of(packed, scales, zeros, minimums, *, group_size: int, n: int, k: int, bits: int) -> torch.Tensor:
    """float32 [n, k] from the tensors of an `Int4Weight`."""
    zeros, minimums = (None if x is None else from_panels(x, n) for x in (zeros, minimums))
    return dequantize(unpack(packed, n, k, bits), from_panels(scales, n), zeros, group_size, minimums, bits)


def int4_gemm(
    x, packed, scales, zeros=None, bias=None, *, group_size: int, n: int, minimums=None, bits: int = 4
) -> torch.Tensor:
    sizes = {"group_size": group_size, "n": n, "k": x.shape[-1], "bits": bits}
    out = x.float() @ weight_of(packed, scales, zeros, minimums, **sizes).mT
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)

"""Weights in 4 or 8 bits: packed once in the order in which tensor cores and vector units read them.

QUICK (Kim et al., 2024, arXiv 2402.10076) interleaves quantised weights ahead of time. A kernel then loads a word,
dequantises it with one shift and one logic operation per register, and multiplies. headstart uses one layout for every
device. All data of 16 output columns stand together. So a slice of 16, 32, ... output columns of a weight is a slice of
each of its tensors along dim 0, and slicing and joining need no repacking.

The layout: `csrc/layouts/int4.h`. Kernels: `csrc/cpu/int4_gemm.cpp`, `csrc/cuda/int4_gemm*.cu`, `triton/int4_gemm.py`.
The maths in plain torch: `reference/int4_gemm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .. import _library
from ..reference import gguf
from ..reference import int4_gemm as reference
from . import _checkpoint, _checks


@dataclass(frozen=True)
class Int4Weight:
    """A linear layer's weight [N, K] (out × in) in 4 or 8 bits. It is one of these::

        w[n, j] = (code[n, j] - zero[n, g]) * scale[n, g]
        w[n, j] = code[n, j] * scale[n, g] + minimum[n, g]

    - ``packed`` int32 [ceil(N/16), ceil(K/32), 4, 16], in 8 bits [ceil(N/16), ceil(K/16), 4, 16]: the codes,
      interleaved (`csrc/layouts/int4.h`).
    - ``scales`` float32, float16 or bfloat16 [ceil(N/16), ceil(K/group_size), 16]: panel, group, column of the panel.
    - ``zeros`` uint8, the zero points, in the shape of ``scales``. If there are none, and no minimums, every zero point
      is the middle code, 8 or 128 (symmetric).
    - ``group_size``: the number of consecutive columns of a row that share these numbers. It is a multiple of 32, in
      8 bits of 16. -1 means the whole row.
    - ``shape``: (N, K).
    - ``permutation`` int32 [K] or None: packed column j is column ``permutation[j]`` of the weight (GPTQ's act-order).
    - ``minimums`` in the dtype and shape of ``scales``, or None. Beside minimums there are no zeros.
    - ``bits``: 4 or 8.

    N is padded with zeros to whole panels of 16 columns, and K to whole slabs of 32 (in 8 bits, 16). Raises a
    ValueError if a dtype, a shape or a device is wrong.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_size: int
    shape: tuple[int, int]
    permutation: torch.Tensor | None = None
    minimums: torch.Tensor | None = None
    bits: int = 4

    def __post_init__(self):
        n, k = self.shape
        groups = self.scales, self.zeros, self.minimums
        _check_weight("Int4Weight", self.packed, *groups, self.group_size, n, k, self.bits)
        if self.permutation is not None:
            _checks.tensor("Int4Weight", "permutation", self.permutation, torch.int32, (k,), like=self.packed)

    @property
    def nbytes(self) -> int:
        """The bytes of all its tensors."""
        tensors = (self.packed, self.scales, self.zeros, self.permutation, self.minimums)
        return sum(t.nbytes for t in tensors if t is not None)

    @classmethod
    def _of_codes(cls, codes, scales, zeros, group_size, permutation=None, minimums=None, bits=4) -> Int4Weight:
        """The weight of codes [N, K], and scales, zeros and minimums [N, groups].

        If all zeros are the middle code, they are not stored.
        """
        if zeros is not None and bool((zeros == 2 ** (bits - 1)).all()):
            zeros = None
        zeros, minimums = (None if x is None else reference.to_panels(x) for x in (zeros, minimums))
        packed, shape = int4_pack(codes, bits=bits), tuple(codes.shape)
        return cls(packed, reference.to_panels(scales), zeros, group_size, shape, permutation, minimums, bits)

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None = None,
        *,
        group_size: int,
        minimums: torch.Tensor | None = None,
        bits: int = 4,
    ) -> Int4Weight:
        """Packs codes uint8 [N, K], and what groups share [N, groups], with groups = ceil(K / group_size).

        Codes and zeros (uint8) are 0 to 15, or 0 to 255 in 8 bits. Scales are float32, float16 or bfloat16, and
        minimums have their dtype. Without zeros and minimums, every zero point is 8, or 128. Raises a ValueError if an
        argument is wrong.
        """
        op = "Int4Weight.from_codes"
        _checks.tensor(op, "codes", codes, torch.uint8, ("N", "K"))
        _checks.expect(codes.numel() > 0, op, "codes", "at least one row and column", list(codes.shape))
        n, k = codes.shape
        _check_bits(op, bits)
        group_size = _group_size(op, group_size, k, bits)
        count = _group_count(group_size, k)
        _checks.tensor(op, "scales", scales, _checks.FLOAT_DTYPES, (n, count), like=codes)
        if zeros is not None:
            _checks.tensor(op, "zeros", zeros, torch.uint8, (n, count), like=codes)
            _check_range(op, "zeros", zeros, bits)
        if minimums is not None:
            _checks.expect(zeros is None, op, "minimums", "None beside zeros", "both")
            _checks.tensor(op, "minimums", minimums, scales.dtype, (n, count), like=codes)
        _check_range(op, "codes", codes, bits)
        return cls._of_codes(codes, scales, zeros, group_size, minimums=minimums, bits=bits)

    @classmethod
    def quantize(cls, w: torch.Tensor, group_size: int = 128, symmetric: bool = False, *, bits: int = 4) -> Int4Weight:
        """Rounds w [N, K] to the nearest codes of 4 or 8 bits. It uses no calibration data.

        Each group's range is cut by the factor, from 1 down to 0.5 in steps of 0.025, that gives the least squared
        error. Scales keep w's dtype (float32, float16 or bfloat16), and codes are chosen for the rounded scale. With
        `symmetric`, every zero point is 8, or 128. Raises a ValueError if w is empty or not finite, or an argument is
        wrong.
        """
        op = "Int4Weight.quantize"
        _checks.tensor(op, "w", w, _checks.FLOAT_DTYPES, ("N", "K"))
        _checks.expect(w.numel() > 0, op, "w", "at least one row and column", list(w.shape))
        _checks.expect(bool(torch.isfinite(w).all()), op, "w", "finite weights", "inf or nan")
        _check_bits(op, bits)
        group_size = _group_size(op, group_size, w.shape[1], bits)
        return cls._of_codes(*reference.quantize(w, group_size, symmetric, bits), group_size, bits=bits)

    def codes(self) -> torch.Tensor:
        """The codes, uint8 [N, K], in the weight's own column order."""
        codes = int4_unpack(self.packed, *self.shape, bits=self.bits)
        if self.permutation is not None:
            codes = codes[:, self.permutation.long().argsort()]
        return codes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, K], computed in float32 and rounded to `dtype` once."""
        scales, zeros = self._groups()
        minimums = None if self.minimums is None else reference.from_panels(self.minimums, self.shape[0])
        codes = int4_unpack(self.packed, *self.shape, bits=self.bits)
        w = reference.dequantize(codes, scales, zeros, self.group_size, minimums, self.bits)
        if self.permutation is not None:
            w = w[:, self.permutation.long().argsort()]
        return w.to(dtype)

    def to(self, device: torch.device | str) -> Int4Weight:
        """The same weight on another device."""
        names = "packed", "scales", "zeros", "permutation", "minimums"
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: t.to(device) for name, t in tensors.items() if t is not None})

    # --- checkpoint formats: lossless on codes, scales and zeros ---

    @classmethod
    def from_awq(cls, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int) -> Int4Weight:
        """Reads AWQ's "gemm" version: qweight int32 [K, N/8], qzeros int32 [K/G, N/8], scales [K/G, N].

        G is `group_size`. Nibble i of word c is column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]. The versions "gemv" and
        "gemv_fast" and llm-awq's version have other layouts, which this function cannot read. Raises a ValueError if a
        tensor has the wrong dtype or shape.
        """
        op = "Int4Weight.from_awq"
        _checks.tensor(op, "qweight", qweight, torch.int32, ("K", "N/8"))
        k, n = qweight.shape[0], qweight.shape[1] * 8
        group_size = _group_size(op, group_size, k)
        count = _group_count(group_size, k)
        _checks.tensor(op, "qzeros", qzeros, torch.int32, (count, n // 8), like=qweight)
        _checks.tensor(op, "scales", scales, _checks.FLOAT_DTYPES, (count, n), like=qweight)
        codes = reference.unpack_nibbles(qweight, n, reference.AWQ).mT
        zeros = reference.unpack_nibbles(qzeros, n, reference.AWQ).mT
        return cls._of_codes(codes, scales.mT, zeros, group_size)

    def to_awq(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(qweight, qzeros, scales) of AWQ's "gemm" version, as in `from_awq`.

        Raises a ValueError unless N is a multiple of 8 and the weight has no permutation (act-order).
        """
        op = "Int4Weight.to_awq"
        self._expect_integers(op)
        _checks.expect(self.permutation is None, op, "permutation", "None: AWQ has no act-order", "a permutation")
        _checks.expect(self.shape[0] % 8 == 0, op, "shape", "a multiple of 8 rows", self.shape)
        scales, zeros = self._groups(explicit_zeros=True)
        qweight = reference.pack_nibbles(self.codes().mT, reference.AWQ)
        return qweight, reference.pack_nibbles(zeros.mT, reference.AWQ), scales.mT.contiguous()

    @classmethod
    def from_gptq(
        cls,
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        g_idx: torch.Tensor | None = None,
        *,
        group_size: int,
        version: int,
    ) -> Int4Weight:
        """Reads GPTQ: qweight int32 [K/8, N], qzeros int32 [K/G, ceil(N/8)], scales [K/G, N], g_idx int32 or int64 [K].

        G is `group_size`. Version 1 (``"checkpoint_format": "gptq"``) stores a zero point as (zero - 1) modulo 16.
        Version 2 (``"gptq_v2"``) stores it unchanged. If g_idx is not in order (act-order), this function sorts the
        columns by group once, and `int4_gemm` sorts the activations in each call. Raises a ValueError if a tensor or
        `version` is wrong.
        """
        op = "Int4Weight.from_gptq"
        _checks.tensor(op, "qweight", qweight, torch.int32, ("K/8", "N"))
        k, n = qweight.shape[0] * 8, qweight.shape[1]
        group_size = _group_size(op, group_size, k)
        count = _group_count(group_size, k)
        _checks.tensor(op, "qzeros", qzeros, torch.int32, (count, -(-n // 8)), like=qweight)
        _checks.tensor(op, "scales", scales, _checks.FLOAT_DTYPES, (count, n), like=qweight)
        permutation = _act_order(op, "g_idx", g_idx, group_size, k, like=qweight)
        codes = reference.unpack_nibbles(qweight.mT, k)
        zeros = (reference.unpack_nibbles(qzeros, n).mT + _stored_below(op, version)) & 15
        return cls._of_codes(_permuted(codes, permutation), scales.mT, zeros, group_size, permutation)

    def to_gptq(self, version: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(qweight, qzeros, scales, g_idx) as in `from_gptq`. Raises a ValueError unless K is a multiple of 8."""
        op = "Int4Weight.to_gptq"
        self._expect_integers(op)
        _checks.expect(self.shape[1] % 8 == 0, op, "shape", "a multiple of 8 columns", self.shape)
        scales, zeros = self._groups(explicit_zeros=True)
        qweight = reference.pack_nibbles(self.codes()).mT.contiguous()
        qzeros = reference.pack_nibbles((zeros.mT - _stored_below(op, version)) & 15)
        return qweight, qzeros, scales.mT.contiguous(), self._group_of_column()

    @classmethod
    def from_compressed_tensors(cls, tensors: Mapping[str, torch.Tensor], group_size: int) -> Int4Weight:
        """Reads one module's tensors in compressed-tensors' format "pack-quantized".

        A name is bare or ``<module>.<name>``. The tensors are weight_packed int32 [N, ceil(K/8)], weight_scale
        [N, K/G] and weight_shape [2]. Two more are optional: weight_zero_point, which is int32 [ceil(N/8), K/G] (in
        older files int8 [N, K/G]), and weight_g_idx [K]. G is `group_size`. Raises a ValueError if a tensor is missing
        or wrong.
        """
        op = "Int4Weight.from_compressed_tensors"
        n, k = _checkpoint.shape(op, tensors, "weight_shape")
        group_size = _group_size(op, group_size, k)
        count = _group_count(group_size, k)
        packed = _checkpoint.entry(op, tensors, "weight_packed")
        scales = _checkpoint.entry(op, tensors, "weight_scale")
        zeros = _checkpoint.entry(op, tensors, "weight_zero_point", required=False)
        g_idx = _checkpoint.entry(op, tensors, "weight_g_idx", required=False)
        _checks.tensor(op, "weight_packed", packed, torch.int32, (n, -(-k // 8)))
        _checks.tensor(op, "weight_scale", scales, _checks.FLOAT_DTYPES, (n, count), like=packed)
        if zeros is not None and zeros.dtype == torch.int8:
            _checks.tensor(op, "weight_zero_point", zeros, torch.int8, (n, count), like=packed)
            low, high = zeros.aminmax()
            _checks.expect(low >= -8 and high <= 7, op, "weight_zero_point", "values -8 to 7", f"{low} to {high}")
            zeros = (zeros + 8).to(torch.uint8)
        elif zeros is not None:
            _checks.tensor(op, "weight_zero_point", zeros, torch.int32, (-(-n // 8), count), like=packed)
            zeros = reference.unpack_nibbles(zeros.mT, n).mT
        permutation = _act_order(op, "weight_g_idx", g_idx, group_size, k, like=packed)
        codes = reference.unpack_nibbles(packed, k)
        return cls._of_codes(_permuted(codes, permutation), scales, zeros, group_size, permutation)

    @classmethod
    def from_gguf(cls, rows: torch.Tensor, kind: str) -> Int4Weight:
        """Reads a tensor of a GGUF file: uint8 [N, bytes of a row], of kind Q4_0, Q4_1, Q4_K, Q5_K, Q6_K or Q8_0.

        The weight is, bit for bit, what the package gguf's dequantisation gives. Q5_K and Q6_K become 8 bits wide.
        Raises a ValueError if an argument is wrong.
        """
        op = "Int4Weight.from_gguf"
        _checks.expect(kind in gguf.KINDS, op, "kind", f"one of {', '.join(gguf.KINDS)}", repr(kind))
        _checks.tensor(op, "rows", rows, torch.uint8, ("N", "bytes"))
        block, size = gguf.KINDS[kind][0], rows.shape[1]
        _checks.expect(size > 0 and size % block == 0, op, "rows", f"rows of whole blocks of {block} bytes", size)
        codes, scales, minimums, group_size, bits = gguf.unpack(kind, rows)
        group_size = _group_size(op, group_size, codes.shape[1], bits)
        return cls._of_codes(codes, scales, None, group_size, minimums=minimums, bits=bits)

    def to_compressed_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the format "pack-quantized", by their names without the module."""
        self._expect_integers("Int4Weight.to_compressed_tensors")
        scales, zeros = self._groups()
        tensors = {
            "weight_packed": reference.pack_nibbles(self.codes()),
            "weight_scale": scales.contiguous(),
            "weight_shape": torch.tensor(self.shape, dtype=torch.int64),
        }
        if zeros is not None:
            tensors["weight_zero_point"] = reference.pack_nibbles(zeros.mT).mT.contiguous()
        if self.permutation is not None:
            tensors["weight_g_idx"] = self._group_of_column()
        return tensors

    def _expect_integers(self, op: str) -> None:
        """What AWQ, GPTQ and "pack-quantized" can say."""
        _checks.expect(self.bits == 4, op, "bits", "4", self.bits)
        _checks.expect(self.minimums is None, op, "minimums", "None: the format has integer zero points", "minimums")

    def _groups(self, explicit_zeros: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zeros as [N, groups]."""
        scales = reference.from_panels(self.scales, self.shape[0])
        if self.zeros is not None:
            return scales, reference.from_panels(self.zeros, self.shape[0])
        return scales, torch.full_like(scales, 8, dtype=torch.uint8) if explicit_zeros else None

    def _group_of_column(self) -> torch.Tensor:
        """g_idx int32 [K]: the group of each of the weight's own columns."""
        k = self.shape[1]
        size = k if self.group_size == -1 else self.group_size
        groups = torch.arange(k, dtype=torch.int32, device=self.packed.device) // size
        if self.permutation is None:
            return groups
        return torch.empty_like(groups).scatter_(0, self.permutation.long(), groups)


def int4_gemm(
    x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None, *, int8_activations: bool = False
) -> torch.Tensor:
    """A linear layer with a weight in 4 or 8 bits::

        out[..., n] = sum_j x[..., j] w[n, j] + bias[n]            w as in `Int4Weight`

    Args:
        x: [..., K], float32, float16 or bfloat16, last dim contiguous.
        weight: an `Int4Weight` of shape (N, K) on x's device.
        bias: [N] in x's dtype, or None.
        int8_activations: if true, a CPU rounds x to int8, as ``round(x / s)``. The scale is s = max |x| / 127 over the
            columns of a group in one row, or over at most 256 of them if a group is longer. Products and sums of
            integers are several times as fast. On a GPU, x is not rounded.

    On a GPU, a weight in 8 bits or with minimums is opened to x's dtype first, and torch multiplies.

    Returns:
        [..., N] in x's dtype. Sums are float32, except that sums of integers over a group are exact. A CPU with VNNI
        and without a bf16 dot product turns float16 and bfloat16 x into integers of 23 bits times a power of two. On
        such a CPU, a row with a value that is not finite becomes NaN. On a CPU, the result of a row does not depend on
        other rows.

    Raises:
        ValueError or RuntimeError: an argument is wrong. The message names it, what was expected and what was got.

    Source: QUICK (arXiv 2402.10076), with a layout that does not depend on N.
    """
    op = "int4_gemm"
    _checks.expect(isinstance(weight, Int4Weight), op, "weight", "an Int4Weight", type(weight).__name__)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:  # torch.compile cannot make the message of a size that may change
        _checks.expect(False, op, "x", f"[..., {k}]", _checks.describe(x))
    if weight.permutation is not None:
        x = x.index_select(-1, weight.permutation)
    return _int4_gemm(
        x,
        weight.packed,
        weight.scales,
        weight.zeros,
        bias,
        group_size=weight.group_size,
        n=n,
        int8_activations=int8_activations,
        minimums=weight.minimums,
        bits=weight.bits,
    )


# --- formats --------------------------------------------------------------------------------------------------------


def _group_size(op: str, group_size: int, k: int, bits: int = 4) -> int:
    """The group size to store: -1 if a group covers the whole row, else the checkpoint's."""
    size, slab = -1 if group_size == k else group_size, reference.slab(bits)
    good = size == -1 or (size > 0 and size % slab == 0)
    _checks.expect(good, op, "group_size", f"a multiple of {slab}, or -1 or {k} (a row)", size)
    return size


def _check_bits(op: str, bits: int) -> None:
    _checks.expect(bits in (4, 8), op, "bits", "4 or 8", bits)


def _check_range(op: str, argument: str, x: torch.Tensor, bits: int) -> None:
    """Of codes and zero points, which are bytes."""
    top = 2**bits - 1
    if top < 255 and bool((x > top).any()):
        _checks.fail(op, argument, f"values 0 to {top}", f"{int(x.max())}")


def _group_count(group_size: int, k: int) -> int:
    return 1 if group_size == -1 else -(-k // group_size)


def _at_most_a_row(group_size: int, k: int) -> int:
    """-1 for a group as long as a row or longer, so that no kernel computes with a huge number."""
    return -1 if group_size >= k else group_size


def _stored_below(op: str, version: int) -> int:
    """The number that must be added to a GPTQ file's zero points to get the true ones."""
    _checks.expect(version in (1, 2), op, "version", "1 or 2", version)
    return 2 - version


def _act_order(op, argument, g_idx, group_size, k, like) -> torch.Tensor | None:
    """The permutation that sorts columns by group. None if they are in order, or g_idx is missing or was not filled."""
    if g_idx is None:
        return None
    _checks.tensor(op, argument, g_idx, (torch.int32, torch.int64), (k,), like=like)
    if bool((g_idx == -1).all()):
        return None
    groups, order = g_idx.long().sort(stable=True)
    size = k if group_size == -1 else group_size
    want = torch.arange(k, device=g_idx.device) // size
    if not torch.equal(groups, want):
        sizes = torch.unique_consecutive(groups, return_counts=True)[1]
        got = f"{len(sizes)} groups of {int(sizes.min())} to {int(sizes.max())}, {groups[0]} to {groups[-1]}"
        _checks.fail(op, argument, f"groups of {size} columns, 0 to {(k - 1) // size}", got)
    return None if torch.equal(g_idx.long(), want) else order.to(torch.int32)


def _permuted(codes: torch.Tensor, permutation: torch.Tensor | None) -> torch.Tensor:
    return codes if permutation is None else codes[:, permutation.long()]


# --- the contract: checks, fake kernels, schemas --------------------------------------------------------------------


def _check_packed(op, packed, n, k, bits, like=None):
    _check_bits(op, bits)
    _checks.expect(n > 0 and k > 0, op, "packed", "a weight with at least one row and column", (n, k))
    _checks.tensor(op, "packed", packed, torch.int32, _packed_shape(n, k, bits), like)
    _check_contiguous(op, "packed", packed)


def _packed_shape(n, k, bits) -> tuple:
    return -(-n // reference.PANEL), -(-k // reference.slab(bits)), reference.WORDS, reference.PANEL


def _check_weight(op, packed, scales, zeros, minimums, group_size, n, k, bits, like=None):
    _check_packed(op, packed, n, k, bits, like)
    slab = reference.slab(bits)
    good = group_size == -1 or (group_size > 0 and group_size % slab == 0)
    _checks.expect(good, op, "group_size", f"a positive multiple of {slab}, or -1 (one group a row)", group_size)
    panels = (packed.shape[0], _group_count(group_size, k), 16)
    _checks.tensor(op, "scales", scales, _checks.FLOAT_DTYPES, panels, like=packed)
    _check_contiguous(op, "scales", scales)
    if zeros is not None:
        _checks.tensor(op, "zeros", zeros, torch.uint8, panels, like=packed)
        _check_contiguous(op, "zeros", zeros)
    if minimums is not None:
        _checks.expect(zeros is None, op, "minimums", "None beside zeros", "both")
        _checks.tensor(op, "minimums", minimums, scales.dtype, panels, like=packed)
        _check_contiguous(op, "minimums", minimums)


def _check_contiguous(op, argument, x):
    _checks.expect(x.is_contiguous(), op, argument, "a contiguous tensor", f"strides {tuple(x.stride())}")


def _check_gemm(x, packed, scales, zeros, minimums, bias, group_size, n, bits):
    op = "int4_gemm"
    _checks.expect(x.dim() > 0, op, "x", "[..., K]", "a scalar")
    _checks.tensor(op, "x", x, _checks.FLOAT_DTYPES, x.shape)
    _checks.contiguous_last(op, "x", x)
    _check_weight(op, packed, scales, zeros, minimums, group_size, n, x.shape[-1], bits, like=x)
    if bias is not None:
        _checks.tensor(op, "bias", bias, x.dtype, (n,), like=x)
        _checks.contiguous_last(op, "bias", bias)


def _int4_gemm_impl(
    x, packed, scales, zeros=None, bias=None, *, group_size, n, int8_activations=False, minimums=None, bits=4
):
    _check_gemm(x, packed, scales, zeros, minimums, bias, group_size, n, bits)
    group_size = _at_most_a_row(group_size, x.shape[-1])
    rounded = reference.round_to_int8(x, group_size).to(x.dtype) if int8_activations and x.is_cpu else x
    options = {"group_size": group_size, "n": n, "minimums": minimums, "bits": bits}
    return reference.int4_gemm(rounded, packed, scales, zeros, bias, **options)


def _int4_gemm_triton(
    x, packed, scales, zeros=None, bias=None, *, group_size, n, int8_activations=False, minimums=None, bits=4
):
    from ..triton import int4_gemm as kernels

    _check_gemm(x, packed, scales, zeros, minimums, bias, group_size, n, bits)
    k = x.shape[-1]
    group_size = _at_most_a_row(group_size, k)
    if bits == 8 or minimums is not None:
        opened = reference.weight_of(packed, scales, zeros, minimums, group_size=group_size, n=n, k=k, bits=bits)
        return torch.nn.functional.linear(x, opened.to(x.dtype), bias)
    return kernels.int4_gemm(x, packed, scales, zeros, bias, group_size=group_size, n=n)


def _int4_gemm_fake(
    x, packed, scales, zeros=None, bias=None, *, group_size, n, int8_activations=False, minimums=None, bits=4
):
    _check_gemm(x, packed, scales, zeros, minimums, bias, group_size, n, bits)
    return x.new_empty((*x.shape[:-1], n))


def _int4_pack_impl(codes, *, bits=4):
    _check_codes(codes, bits)
    _check_range("int4_pack", "codes", codes, bits)
    return reference.pack(codes, bits)


def _int4_pack_fake(codes, *, bits=4):
    _check_codes(codes, bits)
    return codes.new_empty(_packed_shape(*codes.shape, bits), dtype=torch.int32)


def _check_codes(codes, bits):
    _check_bits("int4_pack", bits)
    _checks.tensor("int4_pack", "codes", codes, torch.uint8, ("N", "K"))


def _int4_unpack_impl(packed, n, k, *, bits=4):
    _check_packed("int4_unpack", packed, n, k, bits)
    return reference.unpack(packed, n, k, bits).contiguous()


def _int4_unpack_fake(packed, n, k, *, bits=4):
    _check_packed("int4_unpack", packed, n, k, bits)
    return packed.new_empty((n, k), dtype=torch.uint8)


# int4_pack packs codes 0 to 15, or 0 to 255 in 8 bits. int4_unpack gives the codes back.
int4_pack = _library.define(
    "int4_pack", "(Tensor codes, *, int bits=4) -> Tensor", reference=_int4_pack_impl, fake=_int4_pack_fake
)
int4_unpack = _library.define(
    "int4_unpack",
    "(Tensor packed, SymInt n, SymInt k, *, int bits=4) -> Tensor",
    reference=_int4_unpack_impl,
    fake=_int4_unpack_fake,
)
_int4_gemm = _library.define(
    "int4_gemm",
    "(Tensor x, Tensor packed, Tensor scales, Tensor? zeros=None, Tensor? bias=None, *, int group_size, SymInt n, "
    "bool int8_activations=False, Tensor? minimums=None, int bits=4) -> Tensor",
    reference=_int4_gemm_impl,
    fake=_int4_gemm_fake,
    triton=_int4_gemm_triton,
)

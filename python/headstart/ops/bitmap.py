"""Bitmap-sparse weights: one bit for every position, and the values at the set bits, row by row.

Endor (2024, arXiv 2406.11674) compresses pruned weights in this way, because offloading waits for bytes to arrive. A
bf16 weight at 50 % density takes 9 bits. Values may also be quantised, to int8 (5 bits) or int4 (3 bits). The layout of
bits and values is compressed-tensors' "sparse-bitmask", which this module reads and writes. Row offsets say where the
values of each row begin.

The maths in plain torch: `reference/bitmap.py`. Triton kernels: `triton/bitmap.py`. Compiled kernels:
`csrc/cpu/bitmap.cpp`, `csrc/cuda/bitmap_*.cu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .. import _library
from ..reference import bitmap as reference
from . import _checkpoint, _checks

VALUE_DTYPES = (*_checks.FLOAT_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


@dataclass(frozen=True)
class BitmapWeight:
    """A linear layer's weight [N, K] (out × in) as a bitmap and its non-zero values.

    - ``values`` [nnz], row-major, in the weight's dtype. With ``scales`` they are quantised: int8 [nnz], or
      uint8 [ceil(nnz/2)] with two signed nibbles in a byte, value 2i in the low one and value 2i + 1 in the high one.
    - ``bitmask`` uint8 [N, ceil(K/8)]: bit j % 8 (counted from the lowest) of byte j // 8 is column j. Pad bits are 0.
    - ``row_offsets`` int64 [N + 1]: row n's values are ``row_offsets[n]`` to ``row_offsets[n + 1]``.
    - ``shape``: (N, K).
    - ``scales`` float32, float16 or bfloat16 [N, ceil(K/group_size)], or None. With scales, a weight is its value times
      the scale of its group.
    - ``group_size``: the number of consecutive columns of a row that share a scale. -1 means the whole row.

    Raises a ValueError if a dtype, a shape or a device is wrong. `validate` checks the data.
    """

    values: torch.Tensor
    bitmask: torch.Tensor
    row_offsets: torch.Tensor
    shape: tuple[int, int]
    scales: torch.Tensor | None = None
    group_size: int = -1

    def __post_init__(self):
        n, k = self.shape
        op = "BitmapWeight"
        _check_weight(op, self.values, self.bitmask, self.row_offsets, k, self.scales, self.group_size)
        _checks.expect(self.bitmask.shape[0] == n, op, "bitmask", f"{n} rows", self.bitmask.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decompressed weight."""
        return self.values.dtype if self.scales is None else self.scales.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of all its tensors."""
        tensors = (self.values, self.bitmask, self.row_offsets, self.scales)
        return sum(t.nbytes for t in tensors if t is not None)

    @classmethod
    def compress(cls, w: torch.Tensor, values: str = "same", group_size: int = 128) -> BitmapWeight:
        """Compresses w [N, K].

        A weight that was pruned by multiplying with a mask holds -0.0 where it was negative. ``"same"`` keeps each
        -0.0, and each costs a stored value. If the sign of a zero does not matter, pass ``w + 0.0``, which turns -0.0
        into 0.0.

        Args:
            w: [N, K], a dtype of `VALUE_DTYPES`. To quantise, it must be float32, float16 or bfloat16.
            values: ``"same"`` keeps every bit of w and leaves out the weights whose bits are all 0. ``"int8"`` and
                ``"int4"`` round each weight to the nearest multiple of a symmetric group scale, and leave out the
                weights that round to 0. Scales are in w's dtype.
            group_size: consecutive columns that share a scale, or -1 for the whole row. ``"same"`` does not use it.

        Returns:
            A `BitmapWeight` of shape (N, K).

        Raises:
            ValueError: an argument is wrong, or w is to be quantised and is empty or not finite.
        """
        op = "BitmapWeight.compress"
        bits = _value_bits(op, values, w)
        shape = tuple(w.shape)
        if bits is None:
            return cls(*bitmap_compress(w), shape)
        _check_group_size(op, group_size)
        _checks.expect(w.numel() > 0, op, "w", "at least one row and column", list(shape))
        _checks.expect(bool(torch.isfinite(w).all()), op, "w", "finite weights", "inf or nan")
        codes, scales = reference.quantize(w, group_size, bits)
        kept, bitmask, row_offsets = bitmap_compress(codes)
        kept = reference.pack_signed_nibbles(kept) if bits == 4 else kept
        return cls(kept, bitmask, row_offsets, shape, scales, group_size)

    @staticmethod
    def size(w: torch.Tensor, values: str = "same", group_size: int = 128) -> int:
        """The number of bytes that `compress` would make of w [N, K]. If few weights are 0, it is above ``w.nbytes``.

        The number is exact for ``"same"``. For ``"int8"`` and ``"int4"`` it is an upper bound, because weights that
        round to 0 are also left out. The arguments are those of `compress`.
        """
        op = "BitmapWeight.size"
        value_bits = _value_bits(op, values, w)
        n, k = w.shape
        bits = w.view(reference.INTEGER[w.element_size()])
        nnz = int(bits.count_nonzero()) if values == "same" else int(w.count_nonzero())
        tables = n * -(-k // 8) + 8 * (n + 1)
        if values == "same":
            return nnz * w.element_size() + tables
        _check_group_size(op, group_size)
        groups = 1 if group_size == -1 else -(-k // group_size)
        return -(-nnz * value_bits // 8) + tables + n * groups * w.element_size()

    def decompress(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The dense weight [N, K] in `self.dtype`.

        If `out` is given, the weight is written there. `out` must be [N, K] in the same dtype, on the same device, with
        a contiguous last dimension.
        """
        tensors = (self.values, self.bitmask, self.row_offsets, self.shape[1])
        options = {"scales": self.scales, "group_size": self.group_size}
        if out is None:
            return bitmap_decompress(*tensors, **options)
        _bitmap_decompress_out(*tensors, **options, out=out)
        return out

    def to(self, device: torch.device | str) -> BitmapWeight:
        """The same weight on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        tensors = (self.values.to(device), self.bitmask.to(device), self.row_offsets.to(device))
        return BitmapWeight(*tensors, self.shape, scales, self.group_size)

    def validate(self, op: str = "BitmapWeight.validate", values: str = "values") -> BitmapWeight:
        """Reads the data, raises a ValueError that names the tensor if one is damaged, and returns self.

        It checks that the offsets begin at 0, do not fall and end at the number of values, that every row has as many
        set bits as values, and that no pad bit is set.
        """
        offsets, cols = self.row_offsets, self.shape[1]
        counts = offsets.diff()
        _checks.expect(int(offsets[0]) == 0, op, "row_offsets", "0 first", int(offsets[0]))
        falls = (counts < 0).nonzero()
        if len(falls):
            row = int(falls[0])
            _checks.fail(
                op, "row_offsets", "offsets that do not fall", f"{offsets[row : row + 2].tolist()} at row {row}"
            )
        nnz = int(offsets[-1])
        stored = -(-nnz // 2) if self.values.dtype == torch.uint8 else nnz
        _checks.expect(len(self.values) == stored, op, values, f"{stored} stored (nnz {nnz})", len(self.values))
        if cols % 8:
            padded = (self.bitmask[:, -1] >> (cols % 8)).nonzero()
            if len(padded):
                _checks.fail(op, "bitmask", f"no bit set past column {cols}", f"one in row {int(padded[0])}")
        bits = reference.count_bits(self.bitmask)
        wrong = (bits != counts).nonzero()
        if len(wrong):
            row = int(wrong[0])
            _checks.fail(op, "bitmask", f"{int(counts[row])} bits set in row {row} (row_offsets)", int(bits[row]))
        return self

    @classmethod
    def from_compressed_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> BitmapWeight:
        """Reads one module's tensors in compressed-tensors' format "sparse-bitmask".

        The tensors are compressed [nnz], bitmask uint8 [N, ceil(K/8)], shape int64 or int32 [2], and row_offsets
        int64 [N], which lacks the last offset. A name may be bare or ``<module>.<name>``. Older files use
        ``<module>.weight.<name>``. Raises a ValueError that names the tensor if one is missing or damaged.
        """
        op = "BitmapWeight.from_compressed_tensors"
        n, k = _checkpoint.shape(op, tensors, "shape")
        values, bitmask, offsets = (
            _checkpoint.entry(op, tensors, field) for field in ("compressed", "bitmask", "row_offsets")
        )
        _checks.tensor(op, "compressed", values, VALUE_DTYPES, ("nnz",))
        _checks.tensor(op, "bitmask", bitmask, torch.uint8, (n, -(-k // 8)), like=values)
        _checks.tensor(op, "row_offsets", offsets, torch.int64, (n,), like=values)
        offsets = torch.cat([offsets, offsets.new_tensor([len(values)])])
        return cls(values.contiguous(), bitmask.contiguous(), offsets, (n, k)).validate(op, "compressed")

    def to_compressed_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of "sparse-bitmask", by their names without the module.

        Raises a ValueError if the weight is quantised, because the format has no quantised values.
        """
        op = "BitmapWeight.to_compressed_tensors"
        _checks.expect(self.scales is None, op, "scales", "None: the format has no quantised values", "scales")
        return {
            "compressed": self.values,
            "bitmask": self.bitmask,
            "shape": torch.tensor(self.shape, dtype=torch.int64),
            "row_offsets": self.row_offsets[:-1].clone(),
        }


def bitmap_gemm(x: torch.Tensor, weight: BitmapWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer with a bitmap-sparse weight: ``x @ w.T + bias``.

    Args:
        x: [..., K], float32, float16 or bfloat16, last dim contiguous.
        weight: a `BitmapWeight` of shape (N, K) on x's device. Values that are not quantised must have x's dtype.
        bias: [N] in x's dtype, or None.

    Returns:
        [..., N] in x's dtype. Sums are float32. A quantised weight is its value times its scale. `decompress` rounds
        this product to the scale's dtype; a kernel may do so or not.

    Raises:
        ValueError or RuntimeError: an argument is wrong. The message names it, what was expected and what was got.

    Source: Endor (arXiv 2406.11674), with the product computed from the compressed weight.
    """
    op = "bitmap_gemm"
    _checks.expect(isinstance(weight, BitmapWeight), op, "weight", "a BitmapWeight", type(weight).__name__)
    return _bitmap_gemm(
        x,
        weight.values,
        weight.bitmask,
        weight.row_offsets,
        bias,
        cols=weight.shape[1],
        scales=weight.scales,
        group_size=weight.group_size,
    )


# --- the contract: checks, fake kernels, schemas --------------------------------------------------------------------


def _value_bits(op, values, w):
    """The bits of a quantised value, or None if the values are w's own."""
    choices = {"same": None, "int8": 8, "int4": 4}
    _checks.expect(values in choices, op, "values", "'same', 'int8' or 'int4'", repr(values))
    _checks.tensor(op, "w", w, VALUE_DTYPES if values == "same" else _checks.FLOAT_DTYPES, ("N", "K"))
    return choices[values]


def _check_group_size(op, group_size):
    _checks.expect(group_size == -1 or group_size > 0, op, "group_size", "a positive number, or -1 (a row)", group_size)


def _check_weight(op, values, bitmask, row_offsets, cols, scales, group_size):
    """Checks the tensors of one weight.

    The rows may be a slice of a larger weight, because `row_offsets` says where the values of each row are.
    """
    _checks.expect(cols >= 0, op, "cols", "no negative number", cols)
    dtypes = VALUE_DTYPES if scales is None else (torch.int8, torch.uint8)
    _checks.tensor(op, "values", values, dtypes, ("nnz",))
    _checks.tensor(op, "bitmask", bitmask, torch.uint8, ("N", -(-cols // 8)), like=values)
    n = bitmask.shape[0]
    _checks.tensor(op, "row_offsets", row_offsets, torch.int64, (n + 1,), like=values)
    tensors = {"values": values, "bitmask": bitmask, "row_offsets": row_offsets}
    if scales is not None:
        _check_group_size(op, group_size)
        groups = 1 if group_size == -1 else -(-cols // group_size)
        _checks.tensor(op, "scales", scales, _checks.FLOAT_DTYPES, (n, groups), like=values)
        tensors["scales"] = scales
    for argument, x in tensors.items():
        _checks.expect(x.is_contiguous(), op, argument, "a contiguous tensor", f"strides {tuple(x.stride())}")


def _check_data(op, values, bitmask, row_offsets):
    """Checks that no row reaches past the values. Only on the CPU, where reading data costs no synchronisation."""
    if values.device.type == "cpu" and bitmask.shape[0] > 0:
        first, counts = row_offsets[:-1], reference.count_bits(bitmask)
        stored = len(values) * (2 if values.dtype == torch.uint8 else 1)
        outside = ((first < 0) | (first > stored - counts)).nonzero()
        if len(outside):
            row = int(outside[0])
            got = f"row {row} at {int(first[row])} with {int(counts[row])}"
            _checks.fail(op, "row_offsets", f"rows within the {stored} values", got)


def _check_compress(w):
    _checks.tensor("bitmap_compress", "w", w, VALUE_DTYPES, ("N", "K"))


def _bitmap_compress_impl(w):
    _check_compress(w)
    return reference.compress(w)


def _bitmap_compress_fake(w):
    _check_compress(w)
    n, k = w.shape
    return (
        w.new_empty(torch.library.get_ctx().new_dynamic_size()),
        w.new_empty((n, -(-k // 8)), dtype=torch.uint8),
        w.new_empty(n + 1, dtype=torch.int64),
    )


def _bitmap_decompress_impl(values, bitmask, row_offsets, cols, *, scales=None, group_size=-1):
    op = "bitmap_decompress"
    _check_weight(op, values, bitmask, row_offsets, cols, scales, group_size)
    _check_data(op, values, bitmask, row_offsets)
    out = (values if scales is None else scales).new_empty(bitmask.shape[0], cols)
    reference.decompress(values, bitmask, row_offsets, scales=scales, group_size=group_size, out=out)
    return out


def _bitmap_decompress_triton(values, bitmask, row_offsets, cols, *, scales=None, group_size=-1):
    from ..triton import bitmap as kernels

    _check_weight("bitmap_decompress", values, bitmask, row_offsets, cols, scales, group_size)
    return kernels.bitmap_decompress(values, bitmask, row_offsets, cols, scales=scales, group_size=group_size)


def _bitmap_decompress_fake(values, bitmask, row_offsets, cols, *, scales=None, group_size=-1):
    _check_weight("bitmap_decompress", values, bitmask, row_offsets, cols, scales, group_size)
    return (values if scales is None else scales).new_empty(bitmask.shape[0], cols)


def _check_out(values, bitmask, row_offsets, cols, scales, group_size, out):
    op = "bitmap_decompress"
    _check_weight(op, values, bitmask, row_offsets, cols, scales, group_size)
    dtype = values.dtype if scales is None else scales.dtype
    _checks.tensor(op, "out", out, dtype, (bitmask.shape[0], cols), like=values)
    _checks.contiguous_last(op, "out", out)


def _bitmap_decompress_out_impl(values, bitmask, row_offsets, cols, *, scales=None, group_size=-1, out):
    _check_out(values, bitmask, row_offsets, cols, scales, group_size, out)
    _check_data("bitmap_decompress", values, bitmask, row_offsets)
    reference.decompress(values, bitmask, row_offsets, scales=scales, group_size=group_size, out=out)


def _bitmap_decompress_out_triton(values, bitmask, row_offsets, cols, *, scales=None, group_size=-1, out):
    from ..triton import bitmap as kernels

    _check_out(values, bitmask, row_offsets, cols, scales, group_size, out)
    kernels.decompress_to(out, values, bitmask, row_offsets, cols, scales, group_size)


def _bitmap_decompress_out_fake(values, bitmask, row_offsets, cols, *, scales=None, group_size=-1, out):
    _check_out(values, bitmask, row_offsets, cols, scales, group_size, out)


def _check_gemm(x, values, bitmask, row_offsets, bias, cols, scales, group_size):
    op = "bitmap_gemm"
    _checks.expect(x.dim() > 0 and x.shape[-1] == cols, op, "x", f"[..., {cols}]", _checks.describe(x))
    _checks.tensor(op, "x", x, _checks.FLOAT_DTYPES, x.shape)
    _checks.contiguous_last(op, "x", x)
    if scales is None:
        _checks.tensor(op, "values", values, x.dtype, ("nnz",), like=x)
    else:
        _checks.tensor(op, "scales", scales, _checks.FLOAT_DTYPES, ("N", "groups"), like=x)
    _check_weight(op, values, bitmask, row_offsets, cols, scales, group_size)
    if bias is not None:
        _checks.tensor(op, "bias", bias, x.dtype, (bitmask.shape[0],), like=x)
        _checks.contiguous_last(op, "bias", bias)


def _bitmap_gemm_impl(x, values, bitmask, row_offsets, bias=None, *, cols, scales=None, group_size=-1):
    _check_gemm(x, values, bitmask, row_offsets, bias, cols, scales, group_size)
    _check_data("bitmap_gemm", values, bitmask, row_offsets)
    return reference.bitmap_gemm(x, values, bitmask, row_offsets, bias, cols=cols, scales=scales, group_size=group_size)


def _bitmap_gemm_triton(x, values, bitmask, row_offsets, bias=None, *, cols, scales=None, group_size=-1):
    from ..triton import bitmap as kernels

    _check_gemm(x, values, bitmask, row_offsets, bias, cols, scales, group_size)
    return kernels.bitmap_gemm(x, values, bitmask, row_offsets, bias, cols=cols, scales=scales, group_size=group_size)


def _bitmap_gemm_fake(x, values, bitmask, row_offsets, bias=None, *, cols, scales=None, group_size=-1):
    _check_gemm(x, values, bitmask, row_offsets, bias, cols, scales, group_size)
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


# The output size depends on the data, so this operator synchronises with the host. It is for work ahead of time.
bitmap_compress = _library.define(
    "bitmap_compress",
    "(Tensor w) -> (Tensor values, Tensor bitmask, Tensor row_offsets)",
    reference=_bitmap_compress_impl,
    fake=_bitmap_compress_fake,
    tags=(torch.Tag.dynamic_output_shape,),
)
bitmap_decompress = _library.define(
    "bitmap_decompress",
    "(Tensor values, Tensor bitmask, Tensor row_offsets, SymInt cols, *, Tensor? scales=None, int group_size=-1) "
    "-> Tensor",
    reference=_bitmap_decompress_impl,
    fake=_bitmap_decompress_fake,
    triton=_bitmap_decompress_triton,
)
_bitmap_decompress_out = _library.define(
    "bitmap_decompress.out",
    "(Tensor values, Tensor bitmask, Tensor row_offsets, SymInt cols, *, Tensor? scales=None, int group_size=-1, "
    "Tensor(a!) out) -> ()",
    reference=_bitmap_decompress_out_impl,
    fake=_bitmap_decompress_out_fake,
    triton=_bitmap_decompress_out_triton,
)
_bitmap_gemm = _library.define(
    "bitmap_gemm",
    "(Tensor x, Tensor values, Tensor bitmask, Tensor row_offsets, Tensor? bias=None, *, SymInt cols, "
    "Tensor? scales=None, int group_size=-1) -> Tensor",
    reference=_bitmap_gemm_impl,
    fake=_bitmap_gemm_fake,
    triton=_bitmap_gemm_triton,
)

"""`BitmapLinear`: a linear layer whose weight is a `BitmapWeight`, in the place of `torch.nn.Linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.bitmap import BitmapWeight, _bitmap_gemm
from .packed_linear import Option, PackedLinear, frozen

STORED = {"int8": torch.int8, "int4": torch.uint8}  # of quantised values; int4 is two a byte


class BitmapLinear(PackedLinear):
    """``x @ weight.T + bias`` for x [..., K] in float32, float16 or bfloat16; the result [..., N] has x's dtype.

    Everything is a parameter that takes no gradient:

    - ``values``, ``bitmask``, ``row_offsets``, ``scales``: as in `BitmapWeight`; scales is None unless values are
      quantised;
    - ``bias`` [N] or None.

    The out dim comes first in all but ``values``, where ``row_offsets`` says which row has which, so rows
    ``bitmask[a:b]`` and ``row_offsets[a : b + 1]`` (and scales, bias) with all values are a layer of these rows.

    ``to(dtype)`` casts the bias, and values that are not quantised, since a product takes them in x's dtype.

    Args:
        in_features, out_features, nnz: K, N, and how many weights are stored.
        values: "same" for weights as they are, "int8" or "int4".
        group_size: of the scales, as in `BitmapWeight`; unused for "same".
        bias: whether there is one.
        scale_dtype: of the scales; `dtype` if None.
        dtype: of the bias and of values that are not quantised; torch's default if None.
    """

    WEIGHTS = "bitmap"
    TENSORS = ("values", "bitmask", "row_offsets", "scales")
    OPTIONS = {
        "values": Option.of_words("same", "int8", "int4"),
        "group_size": Option(lambda x: type(x) is int and (x == -1 or x > 0), "a positive number, or -1", -1),
        "scale_dtype": Option.of_floats("bfloat16"),
        "nnz": Option(lambda x: type(x) is int and x >= 0, "a number of weights", own=True),
    }

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nnz: int,
        *,
        values: str = "same",
        group_size: int = -1,
        bias: bool = True,
        scale_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if values != "same" and values not in STORED:
            raise ValueError(f"BitmapLinear: values: expected 'same', 'int8' or 'int4', got {values!r}")
        self.in_features, self.out_features, self.nnz = in_features, out_features, nnz
        self.group_size = -1 if values == "same" else group_size
        groups = 1 if group_size == -1 else -(-in_features // group_size)

        def tensor(*shape: int, dtype: torch.dtype | None) -> nn.Parameter:
            return frozen(torch.zeros(shape, dtype=dtype, device=device))

        self.values = tensor(-(-nnz // 2) if values == "int4" else nnz, dtype=STORED.get(values, dtype))
        self.bitmask = tensor(out_features, -(-in_features // 8), dtype=torch.uint8)
        self.row_offsets = tensor(out_features + 1, dtype=torch.int64)
        self.scales = None if values == "same" else tensor(out_features, groups, dtype=scale_dtype or dtype)
        self.bias = tensor(out_features, dtype=dtype) if bias else None

    @classmethod
    def from_weight(cls, weight: BitmapWeight, bias: torch.Tensor | None = None) -> BitmapLinear:
        """A layer with these very tensors; bias [N] or None."""
        n, k = weight.shape
        values = "same"
        if weight.scales is not None:
            values = next(name for name, dtype in STORED.items() if dtype == weight.values.dtype)
        nnz = int(weight.row_offsets[-1])
        layer = cls(k, n, nnz, values=values, group_size=weight.group_size, bias=False, device="meta")
        layer._check_bias(bias)
        for name in cls.TENSORS:
            setattr(layer, name, frozen(getattr(weight, name)))
        layer.bias = frozen(bias)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, values: str = "same", group_size: int = 128) -> BitmapLinear:
        """A layer with the weight of a linear layer, see `BitmapWeight.compress`, and a bias of its own."""
        weight = BitmapWeight.compress(linear.weight.detach(), values, group_size)
        return cls.from_weight(weight, None if linear.bias is None else linear.bias.detach().clone())

    @property
    def weight_bitmap(self) -> BitmapWeight:
        """The weight; its tensors are the layer's own."""
        values, bitmask, row_offsets, scales = (
            None if t is None else t.detach() for t in (self.values, self.bitmask, self.row_offsets, self.scales)
        )
        shape = (self.out_features, self.in_features)
        return BitmapWeight(values, bitmask, row_offsets, shape, scales, self.group_size)

    @property
    def values_kind(self) -> str:
        """ "same", "int8" or "int4"."""
        if self.scales is None:
            return "same"
        return next(name for name, dtype in STORED.items() if dtype == self.values.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.stride(-1) != 1:  # torch.nn.Linear takes any strides
            x = x.contiguous()
        if self.scales is None and x.dtype != self.values.dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.values.dtype)  # as autocast does for torch.nn.Linear
        bias = None if self.bias is None else self.bias.to(x.dtype)
        tensors = (self.values, self.bitmask, self.row_offsets)
        options = {"cols": self.in_features, "scales": self.scales, "group_size": self.group_size}
        return _bitmap_gemm(x, *tensors, bias, **options)

    def options(self) -> dict[str, Any]:
        if self.scales is None:
            return {"nnz": self.nnz, "values": "same"}
        dtype = str(self.scales.dtype).removeprefix("torch.")
        return {"nnz": self.nnz, "values": self.values_kind, "group_size": self.group_size, "scale_dtype": dtype}

    def check(self, where: str) -> None:
        weight = self.weight_bitmap.validate(where)
        if (last := int(weight.row_offsets[-1])) != self.nnz:  # of int4 values, an odd one
            raise ValueError(f"{where}: row_offsets: expected {self.nnz} last, got {last}")
        if weight.scales is not None and not torch.isfinite(weight.scales).all():
            raise ValueError(f"{where}: scales: expected finite scales; the data are damaged")

    def casts(self) -> tuple[str, ...]:
        return ("bias", "values") if self.scales is None else ("bias",)

    def extra_repr(self) -> str:
        features = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        density = self.nnz / max(1, self.in_features * self.out_features)
        kind = "" if self.scales is None else f", group_size={self.group_size}"
        return f"{features}, density={density:.3f}, values={self.values_kind}{kind}"

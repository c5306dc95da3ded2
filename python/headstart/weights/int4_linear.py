"""`Int4Linear`: a linear layer whose weight is an `Int4Weight`, in the place of `torch.nn.Linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.int4_gemm import Int4Weight, _int4_gemm
from .packed_linear import Option, PackedLinear, frozen

PANEL, SLAB = 16, 32  # of the packed layout (csrc/layouts/int4.h)


class Int4Linear(PackedLinear):
    """``x @ weight.T + bias`` for x [..., K] in float32, float16 or bfloat16; the result [..., N] has x's dtype.

    Everything is a parameter that takes no gradient, out dim first, so that tensor parallelism can shard it:

    - ``packed``, ``scales``, ``zeros``: as in `Int4Weight`; zeros is None if symmetric;
    - ``permutation`` int32 [K], or None without act-order: the one tensor without an out dim;
    - ``bias`` [N] or None.

    ``int8_activations`` is an attribute, False at first: see `headstart.int4_gemm`. ``headstart.patch(model,
    int8_activations=True)`` sets it in all layers of a model.

    ``to(dtype)`` casts the bias alone: the codes were chosen for the scales as they are, and the kernels take scales of
    any of the three dtypes beside activations of any.

    Args:
        in_features, out_features, group_size: K, N, and as in `Int4Weight`.
        bias: whether there is one.
        symmetric: without zeros.
        act_order: with a permutation.
        scale_dtype: of the scales; `dtype` if None.
        dtype: of the bias; torch's default if None.
    """

    WEIGHTS = "int4"
    TENSORS = ("packed", "scales", "zeros", "permutation")
    OPTIONS = {
        "group_size": Option(
            lambda x: type(x) is int and (x == -1 or (x > 0 and x % 32 == 0)), "a multiple of 32, or -1", 128
        ),
        "symmetric": Option.flag(),
        "act_order": Option.flag(),
        "scale_dtype": Option.of_floats("bfloat16"),
    }

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        *,
        bias: bool = True,
        symmetric: bool = False,
        act_order: bool = False,
        scale_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.int8_activations = False
        panels = -(-out_features // PANEL)
        groups = 1 if group_size == -1 else -(-in_features // group_size)

        def tensor(*shape: int, dtype: torch.dtype | None) -> nn.Parameter:
            return frozen(torch.zeros(shape, dtype=dtype, device=device))

        self.packed = tensor(panels, -(-in_features // SLAB), 4, PANEL, dtype=torch.int32)
        self.scales = tensor(panels, groups, PANEL, dtype=scale_dtype or dtype)
        self.zeros = None if symmetric else tensor(panels, groups, PANEL, dtype=torch.uint8)
        order = torch.arange(in_features, dtype=torch.int32, device=device)
        self.permutation = frozen(order) if act_order else None
        self.bias = tensor(out_features, dtype=dtype) if bias else None

    @classmethod
    def from_weight(cls, weight: Int4Weight, bias: torch.Tensor | None = None) -> Int4Linear:
        """A layer with these very tensors; bias [N] or None."""
        n, k = weight.shape
        layer = cls(k, n, weight.group_size, bias=False, symmetric=True, device="meta")
        layer._check_bias(bias)
        layer.packed, layer.scales = frozen(weight.packed), frozen(weight.scales)
        layer.zeros, layer.permutation, layer.bias = map(frozen, (weight.zeros, weight.permutation, bias))
        return layer

    @property
    def weight_int4(self) -> Int4Weight:
        """The weight; its tensors are the layer's own."""
        packed, scales, zeros, permutation = (
            None if t is None else t.detach() for t in (self.packed, self.scales, self.zeros, self.permutation)
        )
        return Int4Weight(packed, scales, zeros, self.group_size, (self.out_features, self.in_features), permutation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation)
        elif x.stride(-1) != 1:  # torch.nn.Linear takes any strides
            x = x.contiguous()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        n = min(self.out_features, PANEL * self.packed.shape[0])  # a shard has fewer panels
        options = {"group_size": self.group_size, "n": n, "int8_activations": self.int8_activations}
        return _int4_gemm(x, self.packed, self.scales, self.zeros, bias, **options)

    def options(self) -> dict[str, Any]:
        return {
            "group_size": self.group_size,
            "symmetric": self.zeros is None,
            "act_order": self.permutation is not None,
            "scale_dtype": str(self.scales.dtype).removeprefix("torch."),
        }

    def check(self, where: str) -> None:
        """Every other bit pattern is a weight."""
        wrong = None
        if not torch.isfinite(self.scales).all():
            wrong = "scales: expected finite scales"
        elif self.zeros is not None and (self.zeros > 15).any():
            wrong = "zeros: expected zero points 0 to 15"
        elif self.permutation is not None:
            columns = torch.arange(self.in_features, device=self.permutation.device)
            if not torch.equal(self.permutation.long().sort().values, columns):
                wrong = "permutation: expected every column once"
        if wrong is not None:
            raise ValueError(f"{where}: {wrong}; the data are damaged")

    def extra_repr(self) -> str:
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        kind = f"symmetric={self.zeros is None}, act_order={self.permutation is not None}"
        return f"{features}, bias={self.bias is not None}, group_size={self.group_size}, {kind}"


def allow_int8_activations(model: torch.nn.Module) -> None:
    """Lets all layers of a model round their activations to int8, until `forbid_int8_activations`."""
    for module in model.modules():
        if isinstance(module, Int4Linear) and not module.int8_activations:
            module.int8_activations = module._headstart_int8 = True


def forbid_int8_activations(model: torch.nn.Module) -> None:
    """Takes back what `allow_int8_activations` set; what a user set by hand stays."""
    for module in model.modules():
        if vars(module).pop("_headstart_int8", False):
            module.int8_activations = False

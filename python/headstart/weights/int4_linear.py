"""`Int4Linear` and `Int4Embedding`: layers whose weight is an `Int4Weight`, in the place of torch.nn's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.int4_gemm import Int4Weight, _int4_gemm
from ..reference import int4_gemm as reference
from ..reference.int4_gemm import PANEL, WORDS, slab
from .packed_linear import Option, PackedLinear, frozen


class Int4Linear(PackedLinear):
    """``x @ weight.T + bias`` for x [..., K] in float32, float16 or bfloat16; the result [..., N] has x's dtype.

    Everything is a parameter that takes no gradient, out dim first, so that tensor parallelism can shard it:

    - ``packed``, ``scales``, ``zeros``, ``minimums``: as in `Int4Weight`; zeros and minimums may be None;
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
        minimums: with minimums, and without zeros.
        bits: of a code, 4 or 8.
        scale_dtype: of the scales; `dtype` if None.
        dtype: of the bias; torch's default if None.
    """

    WEIGHTS = "int4"
    TENSORS = ("packed", "scales", "zeros", "permutation", "minimums")
    OPTIONS = {
        "group_size": Option(
            lambda x: type(x) is int and (x == -1 or (x > 0 and x % 16 == 0)),
            "a multiple of 32 (in 8 bits, of 16), or -1",
            128,
        ),
        "symmetric": Option.flag(),
        "act_order": Option.flag(),
        "minimums": Option.flag(),
        "bits": Option(lambda x: type(x) is int and x in (4, 8), "4 or 8", 4),
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
        minimums: bool = False,
        bits: int = 4,
        scale_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if group_size != -1 and group_size % slab(bits):
            raise ValueError(f"Int4Linear: group_size: expected a multiple of {slab(bits)}, or -1, got {group_size}")
        self.in_features, self.out_features, self.group_size, self.bits = in_features, out_features, group_size, bits
        self.int8_activations = False
        panels = -(-out_features // PANEL)
        groups = 1 if group_size == -1 else -(-in_features // group_size)

        def tensor(*shape: int, dtype: torch.dtype | None) -> nn.Parameter:
            return frozen(torch.zeros(shape, dtype=dtype, device=device))

        self.packed = tensor(panels, -(-in_features // slab(bits)), WORDS, PANEL, dtype=torch.int32)
        self.scales = tensor(panels, groups, PANEL, dtype=scale_dtype or dtype)
        self.zeros = None if symmetric or minimums else tensor(panels, groups, PANEL, dtype=torch.uint8)
        self.minimums = tensor(panels, groups, PANEL, dtype=scale_dtype or dtype) if minimums else None
        order = torch.arange(in_features, dtype=torch.int32, device=device)
        self.permutation = frozen(order) if act_order else None
        self.bias = tensor(out_features, dtype=dtype) if bias else None

    @classmethod
    def from_weight(cls, weight: Int4Weight, bias: torch.Tensor | None = None) -> Int4Linear:
        """A layer with these very tensors; bias [N] or None."""
        n, k = weight.shape
        layer = cls(k, n, weight.group_size, bias=False, symmetric=True, bits=weight.bits, device="meta")
        layer._check_bias(bias)
        layer.bias = frozen(bias)
        for name in cls.TENSORS:
            setattr(layer, name, frozen(getattr(weight, name)))
        return layer

    @property
    def weight_int4(self) -> Int4Weight:
        """The weight; its tensors are the layer's own."""
        tensors = {name: t.detach() for name, t in self.packed_tensors().items()}
        options = {"group_size": self.group_size, "shape": (self.out_features, self.in_features), "bits": self.bits}
        return Int4Weight(**{"zeros": None} | tensors | options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation)
        elif x.stride(-1) != 1:  # torch.nn.Linear takes any strides
            x = x.contiguous()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        n = min(self.out_features, PANEL * self.packed.shape[0])  # a shard has fewer panels
        options = {"group_size": self.group_size, "n": n, "int8_activations": self.int8_activations}
        options |= {"minimums": self.minimums, "bits": self.bits}
        return _int4_gemm(x, self.packed, self.scales, self.zeros, bias, **options)

    def options(self) -> dict[str, Any]:
        return {
            "group_size": self.group_size,
            "symmetric": self.zeros is None and self.minimums is None,
            "act_order": self.permutation is not None,
            "minimums": self.minimums is not None,
            "bits": self.bits,
            "scale_dtype": str(self.scales.dtype).removeprefix("torch."),
        }

    def check(self, where: str) -> None:
        """Every other bit pattern is a weight."""
        wrong = None
        if not torch.isfinite(self.scales).all():
            wrong = "scales: expected finite scales"
        elif self.minimums is not None and not torch.isfinite(self.minimums).all():
            wrong = "minimums: expected finite minimums"
        elif self.zeros is not None and (self.zeros > 2**self.bits - 1).any():
            wrong = f"zeros: expected zero points 0 to {2**self.bits - 1}"
        elif self.permutation is not None:
            columns = torch.arange(self.in_features, device=self.permutation.device)
            if not torch.equal(self.permutation.long().sort().values, columns):
                wrong = "permutation: expected every column once"
        if wrong is not None:
            raise ValueError(f"{where}: {wrong}; the data are damaged")

    def extra_repr(self) -> str:
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        options = self.options()
        kind = ", ".join(f"{name}={options[name]}" for name in ("symmetric", "act_order", "minimums", "bits"))
        return f"{features}, bias={self.bias is not None}, group_size={self.group_size}, {kind}"


class Int4Embedding(nn.Module):
    """The rows of an `Int4Linear`'s weight, in the place of `torch.nn.Embedding`: ``weight[ids]`` in `dtype`.

    The linear layer is the model's output layer, or the embedding's own, ``linear``, if the two are not tied. A tied
    one is no submodule of the embedding, so its tensors are in the model once.

    ``weight`` [0, K] holds no data. It is there for programs that ask it for the model's dtype.

    Args:
        linear: [V, K]; without bias and permutation.
        dtype: of the result, at first; ``to(dtype)`` changes it.
        tied: whether `linear` is a part of the model elsewhere.
    """

    def __init__(self, linear: Int4Linear, *, dtype: torch.dtype, tied: bool):
        super().__init__()
        self.num_embeddings, self.embedding_dim = linear.out_features, linear.in_features
        self.weight = frozen(torch.empty(0, self.embedding_dim, dtype=dtype, device="cpu"))
        self._tied = (linear,) if tied else None  # a tuple hides it from nn.Module
        self.linear = None if tied else linear

    @property
    def weight_int4(self) -> Int4Weight:
        return (self._tied[0] if self._tied else self.linear).weight_int4

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        w = self.weight_int4
        panel, column = ids.flatten() // PANEL, ids.flatten() % PANEL
        codes = reference.unpack_columns(w.packed[panel, :, :, column], self.embedding_dim, w.bits)
        scales, zeros, minimums = (None if x is None else x[panel, :, column] for x in (w.scales, w.zeros, w.minimums))
        rows = reference.dequantize(codes, scales, zeros, w.group_size, minimums, w.bits)
        return rows.to(self.weight.dtype).view(*ids.shape, self.embedding_dim)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """Without `weight`."""

    def _load_from_state_dict(self, *args) -> None:
        """Without `weight`."""

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, tied={self._tied is not None}"


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

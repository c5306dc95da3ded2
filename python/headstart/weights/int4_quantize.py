"""Int4 quantisation of a whole model, one linear layer at a time, by rounding to nearest: no calibration data."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops.int4_gemm import Int4Weight
from .int4_linear import Int4Linear


def choose_layers(model: nn.Module, exclude: Collection[str] = ()) -> list[str]:
    """The names of the linear layers of a model that can be int4: all plain ones whose weight is not shared.

    An output layer that is tied to the embedding shares its weight, and stays as it is.

    Args:
        exclude: names of layers, or their last parts, or patterns of these (``*.down_proj``).

    Raises:
        ValueError: for a pattern that names no linear layer, or if no layer is left.
    """
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*ties.keys(), *ties.values()}
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]

    def names(pattern: str, name: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition(".")[2], pattern)

    for pattern in exclude:
        if not any(names(pattern, name) for name in linears):
            raise ValueError(
                f"quantize: exclude: expected names of linear layers, such as {linears[:1]}, got {pattern!r}"
            )
    chosen = [name for name in linears if f"{name}.weight" not in tied and not any(names(p, name) for p in exclude)]
    if not chosen:
        raise ValueError(f"quantize: expected a linear layer to quantise, got {len(linears)} that are tied or excluded")
    return chosen


def quantize_linears(
    model: nn.Module, group_size: int = 128, symmetric: bool = False, exclude: Collection[str] = ()
) -> nn.Module:
    """Puts an `Int4Linear` in the place of every linear layer that `choose_layers` names; returns the model.

    Rounds to nearest, as `headstart quantize` does; see `Int4Weight.quantize` for the arguments.
    """
    for name in choose_layers(model, exclude):
        linear = model.get_submodule(name)
        weight = Int4Weight.quantize(linear.weight.detach(), group_size, symmetric)
        model.set_submodule(name, Int4Linear.from_weight(weight, linear.bias))
    return model


class Head(NamedTuple):
    """An output layer with a choice of bits of its own.

    Args:
        layer: its name.
        weight: the tensor that is its weight; the embedding's, if the two are tied.
        keep: whether that tensor is also written as it is, for an embedding that cannot read packed rows.
        bits: 4 or 8.
    """

    layer: str
    weight: str
    keep: bool
    bits: int


class Quantize:
    """A `Transform` (`convert.py`): the linear layers in 4 bits.

    Args:
        skeleton: the model, which may have no data.
        layers: the names of the linear layers, as the tensors' names have them.
        head: the output layer, if its bits are chosen.
        group_size, symmetric: see `Int4Weight.quantize`.
        dtype: of what is not quantised, and of the scales; None leaves it.
        advance: called with the number of weights of each layer that is done.
    """

    kind = Int4Linear

    def __init__(
        self,
        skeleton: nn.Module,
        layers: Collection[str],
        *,
        head: Head | None = None,
        group_size: int = 128,
        symmetric: bool = False,
        dtype: torch.dtype | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ):
        self.layers = list(dict.fromkeys([*layers, *([] if head is None else [head.layer])]))
        self._head, self._group_size, self._symmetric = head, group_size, symmetric
        self._dtype, self._advance = dtype, advance
        exact = (skeleton._keep_in_fp32_modules, skeleton._keep_in_fp32_modules_strict)
        self._exact = {part for parts in exact for part in parts or ()}  # parts of names that keep their dtype

    def __call__(self, layer: str | None, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        head = self._head
        for name, x in tensors.items():
            linear = name.removesuffix(".weight")
            if head is not None and name in (head.weight, f"{head.layer}.weight"):
                if name == head.weight:  # else a second copy of a tied weight, which is not written
                    result[head.layer] = Int4Linear.from_weight(self._weight(name, x, head.bits))
                    result |= {name: x.to(self._dtype or x.dtype)} if head.keep else {}
                    self._advance(x.numel())
            elif linear in self.layers and linear != name:
                result[linear] = Int4Linear.from_weight(self._weight(name, x))
                self._advance(x.numel())
            elif x.is_floating_point() and not any(part in name for part in self._exact):
                result[name] = x.to(self._dtype or x.dtype)
            else:
                result[name] = x
        return result

    def _weight(self, name: str, x: torch.Tensor, bits: int = 4) -> Int4Weight:
        try:
            return Int4Weight.quantize(x.to(self._dtype or x.dtype), self._group_size, self._symmetric, bits=bits)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

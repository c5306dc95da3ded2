"""Int4 quantisation of a whole model, one linear layer at a time, by rounding to nearest: no calibration data."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..ops.int4_gemm import Int4Weight


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


class Quantized:
    """A model's own tensors as the source of its int4 layers (`engine/quantizer.py`): quantised when asked for.

    Args:
        tensors: by name; ``[...]`` of one gives its data. A layer's weight is let go once it is quantised.
        layers: by the names of the layers in the model, their names in `tensors`.
        group_size, symmetric: see `Int4Weight.quantize`.
        dtype: of the scales; the weight's own if None.
        advance: called after every layer with the number of its weights.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        layers: Mapping[str, str],
        *,
        group_size: int = 128,
        symmetric: bool = False,
        dtype: torch.dtype | None = None,
        advance: Callable[[int], None] = lambda weights: None,
    ):
        self._layers, self._options, self._dtype, self._advance = dict(layers), (group_size, symmetric), dtype, advance
        taken = {f"{layer}.{field}" for layer in layers.values() for field in ("weight", "bias")}
        self._plain = {name: x for name, x in tensors.items() if name not in taken}
        self._taken = {name: x for name, x in tensors.items() if name in taken}

    def plain(self) -> dict[str, Any]:
        return self._plain

    def modules(self, model: nn.Module, rename: Callable[[str], str]) -> dict[str, str]:
        return self._layers

    def read(self, name: str, layer) -> tuple[Int4Weight, torch.Tensor | None]:
        w = self._taken.pop(f"{name}.weight")[...]
        try:
            weight = Int4Weight.quantize(w.to(self._dtype or w.dtype), *self._options)
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from None
        bias = self._taken[f"{name}.bias"][...].to(layer.dtype) if layer.has_bias else None
        self._advance(w.numel())
        return weight, bias

    def __deepcopy__(self, memo) -> Quantized:
        return self  # transformers copies configs, and what hangs on them

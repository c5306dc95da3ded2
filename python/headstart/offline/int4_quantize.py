"""Int4 quantisation of a whole model, one linear layer at a time, by rounding to nearest: no calibration data."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

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


def quantize_weight(
    name: str, w: torch.Tensor, *, group_size: int, symmetric: bool, dtype: torch.dtype | None
) -> Int4Weight:
    """`Int4Weight.quantize`, with scales of `dtype` (w's own if None); errors begin with the tensor's name."""
    try:
        return Int4Weight.quantize(w.to(dtype or w.dtype), group_size, symmetric)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None

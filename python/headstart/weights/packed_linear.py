"""What `Int4Linear` and `BitmapLinear` share: packed tensors as parameters, casts that leave them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

FLOATS = ("float32", "float16", "bfloat16")


class Option(NamedTuple):
    """What a config.json may say about the layers of one kind."""

    accepts: Callable[[Any], bool]
    expected: str
    default: Any = None
    own: bool = False  # every layer must give its own value; there is no default

    @classmethod
    def of_floats(cls, default: str) -> Option:
        return cls(lambda x: x in FLOATS, f"one of {', '.join(FLOATS)}", default)

    @classmethod
    def of_words(cls, *words: str) -> Option:
        """The first is the default."""
        expected = " or ".join((", ".join(map(repr, words[:-1])), repr(words[-1])))
        return cls(lambda x: x in words, expected, words[0])

    @classmethod
    def flag(cls) -> Option:
        return cls(lambda x: type(x) is bool, "true or false", False)


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed into several tensors; all are parameters that take no gradient.

    A new kind is one class with the attributes below, and its line in `config.KINDS`.
    """

    WEIGHTS: ClassVar[str]  # what a config calls this kind
    TENSORS: ClassVar[tuple[str, ...]]  # the packed tensors; all but the first may be None
    OPTIONS: ClassVar[Mapping[str, Option]]  # the constructor's arguments, as a config says them
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    @classmethod
    def like(cls, module: nn.Linear | nn.Embedding, options: Mapping[str, Any]) -> PackedLinear:
        """A layer without data with the sizes of a module's weight, from the options of a config."""
        options = dict(options)
        if "scale_dtype" in options:
            options["scale_dtype"] = getattr(torch, options["scale_dtype"])
        has_bias = getattr(module, "bias", None) is not None
        options |= {"bias": has_bias, "dtype": module.weight.dtype, "device": "meta"}
        return cls(*reversed(module.weight.shape), **options)

    def options(self) -> dict[str, Any]:
        """What a config must say, besides the sizes, to make a layer whose tensors have the same shapes."""
        raise NotImplementedError

    def check(self, where: str) -> None:
        """Reads the data, and raises a ValueError that begins with `where` and names what a damaged file has wrong."""
        raise NotImplementedError

    def casts(self) -> tuple[str, ...]:
        """The tensors that ``to(dtype)`` casts; the others were made for the dtype that they have."""
        return ("bias",)

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of `TENSORS` that this layer has."""
        found = {name: getattr(self, name) for name in self.TENSORS}
        return {name: x for name, x in found.items() if x is not None}

    def _apply(self, fn: Callable, recurse: bool = True) -> PackedLinear:
        """`nn.Module.to` and its like."""
        cast = [getattr(self, name) for name in self.casts()]

        def apply(t: torch.Tensor) -> torch.Tensor:
            out = fn(t)
            return out if any(t is x for x in cast) or out.dtype == t.dtype else t.to(out.device)

        return super()._apply(apply, recurse)

    def _check_bias(self, bias: torch.Tensor | None) -> None:
        n = self.out_features
        if bias is not None and (bias.shape != (n,) or not bias.is_floating_point()):
            got = f"{str(bias.dtype).removeprefix('torch.')} {list(bias.shape)}"
            raise ValueError(f"{type(self).__name__}: bias: expected floating point [{n}], got {got}")


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def frozen(t: torch.Tensor | None) -> nn.Parameter | None:
    return None if t is None else nn.Parameter(t.detach(), requires_grad=False)

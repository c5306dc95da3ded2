"""What `Int4Linear` and `BitmapLinear` share: packed tensors as parameters, casts that leave them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed into several tensors; all are parameters that take no gradient."""

    WEIGHTS: str  # what a config calls this kind
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def options(self) -> dict[str, Any]:
        """What a config must say, besides the sizes, to make a layer whose tensors have the same shapes."""
        raise NotImplementedError

    def check(self, where: str) -> None:
        """Reads the data, and raises a ValueError that begins with `where` and names what a damaged file has wrong."""
        raise NotImplementedError

    def casts(self) -> tuple[str, ...]:
        """The tensors that ``to(dtype)`` casts; the others were made for the dtype that they have."""
        return ("bias",)

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


def frozen(t: torch.Tensor | None) -> nn.Parameter | None:
    return None if t is None else nn.Parameter(t.detach(), requires_grad=False)

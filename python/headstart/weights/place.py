"""Where packed layers go in a model: in the place of linear layers, and of the embedding.

A weight that the output layer and the embedding share (tied) is packed once, in the output layer. The embedding then
reads its rows. An embedding that is packed by itself is named ``<embedding>.linear``, as `Int4Embedding` holds it.
"""

from __future__ import annotations

from torch import nn

from .int4_linear import Int4Embedding
from .names import submodule
from .packed_linear import PackedLinear

OWN = ".linear"  # of an `Int4Embedding`


def place_for(model: nn.Module, name: str) -> nn.Module | None:
    """The linear layer or embedding whose weight a packed layer of this name has; None if there is none."""
    found = submodule(model, name)
    if found is None and name.endswith(OWN):
        found = submodule(model, name.removesuffix(OWN))
        return found if type(found) is nn.Embedding else None
    return found if isinstance(found, nn.Linear) else None


def tied_embedding(model: nn.Module, name: str) -> str | None:
    """The embedding that shares the weight of a linear layer, if there is one."""
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if f"{name}.weight" in pair:
            other = next(x for x in pair if x != f"{name}.weight").removesuffix(".weight")
            return other if isinstance(submodule(model, other), nn.Embedding) else None
    return None


def can_read_rows(model: nn.Module, embedding: str | None) -> bool:
    """Whether an `Int4Embedding` does what this embedding does. One of another class, such as Gemma's, stays plain."""
    return embedding is not None and type(model.get_submodule(embedding)) is nn.Embedding


def parameters_at(model: nn.Module, name: str) -> list[str]:
    """The parameters that a packed layer of this name replaces."""
    module, embedding = place_for(model, name), tied_embedding(model, name)
    own = name if submodule(model, name) is module else name.removesuffix(OWN)
    replaced = [f"{own}.{field}" for field, _ in module.named_parameters()]
    return replaced + ([f"{embedding}.weight"] if can_read_rows(model, embedding) else [])


def put(model: nn.Module, name: str, layer: PackedLinear, tied: str | None) -> None:
    """Puts a packed layer where `place_for` found a place. The embedding `tied`, if any, then reads its rows."""
    own = submodule(model, name) is None
    embedding = name.removesuffix(OWN) if own else tied
    if not own:
        untie(model, f"{name}.weight")
        model.set_submodule(name, layer)
    if can_read_rows(model, embedding):
        dtype = model.get_submodule(embedding).weight.dtype
        model.set_submodule(embedding, Int4Embedding(layer, dtype=dtype, tied=not own))


def untie(model: nn.Module, weight: str) -> None:
    """Makes transformers forget that a weight, which is no parameter any more, is tied to another."""
    for field in ("all_tied_weights_keys", "_tied_weights_keys"):
        keys = getattr(model, field, None) or {}
        setattr(model, field, {key: value for key, value in keys.items() if weight not in (key, value)})

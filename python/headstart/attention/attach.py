"""Puts headstart's attention into a transformers model, and takes it out again.

Each attention module stores what its layer needs. So patched models are independent of each other, and a copy of a
patched model is patched too.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from . import anchor, forward
from .plan import PrefillPlan, fingerprint
from .view import view_of

Model = TypeVar("Model", bound=torch.nn.Module)


def attach(op: str, model: torch.nn.Module, plan: PrefillPlan) -> None:
    """Makes every attention module of a model use headstart's attention with a plan.

    `op` is the function that the errors name.

    Raises:
        ValueError: no layer can use headstart's attention, or the plan is for another model.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{op}: model: expected a transformers model, got {type(model).__name__}")
    layers = [module for module in model.modules() if _is_attention(module)]
    if not layers:
        raise ValueError(
            f"{op}: model: expected a transformers decoder whose attention goes through AttentionInterface, "
            f"got {type(model).__name__} without such a layer"
        )
    for config in {id(layer.config): layer.config for layer in layers}.values():
        plan.check(fingerprint(config))

    detach(model)
    forward.register()
    own = {id(layer.config): _own_implementation(layer.config) for layer in layers}
    if next(model.parameters()).device.type == "cpu":  # measure, and warn of a file, now and not in the first forward
        anchor.in_use(model.dtype)
    warned: set[str] = set()
    for layer in layers:
        forward.set_attachment(layer, forward.Attachment(plan, own[id(layer.config)], warned))
        _set_implementation(layer.config, forward.NAME)


def detach(model: torch.nn.Module) -> None:
    """Gives a model the attention that it had before `attach`."""
    for module in model.modules():
        here = forward.attachment(module)
        if here is not None:
            forward.set_attachment(module, None)
            if forward.attachment_for(module.config) is None:
                _set_implementation(module.config, here.own)


def is_attached(model: torch.nn.Module) -> bool:
    return any(forward.attachment(module) is not None for module in model.modules())


def unpatched_view(model: Model) -> Model:
    """A view of a model, patched or not, that runs the model's own attention."""
    view = view_of(model)
    for mine, theirs in zip(view.modules(), model.modules(), strict=True):
        if _is_attention(theirs):
            forward.set_attachment(mine, None)
            _set_implementation(mine.config, _own_implementation(theirs.config))
    return view


def _is_attention(module: torch.nn.Module) -> bool:
    """Whether a module is the attention of a decoder and calls AttentionInterface."""
    needed = ("layer_idx", "is_causal", "config")
    uses_interface = forward.modeling_attribute(module, "ALL_ATTENTION_FUNCTIONS") is not None
    return uses_interface and all(hasattr(module, name) for name in needed)


def _own_implementation(config) -> str | None:
    """The attention implementation of a config. If a model with this config is patched, the one before the patch."""
    here = forward.attachment_for(config)
    return config._attn_implementation if here is None else here.own


def _set_implementation(config, name: str | None) -> None:
    config._attn_implementation = {"": name}  # the mapping form leaves sub-configs (a vision tower's) alone

"""`headstart.patch(model)`: headstart's operators under a Hugging Face model, and out again.

Attention enters through transformers' own AttentionInterface; no model code is copied or replaced. What a layer needs
to know hangs on its attention module, so patched models do not know of each other, and a copy of a patched model is
patched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import torch

from ..offline.prefill_plan import PATTERNS, PrefillPlan, fingerprint
from . import cost
from . import linear as _linear

Model = TypeVar("Model", bound=torch.nn.Module)


def patch(model: Model, prefill: str | os.PathLike | PrefillPlan = "adaptive", linear: str = "auto") -> Model:
    """Makes a transformers model read long prompts with sparse attention, in place, and returns it.

    A prompt is read sparsely where that is predicted to be faster than the exact ways, headstart's dense kernel and the
    model's own SDPA; else the faster of these runs (engine/cost.py; `headstart tune` fits the prediction to a machine).
    Decoding is always exact. A layer whose sliding window cuts keys off attends the window, exactly, whatever the plan.
    Sequences packed in one row (position_ids that restart; cu_seq_lens, if given, must agree) are attended one by one.
    Batches with left padding, caches, chunked prefill and `generate` work as before. A layer or a call that needs what
    headstart does not do (output_attentions, soft-capping, attention sinks, custom 4-D masks, padding that is not on
    the left, gradients, torch.compile) runs the model's own attention; a RuntimeWarning says so once.

    Args:
        model: a model of transformers whose attention goes through AttentionInterface. A patched model is patched anew.
        prefill: "adaptive", "vertical_slash", "a_shape", "block_topk", "dense" (exact), a `PrefillPlan`, or the path of
            one.
        linear: how half-precision linear layers run in prefill on a CPU: "fp32" computes in float32 and rounds
            once, "auto" does so where this CPU is measured to be faster that way, "model" leaves them alone. "int8"
            is "auto", and lets `Int4Linear` round its activations to int8 (see `headstart.int4_gemm`).

    Raises:
        ValueError: for a model, a prefill or a linear that is none of these, or a plan for another model.
        FileNotFoundError: for a path that leads to no file.
        ImportError: if transformers is missing.
    """
    attention = _attention()
    plan = _plan(prefill)
    if linear not in _linear.MODES:
        raise ValueError(f"patch: linear: expected one of {', '.join(_linear.MODES)}, got {linear!r}")
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"patch: model: expected a transformers model, got {type(model).__name__}")
    layers = [module for module in model.modules() if _is_attention(module, attention)]
    if not layers:
        raise ValueError(
            "patch: model: expected a transformers decoder whose attention goes through AttentionInterface, "
            f"got {type(model).__name__} without such a layer"
        )
    for config in {id(layer.config): layer.config for layer in layers}.values():
        plan.check(fingerprint(config))

    unpatch(model)
    attention.register()
    own = {id(layer.config): _own_implementation(layer.config, attention) for layer in layers}
    cost.in_use()  # a warning about its file belongs here, not into the first forward
    said: set[str] = set()
    for layer in layers:
        layer._headstart = attention.Attachment(plan, own[id(layer.config)], said)
        attention.patched.add(layer)
        _set_implementation(layer.config, attention.NAME)
    if linear != "model":
        _linear.attach_all(model, linear)
    return model


def unpatch(model: Model) -> Model:
    """Takes headstart out of a model: it is again exactly what it was before `patch`. Returns the model."""
    attention = _attention()
    for module in model.modules():
        _linear.detach(module)
        here = attention.attachment(module)
        if here is not None:
            del module._headstart
            attention.patched.discard(module)
            if not any(other.config is module.config for other in attention.patched):
                _set_implementation(module.config, here.own)
    return model


def _attention():
    try:
        from . import attention
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "transformers":
            raise
        raise ImportError("headstart.patch needs the package transformers: pip install transformers") from error
    return attention


def _plan(prefill) -> PrefillPlan:
    if isinstance(prefill, PrefillPlan):
        return prefill
    if isinstance(prefill, str) and prefill in PATTERNS:
        return PrefillPlan.uniform(prefill)
    if isinstance(prefill, os.PathLike) or (isinstance(prefill, str) and (Path(prefill).suffix or os.sep in prefill)):
        return PrefillPlan.load(prefill)
    expected = f"one of {', '.join(PATTERNS)}, a PrefillPlan, or the path of one"
    raise ValueError(f"patch: prefill: expected {expected}, got {prefill!r}")


def _is_attention(module: torch.nn.Module, attention) -> bool:
    """Whether a module is a decoder's attention that goes through AttentionInterface."""
    needed = ("layer_idx", "is_causal", "config")
    uses_interface = attention.modeling_attribute(module, "ALL_ATTENTION_FUNCTIONS") is not None
    return uses_interface and all(hasattr(module, name) for name in needed)


def _own_implementation(config, attention) -> str | None:
    """A config's attention implementation, seen through the patch of another model that shares the config."""
    for layer in attention.patched:
        if layer.config is config:
            return attention.attachment(layer).own
    return config._attn_implementation


def _set_implementation(config, name: str | None) -> None:
    config._attn_implementation = {"": name}  # the mapping form leaves sub-configs (a vision tower's) alone

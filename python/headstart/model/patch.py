"""`headstart.patch(model)`: headstart's operators under a Hugging Face model, and out again.

Attention enters through transformers' own AttentionInterface (`attention/attach.py`). No model code is copied.
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch

from .._expect import expect
from ..attention.plan import PrefillPlan, plan_of
from ..weights import upcast
from ..weights.int4_linear import allow_int8_activations, forbid_int8_activations

Model = TypeVar("Model", bound=torch.nn.Module)


def patch(
    model: Model,
    prefill: str | os.PathLike | PrefillPlan = "adaptive",
    *,
    linear: str = "auto",
    int8_activations: bool = False,
) -> Model:
    """Makes a transformers model read long prompts with sparse attention, in place, and returns it.

    A prompt is read sparsely if this is predicted to be faster than the exact ways: headstart's dense kernel, and the
    model's own SDPA. Otherwise the faster of these two runs. `attention/cost.py` makes the prediction, and
    `headstart tune` fits it to a machine.
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
            once, "auto" does so where this CPU is measured to be faster that way, "model" leaves them alone.
        int8_activations: let `Int4Linear` round its activations to int8, which is faster and less exact (see
            `headstart.int4_gemm`).

    Raises:
        ValueError: for a model, a prefill or a linear that is none of these, or a plan for another model.
        FileNotFoundError: for a path that leads to no file.
        ImportError: if transformers is missing.
    """
    attach = _attach()
    plan = plan_of("patch", prefill)
    if linear not in upcast.MODES:
        raise ValueError(f"patch: linear: expected one of {', '.join(upcast.MODES)}, got {linear!r}")
    expect(type(int8_activations) is bool, "patch", "int8_activations", "True or False", int8_activations)
    attach.attach("patch", model, plan)
    _restore_linear_layers(model)
    if int8_activations:
        allow_int8_activations(model)
    if linear != "model":
        upcast.attach_all(model, linear)
    return model


def unpatch(model: Model) -> Model:
    """Takes headstart out of a model: it is again exactly what it was before `patch`. Returns the model."""
    _attach().detach(model)
    _restore_linear_layers(model)
    return model


def _restore_linear_layers(model: torch.nn.Module) -> None:
    upcast.detach_all(model)
    forbid_int8_activations(model)


def _attach():
    try:
        from ..attention import attach
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "transformers":
            raise
        raise ImportError("headstart.patch needs the package transformers: pip install transformers") from error
    return attach

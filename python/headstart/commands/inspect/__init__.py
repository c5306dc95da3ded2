"""`headstart inspect`: the pattern of every attention head, and what the heads attend when a model reads a text.

A plan alone gives the pattern of every head, with the density and error that a search measured. With a model, a text
is read, and the index of every layer gives the density of every head and the blocks that it attends. All that the
picture, the page and the terminal show is in one JSON-able dict, made by `data.collect`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...attention.plan import PrefillPlan, fingerprint
from .data import collect, lines

if TYPE_CHECKING:
    from ...attention.recording import Recorded

DEFAULT_TOKENS = 4096
# A grid of more layers or heads than this is a damaged plan.
MOST = 4096


def run(
    plan: str | os.PathLike | None = None,
    *,
    model: str | os.PathLike | None = None,
    text: str | os.PathLike | None = None,
    tokens: int | None = None,
    prefill: str | None = None,
    heads: Sequence[str] = (),
    output: str | os.PathLike = "inspect-report",
) -> dict[str, Any]:
    """Writes `output`/inspect.png and inspect.html, prints a summary, and returns what they show.

    Args:
        plan: a file of `PrefillPlan.save`.
        model: what `model.load.load_model` takes; reads a text to measure every head. Needed if there is no plan.
        text: a UTF-8 file; Python's own help texts if None.
        tokens: how many of the text the model reads; 4,096 if None, or as many as there are.
        prefill: without a plan, the pattern of all heads: "adaptive" if None.
        heads: "LAYER.HEAD" of heads whose blocks are drawn; by default some of each pattern, sparsest to densest.
        output: a folder, made if missing.

    Raises:
        ValueError or OSError: naming the file or the argument, what was expected and what was got.
    """
    if plan is None and model is None:
        raise ValueError("inspect: plan: expected a plan's file, a model, or both, got neither")
    if plan is not None and prefill is not None:
        raise ValueError(f"inspect: prefill: expected none beside a plan, got {prefill!r}")
    for name, value in {"text": text, "tokens": tokens, "prefill": prefill, "head": list(heads) or None}.items():
        if model is None and value is not None:
            raise ValueError(f"inspect: {name}: expected a model to read with, got {value!r} and no model")
    loaded = PrefillPlan.uniform(prefill or "adaptive") if plan is None else PrefillPlan.load(plan)

    from ..._environment import environment
    from ..console import progress
    from ..texts import read_text
    from . import report

    output = Path(output)
    if model is None:
        shape = _shape(loaded, plan)
        output.mkdir(parents=True, exist_ok=True)
        content = collect(loaded, Path(plan).name, *shape)
    else:
        words = None if text is None else read_text(text)
        with progress() as steps:
            with steps.step(f"loading {Path(model).name}") as advance:
                reader, ids, shape = _load(model, words, text, tokens, loaded, plan)
                advance()
                chosen = [_head(head, *shape) for head in heads]
                output.mkdir(parents=True, exist_ok=True)
                advance()
            with steps.step(f"reading {ids.shape[1]:,} tokens", shape[0]) as advance:
                recorded = read(reader, loaded, ids, advance)
        content = collect(
            loaded,
            None if plan is None else Path(plan).name,
            *shape,
            recorded=recorded,
            chosen=chosen,
            reading={
                "model": Path(model).name,
                "text": "Python's help texts" if text is None else Path(text).name,
                "tokens": ids.shape[1],
                "environment": list(lines(environment())),
            },
        )
    report.write(output, content)
    report.show(content, output)
    return content


# --- what is asked for ---------------------------------------------------------------------------------------------


def _shape(plan: PrefillPlan, path) -> tuple[int, int]:
    """(layers, heads) of a plan; one of each where it is for any number of them."""
    model = plan.model or {}
    listed = max((head for layer in plan.layers for head in layer), default=0) + 1
    layers = model.get("num_hidden_layers", len(plan.layers) or 1)
    heads = model.get("num_attention_heads", listed)
    for name, count, least in (("layers", layers, len(plan.layers) or 1), ("heads", heads, listed)):
        if not least <= count <= MOST:
            raise ValueError(f"{path}: {name}: expected {least} (those that the plan lists) to {MOST}, got {count}")
    return layers, heads


def _load(model, words: str | None, text, tokens, plan: PrefillPlan, path):
    """The model, int64 [1, tokens] of the text, and the model's (layers, heads); all checked against each other."""
    from ...attention.forward import FEW_QUERIES
    from ...model.load import load_model
    from ..texts import token_ids

    reader, tokenizer = load_model(model)
    config = reader.config.get_text_config()
    here = fingerprint(config)
    try:
        plan.check(here)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    ids = token_ids(tokenizer, words)[None]
    available = ids.shape[1]
    limit = min(available, getattr(config, "max_position_embeddings", None) or available)
    least = FEW_QUERIES
    if limit < least:
        source = text if limit == available else model
        raise ValueError(
            f"{source}: expected at least {least:,} tokens (fewer are never attended sparsely), got {limit:,}"
        )
    if tokens is not None and not least <= tokens <= limit:
        raise ValueError(
            f"inspect: tokens: expected {least:,} to {limit:,}, which the text and the model have, got {tokens:,}"
        )
    ids = ids[:, : min(DEFAULT_TOKENS, limit) if tokens is None else tokens]
    return reader, ids.to(reader.device), (here["num_hidden_layers"], here["num_attention_heads"])


def _head(name: str, layers: int, heads: int) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,6})\.([0-9]{1,6})", name)
    layer, head = map(int, found.groups()) if found else (layers, heads)
    if layer >= layers or head >= heads:
        raise ValueError(f"inspect: head: expected LAYER.HEAD from 0.0 to {layers - 1}.{heads - 1}, got {name!r}")
    return layer, head


@torch.inference_mode()
def read(model, plan: PrefillPlan, ids: torch.Tensor, advance=lambda: None) -> dict[int, Recorded]:
    """Reads ids [1, N] by the plan at any length, and gives what every layer attended; a layer that ran the model's own
    attention is missing. The model is not changed."""
    from ...attention.attach import unpatched_view
    from ...attention.forward import attachment, force_path
    from ...attention.recording import record
    from ...model.patch import patch

    view = patch(unpatched_view(model.base_model), plan)
    for module in view.modules():
        if attachment(module):
            module.register_forward_hook(lambda *_: advance())
    with record() as entries, force_path("sparse"):
        view(ids, use_cache=False)
    return {entry.layer: entry for entry in entries}

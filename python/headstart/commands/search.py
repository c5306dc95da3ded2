"""`headstart search`: the offline pattern search behind a progress bar, from a model and texts to a plan's file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..attention.plan import PrefillPlan
from ..attention.search import search_prefill_plan
from ..model.load import load_model
from .texts import read_text, sample_texts, token_ids

DEFAULT_TOKENS = 8192
DEFAULT_DENSITY = 0.2


def search(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    texts: Sequence[str | os.PathLike] = (),
    max_error: float | None = None,
    density: float | None = None,
    tokens: int | None = None,
    windows: int = 1,
    seed: int = 0,
) -> PrefillPlan:
    """Searches for the best pattern of every attention head, and writes the plan to the file `out`.

    What was measured goes to ``<out>.measurements.json``: a search that was interrupted goes on from there, and another
    budget for the same search takes seconds.

    Args:
        model: what `model.load.load_model` takes.
        texts: UTF-8 files; Python's own sample texts if none.
        max_error, density: the budget, see `search_prefill_plan`; a density of 0.2 if neither is given.
        tokens: of a window; 8,192 if None, or as many as the model and every text have.
    """
    words = {Path(text).name: read_text(text) for text in texts}
    if len(words) < len(texts):
        raise ValueError(f"search: text: expected files of different names, got {', '.join(map(str, texts))}")
    if max_error is None and density is None:
        density = DEFAULT_DENSITY
    out = Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"search: output: expected a folder that exists, got {out.parent}")
    reader, tokenizer = load_model(model)
    if texts:
        ids = {name: token_ids(tokenizer, text) for name, text in words.items()}
    else:
        ids = {name: token_ids(tokenizer, sample=name) for name in sample_texts()}
    config = reader.config.get_text_config()
    limit = min([len(x) for x in ids.values()] + [getattr(config, "max_position_embeddings", None) or DEFAULT_TOKENS])
    tokens = min(DEFAULT_TOKENS, limit) if tokens is None else tokens
    if tokens > limit:
        raise ValueError(
            f"search: tokens: expected at most {limit:,}, which the model and every text have, got {tokens:,}"
        )
    kept = out.with_name(out.name + ".measurements.json")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        steps = windows * len(ids) * config.num_hidden_layers
        task = progress.add_task(f"searching {Path(model).name}, {steps} layers", total=steps)
        plan = search_prefill_plan(
            reader,
            ids,
            max_error=max_error,
            density=density,
            tokens=tokens,
            windows=windows,
            seed=seed,
            measurements=kept,
            advance=lambda: progress.advance(task),
        )
    plan.save(out)
    found = plan.provenance
    names = Counter(pattern.name for layer in plan.layers for pattern in layer.values())
    Console().print(
        f"{out}: error {found['error']:.4f}, density {found['density']:.3f}; "
        f"heads: {', '.join(f'{count} {name}' for name, count in names.most_common())}. "
        f"Measurements are kept in {kept.name}: another budget takes seconds.",
        highlight=False,
    )
    return plan

"""`headstart context build`: a text, read once by a model, to a folder that answers questions about it start from."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..context.context import Context
from ..model.load import load_model
from .texts import read_text, token_ids


def build(
    model: str,
    text: str | os.PathLike,
    output: str | os.PathLike,
    *,
    tokens: int | None = None,
    clusters: float = 0.05,
    parents: float | None = None,
    prefill: str = "adaptive",
    seed: int = 0,
) -> Context:
    """Builds the context of a UTF-8 file and writes it to `output`.

    Args:
        model: what `model.load.load_model` takes.
        tokens: of the text's beginning; all, or as many as leave the model room for 512 more, if None.
        clusters, parents, prefill, seed: see `Context.build`.
    """
    words, output, start = read_text(Path(text)), Path(output), time.perf_counter()
    if not output.parent.is_dir():
        raise FileNotFoundError(f"context: output: expected a folder in one that exists, got {output}")
    reader, tokenizer = load_model(model)
    ids = token_ids(tokenizer, words)[None]
    longest = getattr(reader.config.get_text_config(), "max_position_embeddings", None) or ids.shape[1] + 512
    limit = min(ids.shape[1], longest)
    tokens = min(limit, max(longest - 512, 1)) if tokens is None else tokens
    if not 1 <= tokens <= limit:
        raise ValueError(f"context: tokens: expected 1 to {limit:,}, which the text and the model have, got {tokens:,}")
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as progress:
        steps = 2 * reader.config.get_text_config().num_hidden_layers
        task = progress.add_task(f"reading {tokens:,} tokens", total=steps)
        context = Context.build(
            reader,
            ids[:, :tokens],
            clusters,
            parents,
            prefill=prefill,
            seed=seed,
            advance=lambda: progress.advance(task),
        )
    context.save(output)
    Console().print(
        f"{output}: {tokens:,} tokens, {context.bytes / 2**20:,.0f} MiB of keys and values, "
        f"{time.perf_counter() - start:.1f} s. Questions start from headstart.Context.load({str(output)!r}).cache().",
        highlight=False,
        soft_wrap=True,
    )
    return context

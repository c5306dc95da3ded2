"""`headstart prune`: a model with zeros in its linear layers, as bitmaps, to a folder that `from_pretrained` opens."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .._expect import expect
from ..model.load import load_model
from ..weights import upcast
from ..weights.convert import Original, check_output, convert
from ..weights.files import FILE
from ..weights.prune import METHODS, Change, Prune, check_sparsity
from .texts import read_text, sample_texts, token_ids

OP = "prune"
TOKENS, WINDOWS = 2048, 8
VALUES = ("same", "int8", "int4")


class Pruned(NamedTuple):
    """What `prune` made, and what it costs."""

    folder: Path
    losses: dict[str, Change]  # of every text
    density: float  # the share of the pruned layers' weights that are stored
    bytes: int  # of the file


def prune(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    sparsity: float = 0.5,
    method: str = "wanda",
    texts: Sequence[str | os.PathLike] = (),
    values: str = "same",
    group_size: int = 128,
    tokens: int | None = None,
    windows: int = WINDOWS,
) -> Pruned:
    """Prunes a model, writes it with its tokenizer to the folder `out`, and prints the loss before and after.

    One decoder layer at a time is in memory, besides the hidden states of all texts; weights of a directory are mapped
    from its files, a GGUF file is read whole. Embedding, norms and output layer stay as they are. A layer whose bitmap
    would take more bytes than its weight stays a plain, pruned one. In the file that it writes, each decoder layer is
    one aligned piece (`weights/convert.py`).

    Args:
        model: a directory, a ``.gguf`` file, or "smollm2".
        out: a folder that does not exist, or one that a command of headstart wrote before.
        sparsity: the share of zeros in every row.
        method: "magnitude" or "wanda", see `weights.prune`.
        texts: UTF-8 files; Python's own sample texts if none. The first `tokens` of each are held out to measure the
            loss on, and Wanda reads the rest.
        values, group_size: see `BitmapWeight.compress`.
        tokens: how many Wanda and the measurement read at once; 2,048 if None, or what the model and every text have.
        windows: of `tokens` tokens that Wanda reads, spread over all texts.

    Raises:
        ValueError or FileNotFoundError: naming the argument; nothing is written then.
    """
    out, start = Path(out), time.perf_counter()
    _check(sparsity, method, values, group_size, windows)
    check_output(OP, out)
    words = {Path(text).name: read_text(text) for text in texts}
    expect(len(words) == len(texts), OP, "text", "files of different names", ", ".join(map(str, texts)))
    reader, tokenizer = load_model(model, packed=False)
    expect(not getattr(reader, "is_quantized", False), OP, "model", "one that is not quantised", model)
    ids = {name: token_ids(tokenizer, text) for name, text in words.items()}
    ids = ids or {name: token_ids(tokenizer, sample=name) for name in sample_texts()}
    limit = getattr(reader.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    held_out, samples = choose_texts(ids, method, tokens, windows, limit)
    original = Original.of_model(reader, tokenizer)
    options = {"values": values, "group_size": group_size, "samples": samples, "held_out": held_out}
    transform = Prune(reader, sparsity=sparsity, method=method, **options)
    got = f"a {type(reader).__name__} without"
    expect(bool(transform.layers), OP, "model", "linear layers in its decoder layers", got)
    for module in reader.modules():
        upcast.attach(module, "auto")  # float32 products where this CPU is faster so
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(f"pruning {len(transform.layers)} linear layers", total=transform.steps)
        transform.advance = lambda: bar.advance(task)
        convert(original, transform, out)
    pruned = Pruned(out, transform.losses, transform.density, (out / FILE).stat().st_size)
    _report(pruned, original, transform, len(next(iter(held_out.values()))), time.perf_counter() - start)
    return pruned


def _check(sparsity: float, method: str, values: str, group_size: int, windows: int) -> None:
    check_sparsity(OP, sparsity)
    expect(method in METHODS, OP, "method", "'magnitude' or 'wanda'", repr(method))
    expect(values in VALUES, OP, "values", "'same', 'int8' or 'int4'", repr(values))
    expect(group_size == -1 or group_size > 0, OP, "group_size", "a positive number, or -1 (a row)", group_size)
    expect(windows > 0, OP, "windows", "at least 1", windows)


def _report(pruned: Pruned, original: Original, transform: Prune, length: int, seconds: float) -> None:
    changes = "; ".join(
        f"loss on {name} {before:.4f} -> {after:.4f} ({after - before:+.4f})"
        for name, (before, after) in pruned.losses.items()
    )
    plain, dtype, parameters = len(transform.plain), original.dtype, original.skeleton.num_parameters()
    grew = f", {plain} of them plain, as their bitmap would be larger" if plain else ""
    Console().print(
        f"{pruned.folder}: {parameters * dtype.itemsize / 2**20:,.0f} MiB in {str(dtype).removeprefix('torch.')} -> "
        f"{pruned.bytes / 2**20:,.0f} MiB; {len(transform.layers)} layers, with {transform.count / parameters:.0%} of "
        f"the weights, have {pruned.density:.3f} of them left, by {transform.method} in every row{grew}; {changes}, "
        f"the last {length // 2:,} of {length:,} held-out tokens each; {seconds:.1f} s.",
        highlight=False,
        soft_wrap=True,
    )


def choose_texts(
    ids: dict[str, torch.Tensor], method: str, tokens: int | None, windows: int, limit: int
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The held-out beginning of every text, and windows of the rest, evenly spread, for Wanda."""
    parts = 2 if method == "wanda" else 1  # what a text must have: one to hold out, one to read
    shortest = min(ids, key=lambda name: len(ids[name]))
    tokens = min(TOKENS, limit, len(ids[shortest]) // parts) if tokens is None else tokens
    expect(2 <= tokens <= limit, OP, "tokens", f"2 to {limit:,}, which the model reads", tokens)
    least = parts * tokens
    length = len(ids[shortest])
    expect(length >= least, OP, "text", f"at least {least:,} tokens in {shortest}", f"{length:,}")
    held_out = {name: x[:tokens] for name, x in ids.items()}
    samples = []
    for i, x in enumerate(ids.values() if method == "wanda" else ()):
        share = len(range(i, windows, len(ids)))  # the first texts have one more
        room = len(x) - 2 * tokens
        samples += [x[tokens + room * (2 * j + 1) // (2 * share) :][:tokens] for j in range(share)]
    return held_out, samples

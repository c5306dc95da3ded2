"""`headstart prune`: a model with zeros in its linear layers, as bitmaps, to a folder that `from_pretrained` opens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ._checkpoint_files import FILE
from .engine import linear
from .engine.bitmap_linear import BitmapLinear
from .engine.load import load_model
from .offline.prune import METHODS, Change, check_sparsity, prune_layers
from .ops.bitmap import BitmapWeight
from .quantize import check_output
from .texts import read_text, sample_texts, token_ids

TOKENS, WINDOWS = 2048, 8
VALUES = ("same", "int8", "int4")


class Pruned(NamedTuple):
    """What `run` made, and what it costs."""

    folder: Path
    losses: dict[str, Change]  # of every text
    density: float  # the share of the pruned layers' weights that are stored
    bytes: int  # of the file


def run(
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    sparsity: float = 0.5,
    method: str = "wanda",
    texts: Sequence[str | os.PathLike] = (),
    values: str = "same",
    group_size: int = 128,
    tokens: int | None = None,
    windows: int = WINDOWS,
) -> Pruned:
    """Prunes a model, writes it with its tokenizer to the folder `output`, and prints the loss before and after.

    One decoder layer at a time is in memory, besides the hidden states of all texts; weights of a directory are mapped
    from its files, a GGUF file is read whole. Embedding, norms and output layer stay as they are. A layer whose bitmap
    would take more bytes than its weight stays a plain, pruned one. The result has the layout of `engine.artifact`.

    Args:
        model: a directory, a ``.gguf`` file, or "smollm2".
        output: a folder that does not exist, or one that a command of headstart wrote before.
        sparsity: the share of zeros in every row.
        method: "magnitude" or "wanda", see `offline.prune`.
        texts: UTF-8 files; Python's own sample texts if none. The first `tokens` of each are held out to measure the
            loss on, and Wanda reads the rest.
        values, group_size: see `BitmapWeight.compress`.
        tokens: how many Wanda and the measurement read at once; 2,048 if None, or what the model and every text have.
        windows: of `tokens` tokens that Wanda reads, spread over all texts.

    Raises:
        ValueError or FileNotFoundError: naming the argument; nothing is written then.
    """
    from .engine import artifact
    from .engine.quantizer import TENSORS, HeadstartConfig

    output, start = Path(output), time.perf_counter()
    check_sparsity("prune", sparsity)
    _expect(method in METHODS, "method", "'magnitude' or 'wanda'", repr(method))
    _expect(values in VALUES, "values", "'same', 'int8' or 'int4'", repr(values))
    _expect(group_size == -1 or group_size > 0, "group_size", "a positive number, or -1 (a row)", group_size)
    _expect(windows > 0, "windows", "at least 1", windows)
    check_output("prune", output)
    words = {Path(text).name: read_text(text) for text in texts}
    _expect(len(words) == len(texts), "text", "files of different names", ", ".join(map(str, texts)))
    reader, tokenizer = load_model(model)
    _expect(not getattr(reader, "is_quantized", False), "model", "one that is not quantised", model)
    ids = {name: token_ids(tokenizer, text) for name, text in words.items()}
    ids = ids or {name: token_ids(tokenizer, sample=name) for name in sample_texts()}
    held_out, samples = choose_texts(ids, method, tokens, windows, _positions(reader))

    layers = artifact.decoder_layers(reader)
    tied = reader.all_tied_weights_keys
    names = [name for name in reader.state_dict() if name not in tied]
    groups = artifact.group_by_layer(reader, names)
    inside = tuple(f"{layer}." for layer in layers)
    linears = {name for name, m in reader.named_modules() if type(m) is nn.Linear and name.startswith(inside)}
    _expect(bool(linears), "model", "linear layers in its decoder layers", f"a {type(reader).__name__} without")
    possible = [*names, *(f"{name}.{field}" for name in linears for field in TENSORS["bitmap"])]
    parameters, dtype = reader.num_parameters(), reader.dtype
    count = sum(reader.get_submodule(name).weight.numel() for name in linears)
    config, losses, plain = artifact.skeleton_of(reader), {}, []
    options: dict[str, dict] = {}  # of every bitmap
    packed: dict[str, torch.Tensor] = {}  # the tensors of the present layer's bitmaps

    def pack(name: str, w: torch.Tensor) -> torch.Tensor:
        try:
            weight = BitmapWeight.compress(w, values, group_size)
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from None
        if weight.nbytes >= w.nbytes:
            plain.append(name)
            return w
        layer = BitmapLinear.from_weight(weight)
        packed.update({f"{name}.{field}": tensor for field, tensor in layer.state_dict().items()})
        options[name] = layer.options()
        return weight.decompress()

    def written(bar: Progress) -> Iterator[dict[str, torch.Tensor]]:
        yield {name: reader.get_parameter_or_buffer(name) for name in groups[0]}
        task = bar.add_task(
            f"pruning {len(layers)} layers",
            total=len(layers) * (2 * len(held_out) + 2 * len(samples)),
        )
        pruning = prune_layers(
            reader,
            layers,
            sparsity=sparsity,
            method=method,
            samples=samples,
            held_out=held_out,
            pack=pack,
            losses=losses,
            advance=lambda: bar.advance(task),
        )
        for group, _ in zip(groups[1:], pruning, strict=True):
            rest = (name for name in group if name.removesuffix(".weight") not in options)
            yield {name: reader.get_parameter_or_buffer(name) for name in rest} | packed
            packed.clear()

    for module in reader.modules():
        linear.attach(module, "auto")  # float32 products where this CPU is faster so
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as bar:
        artifact.write(
            output,
            config,
            possible,
            written(bar),
            lambda: HeadstartConfig.describing("bitmap", options),
            dtype=dtype,
            generation=reader.generation_config,
            tokenizer=tokenizer,
        )
    stored = sum(entry["nnz"] for entry in options.values()) + sum(
        config.get_submodule(name).weight.numel() for name in plain
    )
    result = Pruned(output, losses, stored / count, (output / FILE).stat().st_size)
    changes = "; ".join(
        f"loss on {name} {before:.4f} -> {after:.4f} ({after - before:+.4f})"
        for name, (before, after) in losses.items()
    )
    as_they_are = "" if not plain else f", {len(plain)} of them plain, as their bitmap would be larger"
    Console().print(
        f"{output}: {parameters * dtype.itemsize / 2**20:,.0f} MiB in {str(dtype).removeprefix('torch.')} -> "
        f"{result.bytes / 2**20:,.0f} MiB; {len(linears)} layers, with {count / parameters:.0%} of the weights, have "
        f"{result.density:.3f} of them left, by {method} in every row{as_they_are}; {changes}, the last "
        f"{len(next(iter(held_out.values()))) // 2:,} of {len(next(iter(held_out.values()))):,} held-out tokens each; "
        f"{time.perf_counter() - start:.1f} s.",
        highlight=False,
        soft_wrap=True,
    )
    return result


def choose_texts(
    ids: dict[str, torch.Tensor], method: str, tokens: int | None, windows: int, limit: int
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The held-out beginning of every text, and windows of the rest, evenly spread, for Wanda."""
    parts = 2 if method == "wanda" else 1  # what a text must have: one to hold out, one to read
    shortest = min(ids, key=lambda name: len(ids[name]))
    tokens = min(TOKENS, limit, len(ids[shortest]) // parts) if tokens is None else tokens
    _expect(2 <= tokens <= limit, "tokens", f"2 to {limit:,}, which the model reads", tokens)
    least = parts * tokens
    _expect(len(ids[shortest]) >= least, "text", f"at least {least:,} tokens in {shortest}", f"{len(ids[shortest]):,}")
    held_out = {name: x[:tokens] for name, x in ids.items()}
    samples = []
    for i, x in enumerate(ids.values() if method == "wanda" else ()):
        share = len(range(i, windows, len(ids)))  # the first texts have one more
        room = len(x) - 2 * tokens
        samples += [x[tokens + room * (2 * j + 1) // (2 * share) :][:tokens] for j in range(share)]
    return held_out, samples


def _positions(model: nn.Module) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS


def _expect(good: bool, argument: str, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"prune: {argument}: expected {expected}, got {got}")

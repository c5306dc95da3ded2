"""`headstart quantize`: a model's linear layers in 4 bits, to a folder that `from_pretrained` opens."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from .._expect import expect, expect_value
from ..model.load import find_checkpoint, load_model
from ..weights.convert import Original, check_output, convert
from ..weights.files import FILE
from ..weights.int4_quantize import Head, Quantize, choose_layers

OP = "quantize"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def quantize(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    group_size: int = 128,
    symmetric: bool = False,
    dtype: torch.dtype | str | None = None,
    exclude: Collection[str] = (),
    output_bits: int | None = None,
) -> Path:
    """Quantises a model and writes it, with its tokenizer, to the folder `out`.

    One decoder layer at a time is in memory; a GGUF file is read whole. In the file that it writes, each decoder layer
    is one aligned piece (`weights/convert.py`).

    Args:
        model: a directory, a ``.gguf`` file, or "smollm2".
        out: a folder that does not exist, or one that a command of headstart wrote before.
        group_size, symmetric: see `Int4Weight.quantize`.
        dtype: of what is not quantised, and of the scales; the model's if None.
        exclude: layers that stay as they are, see `choose_layers`.
        output_bits: 4 or 8 for the output layer, also if it is tied to the embedding, which then reads packed rows. If
            None, a tied one stays as it is, and another one gets 4 bits.

    Raises:
        ValueError or FileNotFoundError: naming the argument; nothing is written then.
    """
    out, start = Path(out), time.perf_counter()
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        expect_value(name in DTYPES, OP, "dtype", f"one of {', '.join(DTYPES)}", dtype)
        dtype = DTYPES[name]
    good = group_size == -1 or (group_size > 0 and group_size % 32 == 0)
    expect(good, OP, "group_size", "a multiple of 32, or -1 (a row)", group_size)
    expect(output_bits in (None, 4, 8), OP, "output_bits", "4, 8 or None", output_bits)
    check_output(OP, out)
    original = _original(model, dtype)
    layers, head = _layers(original, exclude), None
    if output_bits is not None:
        head, its_layer = _head(original, output_bits)
        layers |= its_layer
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(f"quantising {len(layers)} layers", total=sum(layers.values()))
        options = {"group_size": group_size, "symmetric": symmetric, "dtype": dtype, "head": head}
        advance = lambda count: progress.advance(task, count)  # noqa: E731
        convert(original, Quantize(original.skeleton, layers, advance=advance, **options), out, dtype=dtype)
    _report(out, original, layers, head, dtype or original.dtype, time.perf_counter() - start)
    return out


def _original(model: str | os.PathLike, dtype: torch.dtype | None) -> Original:
    folder, gguf = find_checkpoint(model, OP)
    if gguf is None:
        return Original.of_folder(OP, folder)
    reader, tokenizer = load_model(model, dtype=dtype, packed=False)
    return Original.of_model(reader, tokenizer)


def _layers(original: Original, exclude: Collection[str]) -> dict[str, int]:
    """The layers to quantise by their names in the checkpoint, and how many weights each has."""
    from ..weights.names import renamer

    rename = renamer(original.skeleton)
    stored = {rename(name): name for name in original.names}
    chosen = choose_layers(original.skeleton, exclude)
    names = {name: stored[f"{name}.weight"].removesuffix(".weight") for name in chosen}
    return {names[name]: original.skeleton.get_submodule(name).weight.numel() for name in chosen}


def _head(original: Original, bits: int) -> tuple[Head, dict[str, int]]:
    """The output layer, and as `_layers` gives it."""
    from ..weights.names import renamer
    from ..weights.place import can_read_rows, tied_embedding

    skeleton, rename = original.skeleton, renamer(original.skeleton)
    module = skeleton.get_output_embeddings()
    expect(type(module) is nn.Linear, OP, "output_bits", "None for a model without a plain output layer", bits)
    name = next(name for name, other in skeleton.named_modules() if other is module)
    embedding = tied_embedding(skeleton, name)
    stored = {rename(key): key for key in original.names}
    weight = stored[f"{name}.weight" if embedding is None else f"{embedding}.weight"]
    layer = stored.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
    keep = embedding is not None and not can_read_rows(skeleton, embedding)
    return Head(layer, weight, keep, bits), {layer: module.weight.numel()}


def _report(
    out: Path, original: Original, layers: dict[str, int], head: Head | None, dtype: torch.dtype, seconds: float
) -> None:
    skeleton, count = original.skeleton, sum(layers.values())
    parameters, size = skeleton.num_parameters(), (out / FILE).stat().st_size
    tied = bool(skeleton.all_tied_weights_keys) and head is None
    kind = "int4" if head is None or head.bits == 4 else "int4, the output layer int8"
    Console().print(
        f"{out}: {parameters * dtype.itemsize / 2**20:,.0f} MiB in {str(dtype).removeprefix('torch.')} -> "
        f"{size / 2**20:,.0f} MiB; {len(layers)} layers, with {count / parameters:.0%} of the weights, are {kind}; "
        f"{seconds:.1f} s." + (" The output layer is tied to the embedding, and stays as it is." if tied else ""),
        highlight=False,
        soft_wrap=True,
    )

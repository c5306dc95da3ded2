"""`headstart quantize`: a model's linear layers in 4 bits, to a folder that `from_pretrained` opens."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ._checkpoint_files import FILE, CheckpointFiles
from .engine.int4_linear import Int4Linear
from .engine.load import find, load_model
from .offline.int4_quantize import choose_layers, quantize_weight

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def run(
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    group_size: int = 128,
    symmetric: bool = False,
    dtype: torch.dtype | str | None = None,
    exclude: Collection[str] = (),
) -> Path:
    """Quantises a model and writes it, with its tokenizer, to the folder `output`.

    One decoder layer at a time is in memory; a GGUF file is read whole. The result has the layout of
    `engine.artifact`: each decoder layer is one aligned piece of the file.

    Args:
        model: a directory, a ``.gguf`` file, or "smollm2".
        output: a folder that does not exist, or one that this wrote before.
        group_size, symmetric: see `Int4Weight.quantize`.
        dtype: of what is not quantised, and of the scales; the model's if None.
        exclude: layers that stay as they are, see `choose_layers`.

    Raises:
        ValueError or FileNotFoundError: naming the argument; nothing is written then.
    """
    import transformers

    from .engine import artifact
    from .engine.quantizer import TENSORS, HeadstartConfig, renamer

    output, start = Path(output), time.perf_counter()
    if dtype is not None:
        if str(dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"quantize: dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[str(dtype).removeprefix("torch.")]
    if group_size != -1 and (group_size < 1 or group_size % 32):
        raise ValueError(f"quantize: group_size: expected a multiple of 32, or -1 (a row), got {group_size}")
    check_output("quantize", output)
    folder, names = find(model, "quantize")
    if names:
        read, tokenizer = load_model(model, dtype=dtype)
        config, generation, tied = read.config, read.generation_config, read.all_tied_weights_keys
        tensors = {name: x for name, x in read.state_dict().items() if name not in tied}
        del read
    else:
        config, generation = transformers.AutoConfig.from_pretrained(folder), artifact.generation_config(folder)
        if getattr(config, "quantization_config", None):
            raise ValueError(f"quantize: model: expected one that is not quantised, got {folder}")
        files = CheckpointFiles(folder)
        tensors, tokenizer = {name: files.slice(name) for name in files.names()}, artifact.tokenizer_of(folder)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    rename, kept = renamer(skeleton), artifact.known_names(folder, skeleton, tensors)
    stored = {rename(name): name for name in kept}
    layers = {stored[f"{name}.weight"].removesuffix(".weight") for name in choose_layers(skeleton, exclude)}
    exact = {*(skeleton._keep_in_fp32_modules or ()), *(skeleton._keep_in_fp32_modules_strict or ())}
    found: dict[str, dict] = {}  # options by layer
    count = sum(skeleton.get_parameter(rename(f"{layer}.weight")).numel() for layer in layers)

    def quantized(names: list[str]) -> dict[str, torch.Tensor]:
        group = {}
        for name in names:
            x, layer = tensors.pop(name)[...], name.removesuffix(".weight")
            if name.endswith(".weight") and layer in layers:
                weight = quantize_weight(name, x, group_size=group_size, symmetric=symmetric, dtype=dtype)
                linear = Int4Linear.from_weight(weight)
                group |= {f"{layer}.{field}": tensor for field, tensor in linear.state_dict().items()}
                found[layer] = linear.options()
                progress.advance(task, x.numel())
            elif dtype is not None and x.is_floating_point() and not any(part in name for part in exact):
                group[name] = x.to(dtype)
            else:
                group[name] = x
        return group

    possible = [*kept, *(f"{layer}.{field}" for layer in layers for field in TENSORS["int4"])]
    shown = dtype or getattr(config, "dtype", None) or next(x[...].dtype for x in tensors.values())
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(f"quantising {len(layers)} layers", total=count)
        artifact.write(
            output,
            skeleton,
            possible,
            map(quantized, artifact.group_by_layer(skeleton, kept)),
            lambda: HeadstartConfig.describing("int4", found),
            dtype=shown,
            generation=generation,
            tokenizer=tokenizer,
        )
    parameters = skeleton.num_parameters()
    size = (output / FILE).stat().st_size
    Console().print(
        f"{output}: {parameters * shown.itemsize / 2**20:,.0f} MiB in {str(shown).removeprefix('torch.')} -> "
        f"{size / 2**20:,.0f} MiB; {len(layers)} layers, with {count / parameters:.0%} of the weights, are int4; "
        f"{time.perf_counter() - start:.1f} s."
        + (
            " The output layer is tied to the embedding, and stays as it is."
            if skeleton.config.get_text_config().tie_word_embeddings
            else ""
        ),
        highlight=False,
        soft_wrap=True,
    )
    return output


def check_output(op: str, output: Path) -> None:
    """Only what a command of ours wrote before is replaced."""
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{op}: output: expected a folder in one that exists, got {output}")
    if output.is_dir() and any(output.iterdir()):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads((output / "config.json").read_text(encoding="utf-8"))
            if content["quantization_config"]["quant_method"] == "headstart":
                return
    elif not output.exists() or output.is_dir():
        return
    raise ValueError(f"{op}: output: expected a new folder, an empty one or one of its own, got {output}")

"""`headstart quantize`: a model's linear layers in 4 bits, to a folder that `from_pretrained` opens."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Collection
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ._checkpoint_files import CheckpointFiles
from ._files import write_whole_folder
from .engine.load import find, load_from, load_model
from .offline.int4_quantize import Quantized, choose_layers

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

    Of a directory of safetensors one layer at a time is in memory besides the result; a GGUF file is read whole.

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

    from .engine.quantizer import renamer

    output, start = Path(output), time.perf_counter()
    if dtype is not None:
        if str(dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"quantize: dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[str(dtype).removeprefix("torch.")]
    if group_size != -1 and (group_size < 1 or group_size % 32):
        raise ValueError(f"quantize: group_size: expected a multiple of 32, or -1 (a row), got {group_size}")
    _check_output(output)
    folder, names = find(model, "quantize")
    if names:
        read, tokenizer = load_model(model, dtype=dtype)
        config, tensors, generation = read.config, dict(read.state_dict()), read.generation_config
        del read
    else:
        config, generation = transformers.AutoConfig.from_pretrained(folder), None
        if getattr(config, "quantization_config", None):
            raise ValueError(f"quantize: model: expected one that is not quantised, got {folder}")
        files = CheckpointFiles(folder)
        tensors, tokenizer = {name: files.slice(name) for name in files.names()}, _tokenizer(folder)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    rename = renamer(skeleton)
    stored = {rename(name): name for name in tensors}
    layers = {}
    for name in choose_layers(skeleton, exclude):
        if f"{name}.weight" not in stored:
            raise ValueError(f"{folder}: {name}.weight: expected a tensor; no file has it")
        layers[name] = stored[f"{name}.weight"].removesuffix(".weight")
    count = sum(skeleton.get_submodule(name).weight.numel() for name in layers)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(f"quantising {len(layers)} layers", total=count)
        options = {"group_size": group_size, "symmetric": symmetric, "dtype": dtype}
        source = Quantized(tensors, layers, **options, advance=lambda weights: progress.advance(task, weights))
        del tensors
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' own progress bars
            quantized = load_from(source, config, dtype, None if names else folder)
    if generation is not None:
        quantized.generation_config = generation

    def write(partial: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            quantized.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)

    write_whole_folder(output, write)
    parameters, dtype = skeleton.num_parameters(), quantized.dtype
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    Console().print(
        f"{output}: {parameters * dtype.itemsize / 2**20:,.0f} MiB in {str(dtype).removeprefix('torch.')} -> "
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


def _check_output(output: Path) -> None:
    """Only what this wrote before is replaced."""
    if not output.parent.is_dir():
        raise FileNotFoundError(f"quantize: output: expected a folder in one that exists, got {output}")
    if output.is_dir() and any(output.iterdir()):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads((output / "config.json").read_text(encoding="utf-8"))
            if content["quantization_config"]["quant_method"] == "headstart":
                return
    elif not output.exists() or output.is_dir():
        return
    raise ValueError(f"quantize: output: expected a new folder, an empty one or one of its own, got {output}")


def _tokenizer(folder: Path):
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError):  # a folder may hold the weights alone
        return None

"""headstart's own folders: config.json, and a model.safetensors in which each decoder layer is one aligned read.

Quantised, pruned or plain, all are written by `write`, a group of tensors at a time (`LayeredFile` has the layout), and
opened by ``AutoModelForCausalLM.from_pretrained`` or `headstart.load`, which know of the padding by the config's
``quantization_config`` (`quantizer.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from .._checkpoint_files import FILE, CheckpointFiles, LayeredFile
from .._files import write_whole_folder
from .quantizer import HeadstartConfig, renamer


def decoder_layers(model: nn.Module) -> list[str]:
    """The names of a model's decoder layers, from the first to the last: of the outermost list with most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise ValueError(f"expected a model with a list of decoder layers, got a {type(model).__name__}")
    layers = max(outer, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return [f"{layers}.{i}" for i in range(len(lists[layers]))]


def group_by_layer(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """The names of a checkpoint's tensors in the order of `LayeredFile`: what is in no layer, then every layer's."""
    layers = {layer: i + 1 for i, layer in enumerate(decoder_layers(model))}
    depth, rename = next(iter(layers)).count(".") + 1, renamer(model)
    groups: list[list[str]] = [[] for _ in range(len(layers) + 1)]
    for name in sorted(names):
        groups[layers.get(".".join(rename(name).split(".")[:depth]), 0)].append(name)
    return groups


def known_names(where: str | os.PathLike, model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names in a checkpoint that a model takes, in their order, without those that transformers would ignore.

    Raises ValueError for one that the model has no place for, or that is missing.
    """
    rename, known, tied = renamer(model), set(model.state_dict()), getattr(model, "all_tied_weights_keys", None) or {}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    found = {name: rename(name) for name in names}
    for name, place in found.items():
        if place not in known and not any(re.search(pattern, place) for pattern in ignored):
            raise ValueError(f"{where}: {name}: expected no such tensor: the model has no place for it")
    missing = known - set(found.values())
    missing -= {name for target, source in tied.items() for name in (target, source) if {target, source} - missing}
    missing = [x for x in missing if not any(re.search(p, x) for p in model._keys_to_ignore_on_load_missing or ())]
    if missing:
        raise ValueError(f"{where}: {min(missing)}: expected a tensor, which no file has")
    return [name for name, place in found.items() if place in known]


def write(
    folder: str | os.PathLike,
    model: nn.Module,
    names: Collection[str],
    groups: Iterable[Mapping[str, torch.Tensor]],
    quantization: Callable[[], HeadstartConfig],
    *,
    dtype: torch.dtype | None = None,
    generation=None,
    tokenizer=None,
) -> None:
    """Writes a whole folder, or nothing; what was there is replaced.

    Args:
        folder: the name of the folder.
        model: of transformers, may be on the meta device; it gives the config.
        names: of all tensors that may come.
        groups: what belongs to no layer, then every layer; written one after another as they come.
        quantization: asked after the last group.
        dtype: what the config says; the model's if None.
        generation, tokenizer: saved beside the model if given.
    """

    def save(partial: Path) -> None:
        with LayeredFile(partial / FILE, names) as file:
            for group in groups:
                file.add(group)
                del group  # before the next one is made
        config = type(model.config).from_dict(model.config.to_dict())
        config.architectures = [type(model).__name__]
        config.dtype = dtype or model.dtype
        config.quantization_config = quantization()
        config.save_pretrained(partial)
        for part in (generation, tokenizer):
            if part is not None:
                part.save_pretrained(partial)

    write_whole_folder(folder, save)


def skeleton_of(model: nn.Module) -> nn.Module:
    """The same model without data."""
    with torch.device("meta"):
        return type(model)(model.config)


def rewrite(model: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Writes a folder of safetensors that is not quantised anew, with the layout of `write` and the same values."""
    import transformers

    files, config = CheckpointFiles(model), transformers.AutoConfig.from_pretrained(model)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"rewrite: model: expected one that is not quantised, got {model}")
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    names = known_names(model, skeleton, files.names())
    write(
        folder,
        skeleton,
        names,
        ({name: files.tensor(name) for name in group} for group in group_by_layer(skeleton, names)),
        lambda: HeadstartConfig(weights="plain"),
        dtype=getattr(config, "dtype", None),
        generation=generation_config(model),
        tokenizer=tokenizer_of(model),
    )


def generation_config(folder: str | os.PathLike):
    """Of a folder, or None."""
    import transformers

    here = (Path(folder) / "generation_config.json").is_file()
    return transformers.GenerationConfig.from_pretrained(folder) if here else None


def tokenizer_of(folder: str | os.PathLike):
    """Of a folder, or None: it may hold the weights alone."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return None

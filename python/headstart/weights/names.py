"""Names of weights: in a checkpoint, in a model, by decoder layer; and the model that a config names, without data."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

# --- the model -----------------------------------------------------------------------------------------------------


def auto_class(where: str | os.PathLike, config):
    """The class of transformers that opens a config: of language models, or of those that also read images.

    Raises a ValueError that begins with `where`, the folder, if no such class does.
    """
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    raise ValueError(
        f"{where}: model_type: expected one that AutoModelForCausalLM or AutoModelForImageTextToText opens, got "
        f"{config.model_type!r}; open the folder with the class of transformers that wrote it"
    )


def skeleton_of(where: str | os.PathLike, config, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a config, without data."""
    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        return auto_class(where, config).from_config(config, **options)


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def tied_weights(model: nn.Module) -> set[str]:
    """The names of all weights that are shared, such as an output layer's with the embedding's."""
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    return {*keys.keys(), *keys.values()}


# --- names in a checkpoint -----------------------------------------------------------------------------------------


def converter(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """From a checkpoint's tensor to its name in this model, as transformers has it: there are renamings, and a prefix
    comes or goes. The second value tells whether transformers makes that parameter of this tensor and others."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = model.state_dict()

    def convert(key: str) -> tuple[str, bool]:
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        return (key, False) if renamed not in known and key in known else (renamed, pattern is not None)

    return convert


def renamer(model: nn.Module) -> Callable[[str], str]:
    """The names alone of `converter`."""
    convert = converter(model)
    return lambda key: convert(key)[0]


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


# --- decoder layers ------------------------------------------------------------------------------------------------


def decoder_layers(model: nn.Module) -> list[str]:
    """The names of a model's decoder layers, from the first to the last: of the outermost list with most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise ValueError(f"expected a model with a list of decoder layers, got a {type(model).__name__}")
    layers = max(outer, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return [f"{layers}.{i}" for i in range(len(lists[layers]))]


def group_by_layer(model: nn.Module, names: Iterable[str]) -> dict[str | None, list[str]]:
    """The names of a checkpoint's tensors: under None those that are in no layer, then those of each decoder layer."""
    groups: dict[str | None, list[str]] = {None: [], **{layer: [] for layer in decoder_layers(model)}}
    depth, rename = list(groups)[1].count(".") + 1, renamer(model)
    for name in sorted(names):
        layer = ".".join(rename(name).split(".")[:depth])
        groups[layer if layer in groups else None].append(name)
    return groups

"""Fills a transformers model from tensors that headstart read, and checks what transformers would only warn about."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .config import HeadstartConfig
from .quantizer import leaving_out
from .sources.source import Source


def assemble(
    source: Source,
    skeleton: nn.Module,
    tensors: Mapping[str, Any],
    left_out: Collection[str],
    layout: HeadstartConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    files: Mapping[str, str] | None = None,
    one_at_a_time: bool = False,
) -> nn.Module:
    """A model of the skeleton's class, with these tensors.

    Args:
        source: gives the config and the folder.
        tensors: by their names in the checkpoint; tensors, or what [...] makes tensors.
        left_out, files: see `leaving_out`.
        layout: the packed layers among the tensors.
        one_at_a_time: transformers reads one tensor after another; else several threads read ahead.
    """
    kind, config = type(skeleton), copy.deepcopy(source.config)
    config = config if kind.config_class is type(config) else config.get_text_config()
    options: dict[str, Any] = {} if device is None else {"device_map": {"": device}}
    if one_at_a_time:  # transformers reads so if the method is an argument
        options["quantization_config"] = layout
    else:
        config.quantization_config = layout.to_dict()
    with leaving_out(left_out, files):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_loaded` names the tensor
            **options,
        )
    check_loaded(source.origin, info, source.strict)
    model.name_or_path = model.config.name_or_path = str(source.folder)
    if (generation := generation_config_of(source.folder)) is not None:
        model.generation_config = generation
    return model


def generation_config_of(folder: str | os.PathLike):
    """What a folder says about generation, or None."""
    if (Path(folder) / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_pretrained(folder)
    return None


def dtype_of(config, found: Iterable[torch.dtype]) -> torch.dtype:
    """What the config says, or the first dtype of the tensors that is floating point."""
    floats = (dtype for dtype in found if dtype.is_floating_point)
    return getattr(config, "dtype", None) or next(floats, torch.float32)


def check_loaded(folder: str | os.PathLike, info: Mapping[str, Any], strict: bool) -> None:
    """Raises a ValueError where transformers would only warn: weights that no file has are random.

    `strict` refuses tensors that the model has no place for.
    """
    for name, got, expected in info.get("mismatched_keys") or ():
        raise ValueError(f"{folder}: {name}: expected {list(expected)}, as config.json says, got {list(got)}")
    for key, words in (
        ("missing_keys", "expected a tensor, which no file has"),
        ("error_msgs", ""),
        ("unexpected_keys", "expected no such tensor: the model has no place for it"),
    ):
        names = sorted(str(name) for name in info.get(key) or ())
        if names and (key != "unexpected_keys" or strict):
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{folder}: {names[0]}: {words}{more}")

"""The one writer of headstart's folders: config.json, and a model.safetensors in which each decoder layer is one read.

`convert` takes a model apart, a decoder layer at a time, and gives each layer to a *transform*, which makes packed
layers of some of its tensors. What comes back is written before the next layer is read (`LayeredFile` has the layout).
``AutoModelForCausalLM.from_pretrained`` and `headstart.load` open the folder (`quantizer.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .._files import write_whole_folder
from .._quiet import quiet
from .packed_linear import PackedLinear, packed_layers


class Transform(Protocol):
    """What becomes of a model's tensors.

    Called for the tensors of no layer first, with None as `layer`, then for each decoder layer in turn. It returns what
    is to be written: tensors under their names, and under the name of a linear layer (that of its weight without
    ``.weight``) the packed layer that stands for its weight. The bias stays a tensor of its own.
    """

    kind: type[PackedLinear] | None  # of the packed layers; None if it makes none
    layers: Collection[str]  # the linear layers that it may pack

    def __call__(self, layer: str | None, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]: ...


@dataclass
class Original:
    """A model to convert.

    Args:
        skeleton: the model, which may have no data.
        names: of its tensors: a checkpoint's, or the model's own.
        read: gives one tensor by its name.
        dtype: of the model.
        generation, tokenizer: to be saved beside the model, or None.
    """

    skeleton: nn.Module
    names: Collection[str]
    read: Callable[[str], torch.Tensor]
    dtype: torch.dtype
    generation: Any = None
    tokenizer: Any = None

    @classmethod
    def of_folder(cls, op: str, folder: str | os.PathLike) -> Original:
        """A folder of safetensors in which nothing is packed. Tensors are read when they are asked for."""
        from .assemble import dtype_of, generation_config_of
        from .files import DTYPES, CheckpointFiles
        from .names import known_names, skeleton_of
        from .sources import Checkpoint, open_source

        checkpoint = Checkpoint(Path(folder))
        with quiet():
            if checkpoint.quantization:
                raise ValueError(f"{op}: model: expected one that is not quantised, got {folder}")
            config, files = open_source(checkpoint).config, CheckpointFiles(folder)
            dtype = dtype_of(config, (DTYPES[files.slice(name).get_dtype()] for name in files.names()))
            skeleton = skeleton_of(folder, config)
        names = known_names(folder, skeleton, files.names())
        return cls(skeleton, names, files.tensor, dtype, generation_config_of(folder), _tokenizer_of(folder))

    @classmethod
    def of_model(cls, model: nn.Module, tokenizer=None) -> Original:
        """A model in memory. What is tied to another weight is not written."""
        names = [name for name in model.state_dict() if name not in model.all_tied_weights_keys]
        generation = model.generation_config if model.can_generate() else None
        read = lambda name: model.get_parameter_or_buffer(name).detach()  # noqa: E731
        return cls(model, names, read, model.dtype, generation, tokenizer)


def convert(
    model: Original, transform: Transform | None, folder: str | os.PathLike, *, dtype: torch.dtype | None = None
) -> None:
    """Writes a whole folder, or nothing; what was there is replaced. One decoder layer at a time is in memory.

    Args:
        transform: None writes a model as it is, packed layers too.
        dtype: what the config says; the model's if None.
    """
    from .config import PLAIN, HeadstartConfig
    from .files import FILE, LayeredFile
    from .names import group_by_layer

    names, options = list(model.names), {}
    if transform is None:
        kept = packed_layers(model.skeleton)
        options = {name: layer.options() for name, layer in kept.items()}
        kind = type(next(iter(kept.values()))) if kept else None
    else:
        kind = transform.kind
        names += [f"{layer}.{field}" for layer in transform.layers for field in (kind.TENSORS if kind else ())]

    def groups() -> Iterator[dict[str, torch.Tensor]]:
        for layer, group in group_by_layer(model.skeleton, model.names).items():
            tensors = {name: model.read(name) for name in group}
            if transform is not None:
                tensors = _flat(transform(layer, tensors), options)
            yield tensors
            del tensors  # before the next are made

    def save(partial: Path) -> None:
        with LayeredFile(partial / FILE, names) as file:
            for group in groups():
                file.add(group)
                del group
        config = type(model.skeleton.config).from_dict(model.skeleton.config.to_dict())
        config.architectures = [type(model.skeleton).__name__]
        config.dtype = dtype or model.dtype
        config.quantization_config = (
            HeadstartConfig(PLAIN) if kind is None else HeadstartConfig.describing(kind.WEIGHTS, options)
        )
        config.save_pretrained(partial)
        for part in (model.generation, model.tokenizer):
            if part is not None:
                part.save_pretrained(partial)

    write_whole_folder(folder, save)


def _flat(result: Mapping[str, Any], options: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A transform's result with the tensors of packed layers; what the config says of these is added to `options`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in result.items():
        if isinstance(value, PackedLinear):
            options[name] = value.options()
            tensors |= {f"{name}.{field}": x for field, x in value.packed_tensors().items()}
        else:
            tensors[name] = value
    return tensors


def _tokenizer_of(folder: str | os.PathLike):
    """Of a folder, or None: it may hold the weights alone."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return None


def check_output(op: str, folder: Path) -> None:
    """Raises unless `folder` may be written: only what a command of ours wrote before is replaced."""
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{op}: output: expected a folder in one that exists, got {folder}")
    if folder.is_dir() and any(folder.iterdir()):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if content["quantization_config"]["quant_method"] == "headstart":
                return
    elif not folder.exists() or folder.is_dir():
        return
    raise ValueError(f"{op}: output: expected a new folder, an empty one or one of its own, got {folder}")

"""Loads a transformers model of which only a part is in memory: `headstart.load(folder, memory_budget=...)`.

transformers builds and fills the model as always, from tensors that were read by the streamer. What it is not given are
the weights of the streamed layers, which stay meta tensors until `WeightStream` lends them views of its buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)

from .._checkpoint_files import stored_tensors
from .artifact import decoder_layers
from .stream import DEPTH, WeightStream, guard_model, read_part
from .stream_plan import Part, Tensor, parse_budget, plan


def load_streamed(
    path: Path,
    config,
    budget: int | str,
    *,
    check: Callable[[dict], None],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    depth: int = DEPTH,
    **options,
):
    """A model that keeps as much of a folder's weights in memory as the budget allows.

    Args:
        check: is given transformers' loading info, and raises for what is missing.
        depth: buffers of the ring, if the budget allows as many.
        options: for `_stream.Streamer`: threads, block, source, bytes_per_second.
    """
    budget, device = parse_budget(budget), torch.device("cpu" if device is None else device)
    with torch.device("meta"):
        kind = type(transformers.AutoModelForCausalLM.from_config(config))
    streamed: list[tuple[nn.Module, Part]] = []
    chosen = None

    class Streamed(kind):
        @staticmethod
        def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
            nonlocal chosen
            layers, rest, unknown = _parts(model, path, checkpoint_files, load_config)
            chosen = plan([part for _, part in layers], rest, budget, depth)
            streamed.extend(layers[i] for i in chosen.streamed)
            for layer, part in streamed:
                _check_streamed(model, path, layer, part)
            kept = [rest, *(part for i, (_, part) in enumerate(layers) if i not in chosen.streamed)]
            tensors = unknown | dict(_read(kept, device, options))
            info, index = kind._load_pretrained_model(model, tensors, None, load_config, *args, **kwargs)
            info.missing_keys -= {place.tensor.name for _, part in streamed for place in part.places}
            return info, index

    Streamed.__name__, Streamed.__qualname__, Streamed.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    model, info = Streamed.from_pretrained(
        path,
        config=config if kind.config_class is type(config) else config.get_text_config(),
        dtype=dtype or "auto",
        device_map=None if device.type == "cpu" else {"": device},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check(info)
    model.__class__ = kind
    model.eval().requires_grad_(False)
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_contiguous)
    if streamed:
        guard_model(model, path, device)
        model._headstart_stream = WeightStream(streamed, chosen, device, **options)
    return model


def _contiguous(head: nn.Module, args: tuple) -> tuple:
    """The last token's states are a slice of all tokens', with strides for which torch copies the weight to multiply
    with it: as large as the embedding is, beyond any budget. `contiguous` leaves them, as there is but one."""
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:]) if args else args


def _read(parts: Iterable[Part], device: torch.device, options: dict) -> Iterable[tuple[str, torch.Tensor]]:
    """Tensors by their names in the files; one part after another is read."""
    for part in parts:
        buffer = read_part(part, **options)
        for place in part.places:
            yield place.tensor.key, place.of(buffer).to(device)


def _parts(model: nn.Module, path: Path, files: Iterable[str] | None, load_config):
    """(layer, its part) of every decoder layer, the part of the rest, and what the model has no place for, by name."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError(f"{path}: expected safetensors files, which are what can be streamed, got {files}")
    names = decoder_layers(model)
    layers, depth = {name: i for i, name in enumerate(names)}, names[0].count(".") + 1
    known, parameters = model.state_dict(), {name for name, _ in model.named_parameters(remove_duplicate=False)}
    inside: list[list[Tensor]] = [[] for _ in names]
    rest: list[Tensor] = []
    unknown = {}
    for key, stored in (item for file in files for item in stored_tensors(file).items()):
        name, converted = _name_in_model(key, model, known, load_config)
        if name not in known:
            unknown[key] = torch.empty(0, device="meta")
            continue
        tensor = Tensor(key, name, stored, _dtype_in_model(name, known[name], load_config), converted)
        layer = layers.get(".".join(name.split(".")[:depth]))
        (rest if layer is None or name not in parameters else inside[layer]).append(tensor)
    parts = [Part.of(name, tensors) for name, tensors in zip(names, inside)]
    return [(model.get_submodule(part.name), part) for part in parts], Part.of("no layer", rest), unknown


def _check_streamed(model: nn.Module, path: Path, layer: nn.Module, part: Part) -> None:
    """That the layer's parameters are its own, and lie in the files as the layer takes them."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*ties, *ties.values()}
    found = {place.tensor.name: place for place in part.places}
    for field, parameter in layer.named_parameters():
        name = f"{part.name}.{field}"
        if name not in found:
            raise ValueError(f"{path}: {name}: expected a tensor, which no file has")
        place, want, got = found[name], list(parameter.shape), list(found[name].tensor.stored.shape)
        cure = "is to be streamed as it lies in the file; give a memory_budget that holds all weights, or none"
        if place.tensor.converted:
            made = f"transformers makes {name} of it and others"
            raise ValueError(f"{place.tensor.stored.path}: {place.tensor.key}: {made}, and {name} {cure}")
        if name in tied:
            raise ValueError(f"{place.tensor.stored.path}: {name}: it is tied to another weight, and {cure}")
        if want != got:
            raise ValueError(f"{place.tensor.stored.path}: {name}: expected {want}, as config.json says, got {got}")


def _name_in_model(key: str, model: nn.Module, known: dict, load_config) -> tuple[str, bool]:
    """The parameter that transformers makes of a checkpoint's tensor, and whether it is more than that tensor."""
    mapping = load_config.weight_mapping or []
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
    if name not in known and key in known:
        return key, False
    return name, converter is not None


def _dtype_in_model(name: str, parameter: torch.Tensor, load_config) -> torch.dtype:
    """What transformers would cast it to: some models keep some weights in float32."""
    plan = load_config.dtype_plan or {}
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        if match := pattern.search(name):
            return plan[by_group[match.lastgroup]]
    return parameter.dtype

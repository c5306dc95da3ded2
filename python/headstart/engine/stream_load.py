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

from .._checkpoint_files import Stored, stored_tensors
from .stream import DEPTH, WeightStream, guard_model, read_part
from .stream_plan import Part, parse_budget, plan


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
            kept = [rest, *(part for i, (_, part) in enumerate(layers) if i not in chosen.streamed)]
            tensors = unknown | dict(_read(kept, device, options))
            info, index = kind._load_pretrained_model(model, tensors, None, load_config, *args, **kwargs)
            info.missing_keys -= {place.name for _, part in streamed for place in part.places}
            return info, index

    Streamed.__name__, Streamed.__qualname__, Streamed.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    model, info = Streamed.from_pretrained(
        path,
        config=config if kind.config_class is type(config) else config.get_text_config(),
        dtype=dtype or "auto",
        device_map={"": device},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check(info)
    model.__class__ = kind
    model.eval().requires_grad_(False)
    if streamed:
        guard_model(model, path, device)
        model._headstart_stream = WeightStream(streamed, chosen, device, **options)
    return model


def _read(parts: Iterable[Part], device: torch.device, options: dict) -> Iterable[tuple[str, torch.Tensor]]:
    """Tensors by their names in the model; one part after another is read."""
    for part in parts:
        buffer = read_part(part, **options)
        for place in part.places:
            yield place.name, place.of(buffer).to(device)


def _parts(model: nn.Module, path: Path, files: Iterable[str] | None, load_config):
    """(layer, its part) of every decoder layer, the part of the rest, and what the model has no place for, by name."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError(f"{path}: expected safetensors files, which are what can be streamed, got {files}")
    prefix, layers = _decoder_layers(model)
    names = [f"{prefix}.{i}" for i in range(len(layers))]
    parameters, known = dict(model.named_parameters(remove_duplicate=False)), model.state_dict()
    _check_untied(model, path, prefix)
    inside: list[list[tuple[str, Stored, torch.dtype]]] = [[] for _ in layers]
    rest: list[tuple[str, Stored, torch.dtype]] = []
    unknown = {}
    for key, stored in (item for file in files for item in stored_tensors(file).items()):
        name, converter = _name_in_model(key, model, known, load_config)
        layer = _layer_of(name, prefix)
        if converter is not None:
            raise ValueError(
                f"{stored.path}: {key}: expected a tensor that {type(model).__name__} takes as it is, since weights are "
                f"streamed as they lie in the file; transformers makes {name} of it and others"
            )
        if name not in known:
            unknown[name] = torch.empty(0, device="meta")
            continue
        dtype = _dtype_in_model(name, known[name], stored, load_config)
        if layer is None or name not in parameters:
            rest.append((name, stored, dtype))
            continue
        if tuple(known[name].shape) != stored.shape:
            want, got = list(known[name].shape), list(stored.shape)
            raise ValueError(f"{stored.path}: {name}: expected {want}, as config.json says, got {got}")
        inside[layer].append((name, stored, dtype))
    for i, (name, tensors) in enumerate(zip(names, inside)):
        wanted = {f"{name}.{field}" for field, _ in layers[i].named_parameters()}
        if missing := sorted(wanted - {tensor[0] for tensor in tensors}):
            raise ValueError(f"{path}: {missing[0]}: expected a tensor, which no file has")
    parts = [Part.of(name, tensors) for name, tensors in zip(names, inside)]
    return list(zip(layers, parts)), Part.of("what belongs to no layer", rest), unknown


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of layers that has the most of the model's weights, and its name."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"load: memory_budget: expected a model with a list of decoder layers, got {type(model).__name__}")
    return max(lists, key=lambda item: sum(p.nbytes for p in item[1].parameters()))


def _layer_of(name: str, prefix: str) -> int | None:
    if not name.startswith(f"{prefix}."):
        return None
    number = name.removeprefix(f"{prefix}.").partition(".")[0]
    return int(number) if number.isdigit() else None


def _check_untied(model: nn.Module, path: Path, prefix: str) -> None:
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    for name in (*ties, *ties.values()):
        if _layer_of(name, prefix) is not None:
            raise ValueError(f"{path}: {name}: expected weights of a layer's own, since layers are streamed; it is tied")


def _name_in_model(key: str, model: nn.Module, known: dict, load_config) -> tuple[str, str | None]:
    """The parameter that transformers makes of a checkpoint's tensor, and what converts it, if anything does."""
    mapping = load_config.weight_mapping or []
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
    if name not in known and key in known:
        return key, None
    return name, converter


def _dtype_in_model(name: str, parameter: torch.Tensor, stored: Stored, load_config) -> torch.dtype:
    """What transformers would cast it to: some models keep some weights in float32."""
    plan = load_config.dtype_plan or {}
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        if match := pattern.search(name):
            return plan[by_group[match.lastgroup]]
    return parameter.dtype

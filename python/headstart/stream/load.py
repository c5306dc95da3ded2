"""Loads a transformers model of which only a part is in memory: `headstart.load(folder, memory_budget=...)`.

transformers builds and fills the model as always, from tensors that the streamer read. It leaves out the weights of the
streamed layers: they stay meta tensors, until `WeightStream` lends them views of its buffers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..weights.assemble import assemble, dtype_of
from ..weights.files import Stored
from ..weights.names import converter, decoder_layers, skeleton_of, tied_weights
from ..weights.quantizer import check_files, put_back, swap_layers
from ..weights.sources.plain import Plain
from .plan import Part, StreamedTensor, parse_budget, plan
from .ring import DEPTH, WeightStream, guard_model, read_part


def load_streamed(
    source: Plain,
    budget: int | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    depth: int = DEPTH,
    **options,
) -> nn.Module:
    """A model that keeps as much of a checkpoint's weights in memory as the budget allows.

    Args:
        source: a transformers folder as it is, or headstart's own.
        depth: buffers of the ring, if the budget allows as many.
        options: for `_stream.Streamer`: threads, block, source, bytes_per_second.
    """
    budget, device = parse_budget(budget), torch.device("cpu" if device is None else device)
    folder, stored, layout = source.folder, source.stream(), source.layout()
    dtype = dtype or dtype_of(source.config, (tensor.dtype for tensor in stored.values()))
    skeleton = skeleton_of(folder, source.config, dtype)
    swap_layers(skeleton, layout)
    files = check_files(skeleton, stored, layout)
    layers, rest, unknown = _parts(skeleton, stored, dtype)
    chosen = plan(layers, rest, budget, depth)
    streamed = [layers[i] for i in chosen.streamed]
    for part in streamed:
        _check_streamed(skeleton, folder, part)

    kept = [rest, *(part for i, part in enumerate(layers) if i not in chosen.streamed)]
    left_out = [f"{part.name}.{field}" for part in streamed for field, _ in _parameters(skeleton, part)]
    tensors = unknown | dict(_read(kept, device, options))
    place = None if device.type == "cpu" else device
    model = assemble(source, skeleton, tensors, left_out, layout, dtype=dtype, device=place, files=files)
    put_back(model, left_out)
    model.requires_grad_(False)
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_contiguous)
    if streamed:
        guard_model(model, folder, device)
        parts = [(model.get_submodule(part.name), part) for part in streamed]
        model._headstart_stream = WeightStream(parts, chosen, device, **options)
    return model


def _contiguous(head: nn.Module, args: tuple) -> tuple:
    """The last token's states are a slice of all tokens', with strides for which torch copies the weight to multiply
    with it: as large as the embedding is, beyond any budget. `contiguous` leaves them, as there is but one."""
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:]) if args else args


def _parameters(model: nn.Module, part: Part) -> list[tuple[str, nn.Parameter]]:
    return list(model.get_submodule(part.name).named_parameters())


def _read(parts: Iterable[Part], device: torch.device, options: dict) -> Iterable[tuple[str, torch.Tensor]]:
    """Tensors by their names in the files; one part after another is read."""
    for part in parts:
        buffer = read_part(part, **options)
        for place in part.places:
            yield place.tensor.key, place.of(buffer).to(device)


def _parts(
    model: nn.Module, stored: Mapping[str, Stored], dtype: torch.dtype
) -> tuple[list[Part], Part, dict[str, torch.Tensor]]:
    """The part of every decoder layer, the part of the rest, and what the model has no place for, by name."""
    names = decoder_layers(model)
    layers, depth, convert = {name: i for i, name in enumerate(names)}, names[0].count(".") + 1, converter(model)
    known, parameters = model.state_dict(), {name for name, _ in model.named_parameters(remove_duplicate=False)}
    in_float32 = _kept_in_float32(model, dtype)
    inside: list[list[StreamedTensor]] = [[] for _ in names]
    rest: list[StreamedTensor] = []
    unknown = {}
    for key, place in stored.items():
        name, converted = convert(key)
        if name not in known:
            unknown[key] = torch.empty(0, device="meta")
            continue
        wanted = known[name].dtype
        if wanted.is_floating_point and in_float32(name):
            wanted = torch.float32
        tensor = StreamedTensor(key, name, place, wanted, converted)
        layer = layers.get(".".join(name.split(".")[:depth]))
        (rest if layer is None or name not in parameters else inside[layer]).append(tensor)
    return [Part.of(name, tensors) for name, tensors in zip(names, inside)], Part.of("no layer", rest), unknown


def _kept_in_float32(model: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether transformers would keep a weight in float32: some models ask for that."""
    kept = [re.compile(name.replace("*", ".*")) for name in model._get_dtype_plan(dtype)]
    return lambda name: any(pattern.search(name) for pattern in kept)


def _check_streamed(model: nn.Module, folder: Path, part: Part) -> None:
    """That the layer's parameters are its own, and lie in the files as the layer takes them."""
    tied, found = tied_weights(model), {place.tensor.name: place for place in part.places}
    for field, parameter in _parameters(model, part):
        name = f"{part.name}.{field}"
        if name not in found:
            raise ValueError(f"{folder}: {name}: expected a tensor, which no file has")
        tensor, want = found[name].tensor, list(parameter.shape)
        got = list(tensor.stored.shape)
        cure = "is to be streamed as it lies in the file; give a memory_budget that holds all weights, or none"
        if tensor.converted:
            made = f"transformers makes {name} of it and others"
            raise ValueError(f"{tensor.stored.path}: {tensor.key}: {made}, and {name} {cure}")
        if name in tied:
            raise ValueError(f"{tensor.stored.path}: {name}: it is tied to another weight, and {cure}")
        if want != got:
            raise ValueError(f"{tensor.stored.path}: {name}: expected {want}, as config.json says, got {got}")

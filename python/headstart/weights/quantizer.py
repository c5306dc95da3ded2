"""headstart's packed weights as a quantisation method of transformers: `quant_method` "headstart" in a config.json.

``from_pretrained`` calls `HeadstartQuantizer` at two points: before it fills a model, which then gets its packed
layers, and after that, when their data are checked. Whoever fills a part of the model by himself (`model/load.py`,
`stream/load.py`) names that part with `leaving_out`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from .._expect import expect_value
from .config import KINDS, METHOD, PLAIN, HeadstartConfig
from .files import PADDING, Stored, stored_tensors
from .int4_linear import Int4Linear
from .names import renamer, tied_weights
from .packed_linear import FLOATS, packed_layers
from .place import place_for, put, tied_embedding, untie


class _Call(NamedTuple):
    parameters: Collection[str]
    files: Mapping[str, str]


# Of the running call of from_pretrained. A config cannot carry this: transformers copies it, and writes it to files.
_NO_CALL = _Call((), {})
_call: ContextVar[_Call] = ContextVar("headstart_from_pretrained", default=_NO_CALL)


@contextmanager
def leaving_out(parameters: Collection[str], files: Mapping[str, str] | None = None) -> Iterator[None]:
    """In its block, ``from_pretrained`` gives these parameters no data and does not miss them.

    They are then no parameters, but plain attributes on the meta device, until `put_back`.

    Args:
        parameters: their names in the model.
        files: by the names of tensors in the model, where they lie; for messages about damaged data.
    """
    token = _call.set(_Call(parameters, files or {}))
    try:
        yield
    finally:
        _call.reset(token)


def put_back(model: nn.Module, parameters: Iterable[str]) -> None:
    """Makes parameters again of what `leaving_out` named; they still have no data."""
    for name in parameters:
        module, _, field = name.rpartition(".")
        module = model.get_submodule(module)
        module.register_parameter(field, nn.Parameter(vars(module).pop(field), requires_grad=False))


def _set_aside(model: nn.Module, name: str) -> None:
    module, _, field = name.rpartition(".")
    module = model.get_submodule(module)
    tensor = module._parameters.pop(field).detach()
    tensor._is_hf_initialized = True  # transformers draws random numbers for what has no such mark
    setattr(module, field, tensor)


class HeadstartQuantizer(HfQuantizer):
    """Puts packed layers where the config says."""

    requires_calibration = False
    quantization_config: HeadstartConfig
    is_trainable = False
    is_compileable = True

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    def validate_environment(self, *args, **kwargs) -> None:
        if not self.pre_quantized and _call.get() is _NO_CALL:
            raise ValueError("from_pretrained: quantization_config: this model is not quantised: `headstart quantize`")

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs) -> None:
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, re.escape(PADDING)}
        swap_layers(model, self.quantization_config)
        self._files = _call.get().files
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            stored = {name: x for file in checkpoint_files for name, x in stored_tensors(file).items()}
            self._files = check_files(model, stored, self.quantization_config)
        for name in _call.get().parameters:
            untie(model, name)
            _set_aside(model, name)

    def _process_model_after_weight_loading(self, model, **kwargs) -> None:
        for name, layer in packed_layers(model).items():
            tensors = layer.packed_tensors()
            for x in tensors.values():
                x.requires_grad_(False)
            if not any(x.is_meta for x in tensors.values()):
                where = self._files.get(f"{name}.{layer.TENSORS[0]}")
                layer.check(name if where is None else f"{where}: {name}")
        if self.quantization_config.weights == PLAIN:
            self.remove_quantization_config(model)


def swap_layers(model: nn.Module, config: HeadstartConfig) -> None:
    """Puts a packed layer without data in every place that the config names."""
    rename, tied, kind = renamer(model), tied_weights(model), KINDS.get(config.weights)
    for name in config.modules:
        place = rename(f"{name}.weight").removesuffix(".weight")
        linear, embedding = place_for(model, place), tied_embedding(model, place) if kind is Int4Linear else None
        good = linear is not None and (f"{place}.weight" not in tied or embedding is not None)
        expected, where = (
            f"an untied linear layer of {type(model).__name__}",
            "config.json: quantization_config",
        )
        expect_value(good, where, f"modules: {name}", expected, f"{linear}")
        try:
            layer = kind.like(linear, config.options(name))
        except ValueError as error:
            raise ValueError(f"{where}: modules: {name}: {error}") from None
        put(model, place, layer, embedding)


def check_files(model: nn.Module, tensors: Mapping[str, Stored], config: HeadstartConfig) -> dict[str, str]:
    """That the files have every tensor of every packed layer, and no others, before any is read.

    Args:
        tensors: by their names in the files.

    Returns the files by the tensors' names in the model.
    """
    rename, known = renamer(model), model.state_dict()
    stored = {rename(key): tensor for key, tensor in tensors.items()}
    fields = () if config.weights == PLAIN else KINDS[config.weights].TENSORS
    for name, tensor in stored.items():
        if name.rpartition(".")[2] in fields and name not in known:
            raise ValueError(
                f"{tensor.path}: {name}: expected no such tensor, as the quantization_config of config.json says"
            )
    for name, layer in packed_layers(model).items():
        for field, want in layer.state_dict().items():
            if f"{name}.{field}" not in stored:
                first = next(iter(stored.values())).path
                raise ValueError(f"{first}: {name}.{field}: expected a tensor, which no file of the folder has")
            got = stored[f"{name}.{field}"]
            cast = field in layer.casts() and (field == "bias" or got.dtype in (getattr(torch, x) for x in FLOATS))
            if not (cast or got.dtype == want.dtype) or got.shape != tuple(want.shape):
                words = f"expected {_words(want.dtype, want.shape)}, got {_words(got.dtype, got.shape)}"
                raise ValueError(f"{got.path}: {name}.{field}: {words}")
    return {name: str(tensor.path) for name, tensor in stored.items()}


def _words(dtype, shape) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


# A headstart that was imported before, and again since, makes room.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
auto.register_quantization_config(METHOD)(HeadstartConfig)
auto.register_quantizer(METHOD)(HeadstartQuantizer)

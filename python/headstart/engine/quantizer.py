"""headstart's packed weights as a quantisation method of transformers: `quant_method` "headstart" in a config.json.

A folder is opened in one of two ways. An artifact of our own names its packed layers in its config: they are
`Int4Linear` or `BitmapLinear` before transformers fills them from the files. A foreign checkpoint
(`int4_checkpoint.py`, `bitmap_checkpoint.py`) has a *source*: transformers loads what is not packed, and the source
then gives one layer after another.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._checkpoint_files import DTYPES, PADDING, open_safetensors
from ..ops.bitmap import BitmapWeight
from ..ops.int4_gemm import Int4Weight
from .bitmap_linear import BitmapLinear
from .int4_linear import Int4Linear
from .packed_linear import PackedLinear

METHOD, VERSION = "headstart", 1
FLOATS = ("float32", "float16", "bfloat16")
LAYERS: dict[str, type[PackedLinear]] = {layer.WEIGHTS: layer for layer in (Int4Linear, BitmapLinear)}
OF_WEIGHT = {Int4Weight: Int4Linear, BitmapWeight: BitmapLinear}
# What a config may say of each kind, and what it means not to. Layers of one kind may differ in these.
OPTIONS: dict[str, dict[str, Any]] = {
    "int4": {"group_size": 128, "symmetric": False, "act_order": False, "scale_dtype": "bfloat16"},
    "bitmap": {"values": "same", "group_size": -1, "scale_dtype": "bfloat16"},
    "plain": {},  # no packed layers: a model in the layout of `artifact.py`
}
OWN_OPTIONS = {"int4": (), "bitmap": ("nnz",), "plain": ()}  # what every layer must say of itself
TENSORS = {
    "int4": {"packed", "scales", "zeros", "permutation"},
    "bitmap": {"values", "bitmask", "row_offsets", "scales"},
    "plain": set(),
}


class HeadstartConfig(QuantizationConfigMixin):
    """What config.json says of the packed layers: options for all of them, and under their names what is theirs.

    Args:
        weights, version: "int4", "bitmap", or "plain" for none; 1.
        modules: the packed layers by their names in the model, each with what is different there, and of a bitmap its
            ``nnz``, which sizes the tensors.
        source: gives the layers of a foreign checkpoint, see `HeadstartQuantizer`; it is not saved.
        options: as `Int4Linear` (group_size, symmetric, act_order, scale_dtype) or `BitmapLinear` (values, group_size,
            scale_dtype) takes them; the dtype is a string.

    Raises:
        ValueError: naming the field.
    """

    def __init__(
        self,
        weights: str = "int4",
        version: int = VERSION,
        modules: dict[str, dict[str, Any]] | None = None,
        source: Any = None,
        quant_method: str = METHOD,
        **options,
    ):
        _expect(quant_method == METHOD, "quant_method", repr(METHOD), quant_method)
        _expect(weights in OPTIONS, "weights", f"one of {', '.join(map(repr, OPTIONS))}", weights)
        _expect(version == VERSION, "version", f"{VERSION} (a newer headstart may read it)", version)
        odd = next((key for key in options if key not in OPTIONS[weights]), None)
        _expect(odd is None, str(odd), "no such field", options.get(odd))
        modules = {} if modules is None else modules
        _expect(isinstance(modules, dict), "modules", "an object", modules)
        _expect(weights != "plain" or not modules, "modules", "none, as weights is 'plain'", modules)
        self.quant_method, self.weights, self.version, self.source = METHOD, weights, version, source
        self.modules = modules
        vars(self).update(OPTIONS[weights] | options)
        _check_options("", self._defaults())
        known = (*OPTIONS[weights], *OWN_OPTIONS[weights])
        for name in modules:
            _expect(isinstance(modules[name], dict), f"modules: {name}", "an object", modules[name])
            odd = next((key for key in modules[name] if key not in known), None)
            _expect(odd is None, f"modules: {name}", f"only {', '.join(known)}", odd)
            for key in OWN_OPTIONS[weights]:
                _expect(key in modules[name], f"modules: {name}: {key}", "a number", None)
            _check_options(f"modules: {name}: ", self.options(name))

    def _defaults(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in OPTIONS[self.weights]}

    def options(self, name: str) -> dict[str, Any]:
        """All options of a layer."""
        return self._defaults() | self.modules[name]

    @classmethod
    def of(cls, model: nn.Module) -> HeadstartConfig:
        """What describes the packed layers of a model."""
        layers = packed_layers(model)
        kinds = sorted({layer.WEIGHTS for layer in layers.values()})
        if len(kinds) > 1:
            raise ValueError(f"{type(model).__name__}: expected packed layers of one kind, got {' and '.join(kinds)}")
        return cls.describing(kinds[0] if kinds else "int4", {name: x.options() for name, x in layers.items()})

    @classmethod
    def describing(cls, weights: str, found: dict[str, dict[str, Any]]) -> HeadstartConfig:
        """From the kind and the options of all layers: what most of them have is said once."""
        keys = tuple(OPTIONS[weights])
        full = {name: OPTIONS[weights] | options for name, options in found.items()}
        tuples = Counter(tuple(options[key] for key in keys) for options in full.values())
        common = dict(zip(keys, tuples.most_common(1)[0][0])) if full else dict(OPTIONS[weights])
        modules = {
            name: {key: value for key, value in options.items() if key not in common or value != common[key]}
            for name, options in full.items()
        }
        return cls(weights, modules=modules, **common)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "source"}


def _expect(good: bool, field: str, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"config.json: quantization_config: {field}: expected {expected}, got {got!r}")


def _check_options(where: str, options: dict[str, Any]) -> None:
    def expect(key: str, good: bool, expected: str) -> None:
        _expect(good, where + key, expected, options[key])

    for key, value in options.items():
        number = type(value) is int
        if key == "group_size" and "values" in options:
            expect(key, number and (value == -1 or value > 0), "a positive number, or -1")
        elif key == "group_size":
            expect(key, number and (value == -1 or (value > 0 and value % 32 == 0)), "a multiple of 32, or -1")
        elif key in ("symmetric", "act_order"):
            expect(key, type(value) is bool, "true or false")
        elif key == "scale_dtype":
            expect(key, value in FLOATS, f"one of {', '.join(FLOATS)}")
        elif key == "values":
            expect(key, value in ("same", "int8", "int4"), "'same', 'int8' or 'int4'")
        elif key == "nnz":
            expect(key, number and value >= 0, "a number of weights")


class HeadstartQuantizer(HfQuantizer):
    """Puts packed layers where the config, or its source, says.

    A source has ``modules(model, rename)``, the packed layers' names in the model and in the checkpoint, and
    ``read(name, layer)``, the weight (an `Int4Weight` or `BitmapWeight`) and bias [N] or None of one layer in the
    checkpoint, for a `Waiting`.
    """

    requires_calibration = False
    quantization_config: HeadstartConfig
    is_trainable = False
    is_compileable = True

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    def validate_environment(self, *args, **kwargs) -> None:
        if not self.pre_quantized and self.quantization_config.source is None:
            raise ValueError("from_pretrained: quantization_config: this model is not quantised: `headstart quantize`")

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs) -> None:
        config, rename = self.quantization_config, renamer(model)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, re.escape(PADDING)}
        self._file_of = {}
        if config.source is not None:
            self._stored = config.source.modules(model, rename)
            for name in self._stored:
                model.set_submodule(name, Waiting(model.get_submodule(name)))
            return
        for name in config.modules:
            place = rename(f"{name}.weight").removesuffix(".weight")
            linear, tied = submodule(model, place), f"{place}.weight" in tied_weights(model)
            here = isinstance(linear, nn.Linear) and not tied
            _expect(here, f"modules: {name}", f"an untied linear layer of {type(model).__name__}", f"{linear}")
            options = config.options(name)
            options["scale_dtype"] = getattr(torch, options["scale_dtype"])
            options |= {"bias": linear.bias is not None, "dtype": linear.weight.dtype, "device": "meta"}
            model.set_submodule(place, LAYERS[config.weights](linear.in_features, linear.out_features, **options))
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            self._file_of = _check_files(model, checkpoint_files, TENSORS[config.weights])

    def _process_model_after_weight_loading(self, model, **kwargs) -> None:
        if self.quantization_config.source is not None:
            source, device = self.quantization_config.source, model.device
            for name, stored in self._stored.items():
                weight, bias = source.read(stored, model.get_submodule(name))
                bias = None if bias is None else bias.to(device)
                model.set_submodule(name, OF_WEIGHT[type(weight)].from_weight(weight.to(device), bias))
            self.quantization_config = model.config.quantization_config = HeadstartConfig.of(model)
        for name, layer in packed_layers(model).items():
            tensors = {field: x for field, x in layer.named_parameters() if field != "bias"}
            for x in tensors.values():
                x.requires_grad_(False)
            if not any(x.is_meta for x in tensors.values()):
                where = self._file_of.get(f"{name}.{next(iter(tensors))}")
                layer.check(name if where is None else f"{where}: {name}")
        if self.quantization_config.weights == "plain":
            self.remove_quantization_config(model)


class Waiting(nn.Module):
    """Stands in a linear layer's place until its source gives it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.has_bias, self.dtype = linear.bias is not None, linear.weight.dtype


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def tied_weights(model: nn.Module) -> set[str]:
    """The names of all weights that are shared, such as an output layer's with the embedding's."""
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    return {*keys.keys(), *keys.values()}


def renamer(model: nn.Module) -> Callable[[str], str]:
    """How transformers names a checkpoint's tensor in this model: it has renamings, and adds or drops a prefix."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = model.state_dict()

    def rename(key: str) -> str:
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        return key if renamed not in known and key in known else renamed

    return rename


def _check_files(model: nn.Module, files: list[str], fields: set[str]) -> dict[str, str]:
    """That the files have every tensor of every packed layer, and no others, before any is read.

    Returns the files by the tensors' names in the model.
    """
    rename = renamer(model)
    stored = {}
    for path in files:
        with open_safetensors(path) as file:
            for key in file.keys():
                part = file.get_slice(key)
                stored[rename(key)] = path, DTYPES.get(part.get_dtype()), part.get_shape()
    known = model.state_dict()
    for name, (path, _, _) in stored.items():
        if name.rpartition(".")[2] in fields and name not in known:
            raise ValueError(f"{path}: {name}: expected no such tensor, as the quantization_config of config.json says")
    for name, layer in packed_layers(model).items():
        for field, want in layer.state_dict().items():
            if f"{name}.{field}" not in stored:
                raise ValueError(f"{files[0]}: {name}.{field}: expected a tensor, which no file of the folder has")
            path, dtype, shape = stored[f"{name}.{field}"]
            cast = field in layer.casts() and (field == "bias" or dtype in (getattr(torch, x) for x in FLOATS))
            if not (cast or dtype == want.dtype) or tuple(shape) != tuple(want.shape):
                expected, got = _words(want.dtype, want.shape), _words(dtype, shape)
                raise ValueError(f"{path}: {name}.{field}: expected {expected}, got {got}")
    return {name: path for name, (path, _, _) in stored.items()}


def _words(dtype, shape) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


# A headstart that was imported before, and again since, makes room.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
auto.register_quantization_config(METHOD)(HeadstartConfig)
auto.register_quantizer(METHOD)(HeadstartQuantizer)

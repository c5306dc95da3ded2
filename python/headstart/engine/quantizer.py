"""headstart's int4 weights as a quantisation method of transformers: `quant_method` "headstart" in a config.json.

A folder is opened in one of two ways. An artifact of our own names its int4 layers in its config: they are `Int4Linear`
before transformers fills them from the files. A foreign checkpoint (`int4_checkpoint.py`) has a *source*: transformers
loads what is not quantised, and the source then gives one layer after another.
"""

from __future__ import annotations

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

from .._checkpoint_files import open_safetensors
from .int4_linear import Int4Linear

METHOD, VERSION = "headstart", 1
SCALE_DTYPES = ("float32", "float16", "bfloat16")
TENSORS = ("packed", "scales", "zeros", "permutation")
SAFETENSORS_DTYPES = {"I32": torch.int32, "U8": torch.uint8} | {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class HeadstartConfig(QuantizationConfigMixin):
    """What config.json says of the int4 layers: options for all of them, and under their names those that differ.

    Args:
        weights, version: "int4", 1.
        group_size, symmetric, act_order, scale_dtype: as `Int4Linear` takes them; the dtype is a string.
        modules: the int4 layers by their names in the model, each with what is different there.
        source: gives the layers of a foreign checkpoint, see `HeadstartQuantizer`; it is not saved.

    Raises:
        ValueError: naming the field.
    """

    def __init__(
        self,
        weights: str = "int4",
        version: int = VERSION,
        group_size: int = 128,
        symmetric: bool = False,
        act_order: bool = False,
        scale_dtype: str = "bfloat16",
        modules: dict[str, dict[str, Any]] | None = None,
        source: Any = None,
        quant_method: str = METHOD,
        **unknown,
    ):
        _expect(quant_method == METHOD, "quant_method", repr(METHOD), quant_method)
        _expect(not unknown, next(iter(unknown), ""), "no such field", next(iter(unknown.values()), None))
        _expect(weights == "int4", "weights", "'int4'", weights)
        _expect(version == VERSION, "version", f"{VERSION} (a newer headstart may read it)", version)
        modules = {} if modules is None else modules
        _expect(isinstance(modules, dict), "modules", "an object", modules)
        self.quant_method, self.weights, self.version, self.source = METHOD, weights, version, source
        self.group_size, self.symmetric, self.act_order = group_size, symmetric, act_order
        self.scale_dtype, self.modules = scale_dtype, modules
        for name in modules:
            _expect(isinstance(modules[name], dict), f"modules: {name}", "an object", modules[name])
            odd = next((key for key in modules[name] if key not in self._defaults()), None)
            _expect(odd is None, f"modules: {name}", f"only {', '.join(self._defaults())}", odd)
            _check_options(f"modules: {name}: ", self.options(name))
        _check_options("", self._defaults())

    def _defaults(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("group_size", "symmetric", "act_order", "scale_dtype")}

    def options(self, name: str) -> dict[str, Any]:
        """All options of a layer."""
        return self._defaults() | self.modules[name]

    @classmethod
    def of(cls, model: nn.Module) -> HeadstartConfig:
        """What describes the int4 layers of a model."""
        found = {}
        for name, layer in int4_layers(model).items():
            dtype = str(layer.scales.dtype).removeprefix("torch.")
            found[name] = (layer.group_size, layer.zeros is None, layer.permutation is not None, dtype)
        keys = ("group_size", "symmetric", "act_order", "scale_dtype")
        common = Counter(found.values()).most_common(1)[0][0] if found else (128, False, False, "bfloat16")
        modules = {
            name: {key: value for key, value, most in zip(keys, options, common) if value != most}
            for name, options in found.items()
        }
        return cls(**dict(zip(keys, common)), modules=modules)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "source"}


def _expect(good: bool, field: str, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"config.json: quantization_config: {field}: expected {expected}, got {got!r}")


def _check_options(where: str, options: dict[str, Any]) -> None:
    size = options["group_size"]
    whole = type(size) is int and (size == -1 or (size > 0 and size % 32 == 0))
    _expect(whole, f"{where}group_size", "a multiple of 32, or -1", size)
    for key in ("symmetric", "act_order"):
        _expect(type(options[key]) is bool, where + key, "true or false", options[key])
    good = options["scale_dtype"] in SCALE_DTYPES
    _expect(good, f"{where}scale_dtype", f"one of {', '.join(SCALE_DTYPES)}", options["scale_dtype"])


class HeadstartQuantizer(HfQuantizer):
    """Puts `Int4Linear` where the config, or its source, says.

    A source has ``modules(model, rename)``, the int4 layers' names in the model and in the checkpoint, and
    ``read(name, layer)``, the weight and bias [N] or None of one layer in the checkpoint, for a `Waiting`.
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
        rename, source = renamer(model), self.quantization_config.source
        if source is not None:
            self._stored = source.modules(model, rename)
            for name in self._stored:
                model.set_submodule(name, Waiting(model.get_submodule(name)))
            return
        for name in self.quantization_config.modules:
            place = rename(f"{name}.weight").removesuffix(".weight")
            linear, tied = submodule(model, place), f"{place}.weight" in tied_weights(model)
            here = isinstance(linear, nn.Linear) and not tied
            _expect(here, f"modules: {name}", f"an untied linear layer of {type(model).__name__}", f"{linear}")
            options = self.quantization_config.options(name)
            options["scale_dtype"] = getattr(torch, options["scale_dtype"])
            options |= {"bias": linear.bias is not None, "dtype": linear.weight.dtype, "device": "meta"}
            model.set_submodule(place, Int4Linear(linear.in_features, linear.out_features, **options))
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            _check_files(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model, **kwargs) -> None:
        if self.quantization_config.source is not None:
            source, device = self.quantization_config.source, model.device
            for name, stored in self._stored.items():
                weight, bias = source.read(stored, model.get_submodule(name))
                bias = None if bias is None else bias.to(device)
                model.set_submodule(name, Int4Linear.from_weight(weight.to(device), bias))
            self.quantization_config = model.config.quantization_config = HeadstartConfig.of(model)
        for name, layer in int4_layers(model).items():
            for field in TENSORS:
                if getattr(layer, field) is not None:
                    getattr(layer, field).requires_grad_(False)
            if not layer.scales.is_meta:
                _check_values(name, layer)


class Waiting(nn.Module):
    """Stands in a linear layer's place until its source gives it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.has_bias, self.dtype = linear.bias is not None, linear.weight.dtype


def int4_layers(model: nn.Module) -> dict[str, Int4Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Int4Linear)}


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


def _check_files(model: nn.Module, files: list[str]) -> None:
    """That the files have every tensor of every int4 layer, and no others, before any is read."""
    rename = renamer(model)
    stored = {}
    for path in files:
        with open_safetensors(path) as file:
            for key in file.keys():
                part = file.get_slice(key)
                stored[rename(key)] = path, SAFETENSORS_DTYPES.get(part.get_dtype()), part.get_shape()
    known = model.state_dict()
    for name, (path, _, _) in stored.items():
        if name.rpartition(".")[2] in TENSORS and name not in known:
            raise ValueError(f"{path}: {name}: expected no such tensor, as the quantization_config of config.json says")
    for name, layer in int4_layers(model).items():
        for field, want in layer.state_dict().items():
            if f"{name}.{field}" not in stored:
                raise ValueError(f"{files[0]}: {name}.{field}: expected a tensor, which no file of the folder has")
            path, dtype, shape = stored[f"{name}.{field}"]
            same = field == "bias" or dtype == want.dtype
            if not same or tuple(shape) != tuple(want.shape):
                expected, got = _words(want.dtype, want.shape), _words(dtype, shape)
                raise ValueError(f"{path}: {name}.{field}: expected {expected}, got {got}")


def _words(dtype, shape) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _check_values(name: str, layer: Int4Linear) -> None:
    """What a damaged file could have: every other bit pattern is a weight."""

    def expect(good: bool, field: str, expected: str) -> None:
        if not good:
            raise ValueError(f"{name}.{field}: expected {expected}; the data are damaged")

    expect(bool(torch.isfinite(layer.scales).all()), "scales", "finite scales")
    if layer.zeros is not None:
        expect(bool((layer.zeros <= 15).all()), "zeros", "zero points 0 to 15")
    if layer.permutation is not None:
        columns = torch.arange(layer.in_features, device=layer.permutation.device)
        whole = torch.equal(layer.permutation.long().sort().values, columns)
        expect(whole, "permutation", "every column once")


# A headstart that was imported before, and again since, makes room.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
auto.register_quantization_config(METHOD)(HeadstartConfig)
auto.register_quantizer(METHOD)(HeadstartQuantizer)

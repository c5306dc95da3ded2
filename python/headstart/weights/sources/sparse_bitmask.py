"""compressed-tensors' "sparse-bitmask" checkpoints, which that library itself no longer reads: opened and written.

A module is compressed if the files have its tensors, ``<module>.bitmask`` and its like, or ``<module>.weight.bitmask``
in older ones. Linear layers become `BitmapLinear`. What the model has no untied linear layer for (an embedding, a norm,
experts that transformers fuses) is decompressed as it is read. So is a weight whose bitmap takes more bytes than the
weight itself.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..._expect import checker
from ..._files import write_whole_folder
from ...ops.bitmap import BitmapWeight
from ..bitmap_linear import BitmapLinear
from ..files import DTYPES, FILE, CheckpointFiles
from ..names import renamer, submodule, tied_weights
from ..packed_linear import FLOATS, packed_layers
from .compressed_tensors import matches
from .source import Checkpoint, Source, read_bias

FORMAT = "sparse-bitmask"
FIELDS = ("compressed", "bitmask", "shape", "row_offsets")


class SparseBitmask(Source):
    """Values, bitmasks and row offsets are kept bit for bit."""

    weights = BitmapLinear.WEIGHTS
    MARKS = {"bitmask": "compressed-tensors' sparse-bitmask, or of headstart"}

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        expect, settings = checker(checkpoint.where), checkpoint.quantization
        for field in ("config_groups", "kv_cache_scheme", "transform_config"):
            what = "none: quantised weights under a bitmask are not read"
            expect(not settings.get(field), field, what, settings.get(field))
        self.files = CheckpointFiles(checkpoint.folder)
        self._prefix: dict[str, str] = {}  # of the compressed modules' tensors
        for name in self.files.names():
            prefix, _, field = name.rpartition(".")
            module = prefix.removesuffix(".weight")
            if field != "bitmask":
                continue
            if module in self._prefix:
                raise ValueError(
                    f"{self.files.path(name)}: {name}: expected one such tensor, got one in both spellings"
                )
            self._prefix[module] = prefix
        if not self._prefix:
            raise ValueError(f"{checkpoint.folder}: expected bitmask tensors, as the config says {FORMAT!r}, got none")
        sparsity = settings["sparsity_config"]
        ignore, targets = (sparsity.get(key) or [] for key in ("ignore", "targets"))
        for module, prefix in self._prefix.items():
            for field in FIELDS:
                if f"{prefix}.{field}" not in self.files:
                    where = self._where(module)
                    raise ValueError(f"{where}: {field}: expected a tensor beside bitmask; no file has it")
            if f"{module}.weight" in self.files:
                raise ValueError(f"{self._where(module)}: weight: expected no such tensor beside bitmask, got one")
            named = not any(matches(module, pattern) for pattern in ignore if pattern != "Linear")
            expect(named, "sparsity_config: ignore", f"no name of {module}, which is compressed", ignore)
            # A target may be the class of a module that is not linear. Names cannot tell classes.
            classes = not targets or any(not x.startswith("re:") and "." not in x for x in targets)
            named = classes or any(matches(module, pattern) for pattern in targets)
            expect(named, "sparsity_config: targets", f"one that names {module}", targets)

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        sparsity = checkpoint.quantization.get("sparsity_config")
        return isinstance(sparsity, Mapping) and sparsity.get("format") == FORMAT

    def names(self, skeleton: nn.Module) -> dict[str, str]:
        found, rename, tied = {}, renamer(skeleton), tied_weights(skeleton)
        for module in self._prefix:
            name = rename(f"{module}.weight").removesuffix(".weight")
            linear = isinstance(submodule(skeleton, name), nn.Linear) and f"{name}.weight" not in tied
            if linear and self._shrinks(module):
                found[name] = module
        return found

    def plain(self, names: Mapping[str, str]) -> dict[str, Any]:
        layers = set(names.values())
        taken = {f"{prefix}.{field}" for prefix in self._prefix.values() for field in FIELDS}
        taken |= {f"{layer}.bias" for layer in layers}
        plain = {name: self.files.slice(name) for name in self.files.names() if name not in taken}
        return plain | {f"{name}.weight": _Dense(self, name) for name in self._prefix if name not in layers}

    def _shrinks(self, module: str) -> bool:
        parts = {field: self.files.slice(f"{self._prefix[module]}.{field}") for field in FIELDS}
        size = {key: math.prod(x.get_shape()) * DTYPES[x.get_dtype()].itemsize for key, x in parts.items()}
        weights = math.prod(self.shape(module))
        dense = weights * DTYPES[self.dtype(module)].itemsize
        return size["compressed"] + size["bitmask"] + size["row_offsets"] < dense

    def weight(self, module: str) -> tuple[BitmapWeight, list[int]]:
        """A module's weight as rows, and its shape, which may have one dim."""
        tensors = {field: self.files.tensor(f"{self._prefix[module]}.{field}") for field in FIELDS}
        try:
            shape = tensors["shape"].tolist()
            if tensors["shape"].shape == (1,):
                tensors["shape"] = torch.tensor([1, *shape])
                tensors["bitmask"] = tensors["bitmask"].reshape(1, -1)
                tensors["row_offsets"] = tensors["row_offsets"].reshape(-1)
            dtype = str(tensors["compressed"].dtype).removeprefix("torch.")
            if dtype not in FLOATS:
                raise ValueError(f"compressed: expected one of {', '.join(FLOATS)}, got {dtype}")
            return BitmapWeight.from_compressed_tensors(tensors), shape
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{self._where(module)}: {error}") from None

    def read(self, name: str, linear: nn.Linear) -> BitmapLinear:
        weight, shape = self.weight(name)
        want = [linear.out_features, linear.in_features]
        if shape != want:
            raise ValueError(f"{self._where(name)}: shape: expected a weight of {want}, got one of {shape}")
        try:
            bias = read_bias(self.files, name, linear)
        except ValueError as error:
            raise ValueError(f"{self._where(name)}: {error}") from None
        weight = dataclasses.replace(weight, values=weight.values.to(linear.weight.dtype))
        layer = BitmapLinear.from_weight(weight, bias)
        layer.check(self._where(name))
        return layer

    def shape(self, module: str) -> list[int]:
        return self.files.tensor(f"{self._prefix[module]}.shape").tolist()

    def dtype(self, module: str) -> str:
        """As safetensors calls it."""
        return self.files.slice(f"{self._prefix[module]}.compressed").get_dtype()

    def _where(self, module: str) -> str:
        return f"{self.files.path(f'{self._prefix[module]}.bitmask')}: {module}"


class _Dense:
    """A compressed weight that is decompressed when transformers asks for its data."""

    def __init__(self, source: SparseBitmask, module: str):
        self._source, self._module = source, module

    def get_dtype(self) -> str:
        return self._source.dtype(self._module)

    def get_shape(self) -> list[int]:
        return self._source.shape(self._module)

    def __getitem__(self, index) -> torch.Tensor:
        weight, shape = self._source.weight(self._module)
        return weight.decompress().view(shape)[index]


def save_compressed_tensors(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes a model with `BitmapLinear` layers as a folder in compressed-tensors' format "sparse-bitmask".

    compressed-tensors up to 0.14.0.1 and `headstart.load` open it, to the same bits.

    Args:
        model: a transformers model, for example one that `headstart.load` opened from a folder of `headstart.prune`.
        folder: the folder to write. It is whole, or it is not there.

    Raises:
        ValueError: the model has no `BitmapLinear`, or the values of one are quantised, which the format does not know.
    """
    layers = {name: m for name, m in packed_layers(model).items() if isinstance(m, BitmapLinear)}
    if not layers:
        raise ValueError(f"save_compressed_tensors: model: expected BitmapLinear layers, got a {type(model).__name__}")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    inside = tuple(f"{name}." for name in layers)
    tensors = {
        name: x.contiguous()
        for name, x in model.state_dict().items()
        if name not in tied and not (name.startswith(inside) and not name.endswith(".bias"))
    }
    zeros = total = 0
    for name, layer in layers.items():
        try:
            parts = layer.weight_bitmap.to_compressed_tensors()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        tensors |= {f"{name}.{field}": x for field, x in parts.items()}
        count = layer.out_features * layer.in_features
        zeros, total = zeros + count - layer.nnz, total + count
    sparsity = {
        "format": FORMAT,
        "targets": list(layers),
        "ignore": [],
        "global_sparsity": zeros / total,
        "sparsity_structure": "unstructured",
    }

    def save(partial: Path) -> None:
        save_file(tensors, partial / FILE, {"format": "pt"})
        config = type(model.config).from_dict(model.config.to_dict())
        config.architectures, config.dtype = [type(model).__name__], model.dtype
        config.quantization_config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
        config.save_pretrained(partial)
        if model.can_generate():
            model.generation_config.save_pretrained(partial)

    write_whole_folder(folder, save)

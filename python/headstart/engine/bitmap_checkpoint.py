"""compressed-tensors' "sparse-bitmask" checkpoints, which that library itself no longer reads: opened and written.

A module is compressed if the files have its tensors, ``<module>.bitmask`` and its like, or ``<module>.weight.bitmask``
in older ones. Linear layers become `BitmapLinear`; what the model has no untied linear layer for (an embedding, a norm,
experts that transformers fuses), and a weight whose bitmap takes more bytes than itself, is decompressed as it is read.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .._checkpoint_files import DTYPES, FILE, CheckpointFiles
from .._files import write_whole_folder
from ..ops.bitmap import BitmapWeight
from .bitmap_linear import BitmapLinear
from .int4_checkpoint import matches, read_bias
from .quantizer import FLOATS, Waiting, submodule, tied_weights

FORMAT = "sparse-bitmask"
FIELDS = ("compressed", "bitmask", "shape", "row_offsets")


def is_sparse_bitmask(quantization: Mapping[str, Any]) -> bool:
    """Whether a config's ``quantization_config`` says that a folder is of this kind."""
    sparsity = quantization.get("sparsity_config")
    return isinstance(sparsity, Mapping) and sparsity.get("format") == FORMAT


class BitmapCheckpoint:
    """A folder's compressed layers, as the quantiser's source (`quantizer.py`).

    Args:
        folder: of safetensors files.
        quantization: the ``quantization_config`` of its config.json.

    Raises:
        ValueError or FileNotFoundError: naming the file and the field or tensor.
    """

    def __init__(self, folder: str | Path, quantization: Mapping[str, Any]):
        self._config = Path(folder) / "config.json"
        for field in ("config_groups", "kv_cache_scheme", "transform_config"):
            what = "none: quantised weights under a bitmask are not read"
            self._expect(not quantization.get(field), field, what, quantization.get(field))
        sparsity = quantization["sparsity_config"]
        ignore, targets = (sparsity.get(key) or [] for key in ("ignore", "targets"))
        self.files = CheckpointFiles(folder)
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
            raise ValueError(f"{folder}: expected bitmask tensors, as the config says {FORMAT!r}, got none")
        for module, prefix in self._prefix.items():
            for field in FIELDS:
                if f"{prefix}.{field}" not in self.files:
                    where = self._where(module)
                    raise ValueError(f"{where}: {field}: expected a tensor beside bitmask; no file has it")
            if f"{module}.weight" in self.files:
                raise ValueError(f"{self._where(module)}: weight: expected no such tensor beside bitmask, got one")
            named = not any(matches(module, pattern) for pattern in ignore if pattern != "Linear")
            self._expect(named, "sparsity_config: ignore", f"no name of {module}, which is compressed", ignore)
            # Classes other than Linear may be targets of what is no linear layer; they cannot be told from names.
            classes = not targets or any(not x.startswith("re:") and "." not in x for x in targets)
            named = classes or any(matches(module, pattern) for pattern in targets)
            self._expect(named, "sparsity_config: targets", f"one that names {module}", targets)

    def _expect(self, good: bool, field: str, expected: str, got: object) -> None:
        if not good:
            raise ValueError(f"{self._config}: quantization_config: {field}: expected {expected}, got {got!r}")

    def _where(self, module: str) -> str:
        return f"{self.files.path(f'{self._prefix[module]}.bitmask')}: {module}"

    def plain(self, model: nn.Module, rename: Callable[[str], str]) -> dict[str, Any]:
        """What transformers loads: tensors unread, and compressed ones that it decompresses by reading them."""
        layers = set(self.modules(model, rename).values())
        taken = {f"{prefix}.{field}" for prefix in self._prefix.values() for field in FIELDS}
        taken |= {f"{layer}.bias" for layer in layers}
        plain = {name: self.files.slice(name) for name in self.files.names() if name not in taken}
        return plain | {f"{name}.weight": _Dense(self, name) for name in self._prefix if name not in layers}

    def modules(self, model: nn.Module, rename: Callable[[str], str]) -> dict[str, str]:
        """The names of the compressed linear layers in the model and in the checkpoint."""
        found, tied = {}, tied_weights(model)
        for module in self._prefix:
            name = rename(f"{module}.weight").removesuffix(".weight")
            linear = isinstance(submodule(model, name), nn.Linear) and f"{name}.weight" not in tied
            if linear and self._shrinks(module):
                found[name] = module
        return found

    def _shrinks(self, module: str) -> bool:
        parts = {field: self.files.slice(f"{self._prefix[module]}.{field}") for field in FIELDS}
        size = {key: math.prod(x.get_shape()) * DTYPES[x.get_dtype()].itemsize for key, x in parts.items()}
        weights = math.prod(self.files.tensor(f"{self._prefix[module]}.shape").tolist())
        dense = weights * DTYPES[parts["compressed"].get_dtype()].itemsize
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

    def read(self, name: str, layer: Waiting) -> tuple[BitmapWeight, torch.Tensor | None]:
        """The weight and the bias of the layer of that name in the checkpoint; `layer` has the sizes that they have."""
        weight, shape = self.weight(name)
        want = [layer.out_features, layer.in_features]
        if shape != want:
            raise ValueError(f"{self._where(name)}: shape: expected a weight of {want}, got one of {shape}")
        try:
            bias = read_bias(self.files, name, layer)
        except ValueError as error:
            raise ValueError(f"{self._where(name)}: {error}") from None
        return dataclasses.replace(weight, values=weight.values.to(layer.dtype)), bias

    def __deepcopy__(self, memo) -> BitmapCheckpoint:
        return self  # transformers copies configs, and what hangs on them


class _Dense:
    """A compressed weight that is decompressed when transformers asks for its data."""

    def __init__(self, checkpoint: BitmapCheckpoint, module: str):
        self._checkpoint, self._module = checkpoint, module

    def get_dtype(self) -> str:
        prefix = self._checkpoint._prefix[self._module]
        return self._checkpoint.files.slice(f"{prefix}.compressed").get_dtype()

    def get_shape(self) -> list[int]:
        return self._checkpoint.files.tensor(f"{self._checkpoint._prefix[self._module]}.shape").tolist()

    def __getitem__(self, index) -> torch.Tensor:
        weight, shape = self._checkpoint.weight(self._module)
        return weight.decompress().view(shape)[index]


def save_compressed_tensors(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes a model's `BitmapLinear` layers as "sparse-bitmask", for compressed-tensors up to 0.14.0.1 and for
    `headstart.load`. Raises ValueError if a layer's values are quantised: the format has none."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BitmapLinear)}
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

"""GGUF files. Their packed layers stay packed, bit for bit; transformers tells how names and rows map to its models.

Which tensor is which weight, and how llama.cpp's converter changed it, stands in transformers'
`modeling_gguf_pytorch_utils`: it reorders the rows of Llama's queries and keys, and adds one to Gemma's norms. What it
does to a weight's rows is tried on their numbers. If the rows only change places, packed rows change places too.
Otherwise the weight becomes a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from ..._expect import expect_value
from ...ops.int4_gemm import Int4Weight
from ...reference.gguf import KINDS
from ..gguf_file import GgufFile
from ..int4_linear import Int4Linear
from ..place import OWN, parameters_at, tied_embedding
from .source import Checkpoint, Source


class Gguf(Source):
    NOT_STREAMED = (
        "a GGUF file",
        "weights are streamed from safetensors as they lie there: save the model with save_pretrained, and load that "
        "folder",
    )
    weights = Int4Linear.WEIGHTS
    default_dtype = torch.bfloat16
    strict = False  # such files have tensors that a model computes itself, such as rope_freqs

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.gguf is not None

    @property
    def file(self) -> GgufFile:
        return self.checkpoint.gguf_file

    @property
    def BY_TRANSFORMERS(self) -> bool:  # noqa: N802
        """For some architectures, and in a later release perhaps for all, transformers keeps its tables to itself."""
        return _tables() is None or self.file.architecture in _other_architectures()

    def arguments(self, dtype: torch.dtype | None) -> dict[str, Any]:
        return {
            "gguf_file": self.checkpoint.gguf,
            "config": self.config,  # or the file's header would be read once more
            "quantization_config": transformers.GgufConfig(dequantize=True),
            "dtype": dtype or self.default_dtype,
        }

    def names(self, skeleton: nn.Module) -> dict[str, str]:
        tables = _tables()
        kind = tables.TENSOR_PROCESSORS.get(self.file.architecture, tables.TensorProcessor)
        self._processor = kind(config=self.config.get_text_config().to_dict())
        # The names in the model, by tensor.
        self._mapping = tables.get_gguf_hf_weights_map(_Names(skeleton), self._processor)
        self._rows: dict[str, torch.Tensor | None] = {}  # by packed tensor, the order of its rows if that changes
        self._replaced: dict[str, list[str]] = {}  # by packed layer
        if not self.checkpoint.packed:
            return {}
        found = {}
        for tensor, weight in self._mapping.items():
            name = self._name(skeleton, weight) if tensor in self.file.tensors else None
            if name is not None and self._is_packed(tensor):
                found[name] = tensor
                self._replaced[name] = parameters_at(skeleton, name)
        return found

    def _name(self, skeleton: nn.Module, weight: str) -> str | None:
        """What a packed layer with this weight is called in the model (`place.py`), or None if it can have none."""
        name = weight.removesuffix(".weight")
        kind = type(skeleton.get_submodule(name)) if name != weight else None
        if kind is nn.Linear:
            return name
        if kind is None or not issubclass(kind, nn.Embedding):
            return None
        linears = (x for x, module in skeleton.named_modules() if type(module) is nn.Linear)
        head = next((x for x in linears if tied_embedding(skeleton, x) == name), None)
        return f"{name}{OWN}" if head is None and kind is nn.Embedding else head

    def _is_packed(self, tensor: str) -> bool:
        entry = self.file.tensors[tensor]
        if entry.kind not in KINDS or len(entry.shape) != 2:
            return False
        numbers = torch.arange(entry.shape[0])
        try:
            moved = self._process(tensor, numbers.double()[:, None].repeat(1, 2), {"tensors": {}})
        except (ValueError, KeyError, TypeError):
            return False  # it needs the weight's own shape
        if moved is None or moved.shape != (len(numbers), 2) or not torch.equal(moved[:, 0], moved[:, 1]):
            return False
        rows = moved[:, 0].long()
        if not torch.equal(rows.sort().values, numbers):
            return False
        self._rows[tensor] = None if torch.equal(rows, numbers) else rows
        return True

    def _process(self, tensor: str, values: torch.Tensor, parsed: dict[str, dict]) -> torch.Tensor | None:
        """What transformers makes of a tensor; None if it belongs nowhere, or went into `parsed` under other names."""
        options = {"tensor_key_mapping": self._mapping, "parsed_parameters": parsed}
        made = self._processor.process(weights=values.numpy(), name=tensor, **options)
        return None if made.name is None else torch.from_numpy(made.weights.copy())

    def plain(self, names: Mapping[str, str]) -> dict[str, Any]:
        packed = {tensor for name, tensor in names.items() if self._mapping[tensor] in self._replaced[name]}
        biases = {self._mapping[x].removesuffix("weight") + "bias": x for x in packed}
        self._biases: dict[str, _Later] = {}  # by packed tensor
        parsed: dict[str, dict] = {"tensors": {}}
        for tensor in self.file.tensors:
            name = self._mapping.get(tensor)
            if tensor in packed:
                continue
            if name is None:  # experts go into `parsed`; what the model has no place for is dropped
                self._process(tensor, self.file.tensor(tensor).float(), parsed)
            elif name in biases:
                self._biases[biases[name]] = _Later(lambda tensor=tensor: self._plain(tensor))
            else:
                parsed["tensors"][name] = _Later(lambda tensor=tensor: self._plain(tensor))
        return parsed["tensors"]

    def _plain(self, tensor: str) -> torch.Tensor:
        return self._process(tensor, self.file.tensor(tensor).float(), {"tensors": {}})

    def read(self, name: str, linear: nn.Module) -> Int4Linear:
        entry, want = self.file.tensors[name], tuple(linear.weight.shape)
        expect_value(entry.shape == want, self.file.path, f"{name}: shape", f"{list(want)}", list(entry.shape))
        rows, order = self.file.rows(name), self._rows[name]
        weight = Int4Weight.from_gguf(rows if order is None else rows[order], entry.kind)
        bias = self._biases.get(name)
        has, wants = bias is not None, getattr(linear, "bias", None) is not None
        expect_value(
            has == wants, self.file.path, f"{name}: bias", "one" if wants else "none", "one" if has else "none"
        )
        layer = Int4Linear.from_weight(weight, bias[...].to(linear.weight.dtype) if has else None)
        layer.check(f"{self.file.path}: {name}")
        return layer


class _Later:
    """A tensor that [...] reads, when transformers places it."""

    def __init__(self, read: Callable[[], torch.Tensor]):
        self._read = read

    def __getitem__(self, _) -> torch.Tensor:
        return self._read()


class _Names:
    """What `get_gguf_hf_weights_map` asks of a model, but the base model is the only submodule.

    For each submodule it builds a table again, which takes 30 ms. The smaller ones have no new names.
    """

    def __init__(self, model: nn.Module, inner: bool = True):
        self.config, self.state_dict = model.config, model.state_dict
        self._children = [(model.base_model_prefix, _Names(model.base_model, False))] if inner else []

    def named_children(self) -> list:
        return self._children


def _tables():
    """The module of transformers that has the names and changes of weights; None if this release has no such module."""
    try:
        from transformers import modeling_gguf_pytorch_utils as tables
    except ImportError:
        return None
    needed = ("TENSOR_PROCESSORS", "TensorProcessor", "get_gguf_hf_weights_map")
    return tables if all(hasattr(tables, name) for name in needed) else None


def _other_architectures() -> frozenset[str]:
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:
        return frozenset()
    return frozenset(GGUF_CONFIG_ARCHS)

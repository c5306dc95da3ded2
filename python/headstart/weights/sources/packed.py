"""Packed layers of other makers: what their formats share.

A layer is packed if the files have its packed tensors; lists of exceptions in the config must not contradict that.
Every setting that changes what the tensors mean is read, or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..._expect import checker
from ...ops.int4_gemm import Int4Weight
from ..files import CheckpointFiles
from ..int4_linear import Int4Linear
from ..names import renamer, submodule, tied_weights
from .source import Checkpoint, Source, read_bias

Read = Callable[[dict[str, torch.Tensor]], Int4Weight]


class Int4Source(Source):
    """int4 layers, with codes and scales bit for bit.

    A format adds `plan`, and checks its settings in ``check``.
    """

    weights = Int4Linear.WEIGHTS
    METHOD: str  # the quant_method
    FIELDS: tuple[str, ...]  # of a packed layer's tensors
    OPTIONAL: tuple[str, ...] = ()  # of these, what a layer may lack

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        self.expect, self.settings = checker(checkpoint.where), checkpoint.quantization
        self.check()
        self.files = CheckpointFiles(checkpoint.folder)
        self._fields: dict[str, list[str]] = {}  # by layer
        for name in self.files.names():
            layer, _, field = name.rpartition(".")
            if field in self.FIELDS:
                self._fields.setdefault(layer, []).append(field)
        if not self._fields:
            wanted = f"{self.FIELDS[0]} tensors, as {checkpoint.settings.name} says {self.METHOD!r}"
            raise ValueError(f"{checkpoint.folder}: expected {wanted}, got none")
        self._reads: dict[str, Read] = {}
        for layer, fields in self._fields.items():
            try:
                for field in self.FIELDS:
                    if field not in fields and field not in self.OPTIONAL:
                        raise ValueError(f"{field}: expected a tensor beside {', '.join(fields)}; no file has it")
                self._reads[layer] = self.plan(layer, fields)
            except ValueError as error:
                raise ValueError(f"{self._where(layer)}: {error}") from None

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == cls.METHOD

    def check(self) -> None:
        """Raises for settings that no layer can have."""

    def plan(self, layer: str, fields: Collection[str]) -> Read:
        """What makes a weight of a layer's tensors; raises ValueError for settings that do not fit them."""
        raise NotImplementedError

    def names(self, skeleton: nn.Module) -> dict[str, str]:
        found, rename, tied = {}, renamer(skeleton), tied_weights(skeleton)
        for layer in self._fields:
            name = rename(f"{layer}.weight").removesuffix(".weight")
            if not isinstance(submodule(skeleton, name), nn.Linear):
                raise ValueError(
                    f"{self._where(layer)}: expected a linear layer of {type(skeleton).__name__}, which has none of "
                    f"this name (in the model it would be {name}; experts that transformers fuses are not read)"
                )
            if f"{name}.weight" in tied:
                raise ValueError(
                    f"{self._where(layer)}: expected a plain weight, since it is tied to another, got an int4 one; if "
                    f'the two are apart in this checkpoint, write "tie_word_embeddings": false into '
                    f"{self.folder / 'config.json'}"
                )
            found[name] = layer
        return found

    def plain(self, names: Mapping[str, str]) -> dict[str, Any]:
        taken = {f"{layer}.{field}" for layer, fields in self._fields.items() for field in (*fields, "bias")}
        return {name: self.files.slice(name) for name in self.files.names() if name not in taken}

    def read(self, name: str, linear: nn.Linear) -> Int4Linear:
        try:
            weight = self._reads[name]({f: self.files.tensor(f"{name}.{f}") for f in self._fields[name]})
            want = linear.out_features, linear.in_features
            if weight.shape != want:
                got = list(weight.shape)
                raise ValueError(f"{self._fields[name][0]}: expected a weight of {list(want)}, got one of {got}")
            layer = Int4Linear.from_weight(weight, read_bias(self.files, name, linear))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{self._where(name)}: {error}") from None
        layer.check(self._where(name))
        return layer

    def _where(self, layer: str) -> str:
        return f"{self.files.path(f'{layer}.{self._fields[layer][0]}')}: {layer}"

    def expect_group_size(self, field: str, size: object) -> None:
        good = type(size) is int and (size == -1 or (size > 0 and size % 32 == 0))
        self.expect(good, field, "a multiple of 32, or -1 (a whole row)", size)

"""The safetensors files of a model's folder, whole or in shards; a tensor is read when it is asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_safetensors(path: str | os.PathLike) -> safe_open:
    """Raises FileNotFoundError or ValueError, naming the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a file, which {INDEX} names; it is missing")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


class CheckpointFiles:
    """Raises ValueError or FileNotFoundError for what is missing, cut short, or not as the index says."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._files: dict[str, tuple[Path, safe_open]] = {}  # by tensor
        shards = self._shards()
        for path, expected in shards.items():
            file = open_safetensors(path)
            names = set(file.keys())
            if missing := sorted(set(expected) - names):
                raise ValueError(f"{path}: {missing[0]}: expected a tensor, as {INDEX} says; the file has none")
            self._files |= dict.fromkeys(names, (path, file))

    def _shards(self) -> dict[Path, list[str]]:
        """The files, and the tensors that each must have."""
        if (self.folder / FILE).is_file():
            return {self.folder / FILE: []}
        index = self.folder / INDEX
        if index.is_file():
            try:
                shards: dict[Path, list[str]] = {}
                for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                    shards.setdefault(self.folder / Path(file).name, []).append(name)
                return shards
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{index}: weight_map: expected tensors and their files, got {error!r}") from None
        single = sorted(self.folder.glob("*.safetensors"))
        if len(single) == 1:  # AutoGPTQ names it after the settings
            return {single[0]: []}
        raise FileNotFoundError(f"{self.folder}: expected {FILE} or {INDEX}, got neither")

    def __deepcopy__(self, memo) -> CheckpointFiles:
        return self  # transformers copies configs, and what hangs on them

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        return sorted(self._files)

    def path(self, name: str) -> Path:
        return self._files[name][0]

    def slice(self, name: str):
        """What transformers reads when it places the tensor: it has a dtype and a shape, and [...] gives the data."""
        return self._files[name][1].get_slice(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._files[name][1].get_tensor(name)

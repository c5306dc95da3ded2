"""What every format of checkpoints answers: `Source`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..._expect import checker
from ..._files import read_json_object
from ..config import PLAIN
from ..files import CheckpointFiles, Stored
from ..gguf_file import GgufFile
from ..packed_linear import PackedLinear

CONFIG = "config.json"
KEYS = ("quantization_config", "compression_config")  # the second is compressed-tensors' of old
# Where makers of int4 weights put their settings before config.json had a place for them.
SETTINGS_FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq"}
AWQ_WORDS = ("w_bit", "q_group_size", "zero_point")  # in a file of either name


class Checkpoint:
    """A folder, and what its files say about it; each is read when it is first asked for."""

    def __init__(self, folder: Path, gguf: str | None = None, packed: bool = True):
        self.folder, self.gguf = folder, gguf  # the name of the GGUF file, if the model is in one
        self.packed = packed  # whether a GGUF's packed weights stay so

    @cached_property
    def gguf_file(self) -> GgufFile:
        return GgufFile(self.folder / self.gguf)

    @cached_property
    def config(self):
        """Without the settings of packed weights."""
        return self._read[0]

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """The settings of packed weights; empty if nothing is packed."""
        return self._read[1]

    @cached_property
    def settings(self) -> Path:
        """The file that has the settings."""
        return self._read[2]

    @property
    def where(self) -> str:
        """What messages about a setting begin with."""
        return f"{self.settings}: quantization_config" if self.settings.name == CONFIG else f"{self.settings}"

    @cached_property
    def _read(self) -> tuple[Any, dict[str, Any], Path]:
        found, path = None, self.folder / CONFIG
        if self.gguf is None:
            content = read_json_object(path)
            for key in KEYS:
                value = content.get(key)
                checker(path)(value is None or isinstance(value, dict), key, "an object", value)
            config = transformers.AutoConfig.from_pretrained(self.folder)
        else:
            config = self.gguf_file.config()
        for part in (config, config.get_text_config()):
            for key in KEYS:
                value = vars(part).pop(key, None)
                found = found or value
        name = next((name for name in SETTINGS_FILES if (self.folder / name).is_file()), None)
        if not found and name is not None and self.gguf is None:
            path = self.folder / name
            found = _read_settings(path)
        return config, without_nulls(found or {}), path


def _read_settings(path: Path) -> dict[str, Any]:
    content = read_json_object(path)
    method = "awq" if any(word in content for word in AWQ_WORDS) else SETTINGS_FILES[path.name]
    return {"quant_method": method} | without_nulls(content)


def without_nulls(content: Any) -> Any:
    """The same without keys whose value is null: some makers write null for what others leave out."""
    if isinstance(content, Mapping):
        return {key: without_nulls(value) for key, value in content.items() if value is not None}
    return content


class Source:
    """A checkpoint that was opened, as `model/load.py` uses it. Nothing here calls back.

    A format is a subclass in a file of its own and its line in `FORMATS` (`__init__.py`). It is asked in this order:

    - ``recognises(checkpoint)``: whether a folder is of this format;
    - the constructor opens it: it reads settings and headers of files, and refuses by name what it would misread;
    - ``names(skeleton)``: which layers of the model `read` gives (`place.py`), with their names in the checkpoint;
    - ``plain(names)``: the tensors that transformers loads, by their names in the checkpoint;
    - ``read(name, linear)``: one packed layer after another; `linear` is the model's own, without data. It is an
      embedding where that is packed by itself.

    If it says `BY_TRANSFORMERS`, transformers reads the files with ``arguments(dtype)``, and the last three are not
    asked. For a model larger than memory, ``stream()`` tells where each tensor lies in the files.

    Each raises ValueError or FileNotFoundError that names the file and the field or tensor.
    """

    BY_TRANSFORMERS = False  # whether transformers reads the files
    weights = PLAIN  # the kind of the layers that `read` gives
    default_dtype: torch.dtype | None = None  # of what is not packed, if the files do not say it
    MARKS: Mapping[str, str] = {}  # fields that only packed layers have, and who makes them
    # What weights are called that `stream` cannot give, and what to do about it; None if it can.
    NOT_STREAMED: tuple[str, str] | None = (
        "packed weights of another maker",
        "weights are streamed as they lie in the file: load it without, save it with save_pretrained as headstart's "
        "own, and load that folder",
    )

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.folder = checkpoint, checkpoint.folder

    @property
    def origin(self) -> Path:
        """What messages about the whole begin with: the folder, or the file if the model is in one."""
        return self.folder if self.checkpoint.gguf is None else self.folder / self.checkpoint.gguf

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        raise NotImplementedError

    @property
    def config(self):
        return self.checkpoint.config

    @property
    def strict(self) -> bool:
        """Whether a tensor that the model has no place for is an error."""
        return bool(self.checkpoint.quantization)

    def arguments(self, dtype: torch.dtype | None) -> dict[str, Any]:
        return {"dtype": dtype or "auto"}

    def names(self, skeleton: nn.Module) -> dict[str, str]:
        raise NotImplementedError

    def plain(self, names: Mapping[str, str]) -> dict[str, Any]:
        raise NotImplementedError

    def read(self, name: str, linear: nn.Module) -> PackedLinear:
        raise NotImplementedError

    def stream(self) -> dict[str, Stored]:
        raise NotImplementedError


def read_bias(files: CheckpointFiles, name: str, linear: nn.Linear) -> torch.Tensor | None:
    """Of a packed layer; `linear` is the model's own in its place."""
    stored = files.tensor(f"{name}.bias") if f"{name}.bias" in files else None
    if linear.bias is not None:
        if stored is None or stored.shape != (linear.out_features,):
            got = "none" if stored is None else list(stored.shape)
            raise ValueError(f"bias: expected [{linear.out_features}], got {got}")
        return stored.to(linear.weight.dtype)
    if stored is not None and stored.count_nonzero() > 0:  # GPTQ's tools write zeros for layers without a bias
        raise ValueError("bias: expected none, as the model has none, or zeros")
    return None

"""The safetensors files of a model's folder, whole or in shards: read tensor by tensor, written layer by layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PADDING = "headstart.padding."  # and a number: tensors that only fill space
PAGE = 4096  # what direct reads of a file ask of offsets, lengths and addresses
CACHE_LINE = 64
ENTRY_BYTES = 256  # more than the header says of a tensor besides its name


def open_safetensors(path: str | os.PathLike) -> safe_open:
    """Raises FileNotFoundError or ValueError, naming the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a file, which {INDEX} names; it is missing")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


class CheckpointFiles:
    """Names leave out a `LayeredFile`'s padding.

    Raises ValueError or FileNotFoundError for what is missing, cut short, or not as the index says.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._files: dict[str, tuple[Path, safe_open]] = {}  # by tensor
        shards = self._shards()
        for path, expected in shards.items():
            file = open_safetensors(path)
            names = set(file.keys())
            if missing := sorted(set(expected) - names):
                raise ValueError(f"{path}: {missing[0]}: expected a tensor, as {INDEX} says; the file has none")
            self._files |= dict.fromkeys((name for name in names if not name.startswith(PADDING)), (path, file))

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

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        return sorted(self._files)

    def paths(self) -> list[Path]:
        return sorted({path for path, _ in self._files.values()})

    def path(self, name: str) -> Path:
        return self._files[name][0]

    def slice(self, name: str):
        """What transformers reads when it places the tensor: it has a dtype and a shape, and [...] gives the data."""
        return self._files[name][1].get_slice(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._files[name][1].get_tensor(name)


class LayeredFile:
    """Writes a safetensors file in which every layer can be read in one piece, one layer after another::

        | length, header, spaces | not of a layer, padding | layer 0, padding | layer 1, padding | ...
        0                        a                         b                  c        a, b, c: multiples of 4096

    The groups stand in the order in which they are added: first what belongs to no layer (embedding, last norm, output
    layer), then each decoder layer, ``model.layers.3.`` and all that follows, as one. A group begins at a multiple of
    `PAGE` bytes in the file and ends at one, so it is one aligned read. Inside, tensors whose bytes are whole cache
    lines come first and begin at multiples of 64 bytes, then the others, larger elements before smaller ones, so every
    element is aligned to its size. The format knows no holes: what fills a group up to its end is an uint8 tensor
    ``headstart.padding.<number of the group>``, where any is needed. The header's room is reserved from the names and
    what it leaves is spaces, as the format allows, so no more than a group need be in memory.

    A context manager: the header is written on leaving it. The file is not whole before, so write it under a name that
    is not yet the file's (`_files.py`).

    Args:
        path: of the file.
        names: of all the tensors that may be added; more than are added costs only bytes of the header.
    """

    def __init__(self, path: str | os.PathLike, names: Iterable[str]):
        names = list(names)
        room = sum(len(json.dumps(name)) + ENTRY_BYTES for name in names)
        paddings = (len(names) + 1) * (len(PADDING) + ENTRY_BYTES)  # a group has at least one tensor
        self._start = _aligned(8 + ENTRY_BYTES + room + paddings, PAGE)
        self._names, self._header, self._groups = set(names), {"__metadata__": {"format": "pt"}}, 0
        self._file = open(path, "wb")
        self._file.seek(self._start)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes a group: what belongs to no layer at first, then a layer at a time."""
        if unknown := sorted(set(tensors) - self._names):
            raise ValueError(f"LayeredFile: expected the names given before, each once, got {unknown[0]}")
        self._names -= set(tensors)

        def order(name: str) -> tuple:
            x = tensors[name]
            whole = x.nbytes % CACHE_LINE == 0
            return not whole, 0 if whole else -x.element_size(), name

        for name in sorted(tensors, key=order):
            self._write(name, tensors[name])
        end = self._file.tell()
        if fill := _aligned(end, PAGE) - end:
            self._write(f"{PADDING}{self._groups}", torch.zeros(fill, dtype=torch.uint8))
        self._groups += 1

    def _write(self, name: str, x: torch.Tensor) -> None:
        first = self._file.tell() - self._start
        if x.numel():
            self._file.write(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        dtype = next(key for key, dtype in DTYPES.items() if dtype == x.dtype)
        offsets = [first, self._file.tell() - self._start]
        self._header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": offsets}

    def __enter__(self) -> LayeredFile:
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self._file:
            if kind is None:
                header = json.dumps(self._header, separators=(",", ":")).encode()
                length = self._start - 8
                assert len(header) <= length, (len(header), length)
                self._file.seek(0)
                self._file.write(length.to_bytes(8, "little") + header.ljust(length))


def _aligned(offset: int, step: int) -> int:
    return -(-offset // step) * step


class Stored(NamedTuple):
    """A tensor where it lies in a file: bytes [begin, end)."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def stored_tensors(path: str | os.PathLike) -> dict[str, Stored]:
    """Where every tensor of a safetensors file lies, by name and without a `LayeredFile`'s padding.

    Raises FileNotFoundError or ValueError, naming the file, as `open_safetensors` does.
    """
    open_safetensors(path)  # checks that offsets, shapes and the file's size agree
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__" or name.startswith(PADDING):
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name}: expected a dtype of {', '.join(DTYPES)}, got {entry['dtype']}")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = Stored(Path(path), DTYPES[entry["dtype"]], tuple(entry["shape"]), begin, end)
    return found

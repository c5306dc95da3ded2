"""GGUF files: what the header says, and where the tensors lie. Nothing but the header is read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package gguf names the kinds of tensors and
their block sizes. Its own reader makes an object of every word of the vocabulary, which takes seconds::

    | magic, version, counts | key, type, value ... | name, sizes, kind, offset ... | padding | data of the tensors |
"""

from __future__ import annotations

import math
import mmap
import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from .._expect import fail
from ..reference.gguf import KINDS, dequantize

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ARCHITECTURE, ALIGNMENT = "general.architecture", "general.alignment"
TOKENIZER, VOCABULARY = "tokenizer.", "tokenizer.ggml.tokens"
MOST_SIZES = 4
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Count(int):
    """The length of an array that was not read."""


class GgufTensor(NamedTuple):
    kind: str  # as the package gguf names it, such as "Q4_K"
    shape: tuple[int, ...]  # in torch's order: the last is contiguous
    begin: int
    end: int  # bytes [begin, end) of the file


class GgufFile:
    """Raises ValueError, naming the file and the field, for what is damaged, cut short or unknown."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                self._fail("magic", "GGUF", "an empty file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    self._read_header(data, size)
                except (struct.error, UnicodeDecodeError, OverflowError) as error:
                    self._fail("header", "a whole one", str(error))

    @property
    def architecture(self) -> str:
        return self.metadata[ARCHITECTURE]

    def rows(self, name: str) -> torch.Tensor:
        """The bytes of a tensor [rows, bytes of a row]. They are mapped: what is not used is not read."""
        tensor = self.tensors[name]
        whole = torch.from_file(str(self.path), size=tensor.end, dtype=torch.uint8)
        return whole[tensor.begin :].view(math.prod(tensor.shape[:-1]), -1)

    def tensor(self, name: str) -> torch.Tensor:
        """The values of a tensor, in float32 if it has blocks.

        Raises ValueError if the package gguf cannot dequantise its kind.
        """
        import gguf

        tensor, rows = self.tensors[name], self.rows(name)
        if tensor.kind in PLAIN:
            return rows.clone().view(PLAIN[tensor.kind]).view(tensor.shape)
        if tensor.kind in KINDS:  # faster than the package
            return dequantize(tensor.kind, rows).view(tensor.shape)
        try:
            values = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[tensor.kind])
        except NotImplementedError:
            self._fail(f"{name}: kind", "one that the package gguf can dequantise", tensor.kind)
        return torch.from_numpy(values).view(tensor.shape)

    def config(self):
        """The model's config, as transformers makes it of the settings.

        Raises ValueError if it does not know the architecture.
        """
        import transformers

        with tempfile.TemporaryDirectory() as folder:
            self._write_short(Path(folder) / self.path.name)
            try:
                config = transformers.AutoConfig.from_pretrained(folder, gguf_file=self.path.name)
            except (ValueError, KeyError) as error:
                reason = f"{self.architecture!r} (transformers says: {str(error).splitlines()[0]})"
                self._fail(ARCHITECTURE, "one that transformers opens", reason)
        config.name_or_path = str(self.path.parent)
        if f"{self.architecture}.vocab_size" not in self.metadata and VOCABULARY in self.metadata:
            config.get_text_config().vocab_size = int(self.metadata[VOCABULARY])
        return config

    def _write_short(self, path: Path) -> None:
        """Writes a file with the same settings and names of tensors, but no data, and no lists of the tokenizer.

        transformers may read a file with the package gguf, which is slow with long lists.
        """
        parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(self.tensors), len(self._short)), *self._short]
        for name in self.tensors:
            parts.append(struct.pack("<Q", len(name.encode())) + name.encode() + struct.pack("<IQIQ", 1, 1, 0, 0))
        header = b"".join(parts)
        path.write_bytes(header.ljust(-(-len(header) // 4096) * 4096, b"\0") + bytes(4096))

    # --- the header ---

    def _read_header(self, data: mmap.mmap, size: int) -> None:
        if data[:4] != MAGIC:
            self._fail("magic", "GGUF", data[:4])
        version, tensors, settings = struct.unpack_from("<IQQ", data, 4)
        if version not in VERSIONS:
            self._fail("version", " or ".join(map(str, VERSIONS)), version)
        at = 24
        self.metadata: dict[str, Any] = {}
        self._short: list[bytes] = []  # the settings of `_write_short`, as they lie in the file
        for _ in range(settings):
            begin = at
            key, at = self._string(data, at)
            self.metadata[key], at = self._value(data, at + 4, *struct.unpack_from("<I", data, at), key)
            if not (key.startswith(TOKENIZER) and isinstance(self.metadata[key], (list, Count))):
                self._short.append(data[begin:at])
        if not isinstance(self.metadata.get(ARCHITECTURE), str):
            self._fail(ARCHITECTURE, "a name", self.metadata.get(ARCHITECTURE))
        places = {}
        for _ in range(tensors):
            name, at = self._string(data, at)
            places[name], at = self._place(data, at, name)
        alignment = self.metadata.get(ALIGNMENT, 32)
        if type(alignment) is not int or alignment <= 0 or alignment > 2**20:
            self._fail(ALIGNMENT, "1 to 1048576", alignment)
        start = -(-at // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, (kind, shape, offset, length) in places.items():
            end = start + offset + length
            if end > size:
                self._fail(name, f"data up to byte {end}", f"a file of {size} bytes: it is cut short")
            self.tensors[name] = GgufTensor(kind, shape, start + offset, end)

    def _place(self, data: mmap.mmap, at: int, name: str) -> tuple[tuple[str, tuple[int, ...], int, int], int]:
        """(kind, shape, offset, bytes) of a tensor, and where the next one's entry begins."""
        import gguf

        (count,) = struct.unpack_from("<I", data, at)
        if not 0 < count <= MOST_SIZES:
            self._fail(f"{name}: dimensions", f"1 to {MOST_SIZES}", count)
        shape = tuple(reversed(struct.unpack_from(f"<{count}Q", data, at + 4)))
        number, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * count)
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            self._fail(f"{name}: kind", "one that the package gguf knows", number)
        if 0 in shape or shape[-1] % block:
            self._fail(f"{name}: shape", f"rows of whole blocks of {block}, as {kind.name} has", list(shape))
        return (kind.name, shape, offset, math.prod(shape) // block * block_bytes), at + 16 + 8 * count

    def _string(self, data: mmap.mmap, at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", data, at)
        end = at + 8 + length
        if end > len(data):
            self._fail("header", f"text up to byte {end}", f"a file of {len(data)} bytes")
        return data[at + 8 : end].decode(), end

    def _value(self, data: mmap.mmap, at: int, kind: int, key: str) -> tuple[Any, int]:
        """A value, and where it ends. Of an array of texts, only the length is kept."""
        if kind == STRING:
            return self._string(data, at)
        if kind in NUMBERS:
            number = struct.Struct(f"<{NUMBERS[kind]}")
            return number.unpack_from(data, at)[0], at + number.size
        if kind != ARRAY:
            self._fail(f"{key}: type", "a number, a text or an array", kind)
        element, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if element in NUMBERS:
            form = f"<{count}{NUMBERS[element]}"
            if count > len(data):
                self._fail(key, "an array within the file", f"{count} numbers")
            return list(struct.unpack_from(form, data, at)), at + struct.calcsize(form)
        if element != STRING:
            self._fail(f"{key}: type", "an array of numbers or texts", element)
        for _ in range(count):
            at += 8 + struct.unpack_from("<Q", data, at)[0]
        return Count(count), at

    def _fail(self, field: str, expected: str, got: Any) -> NoReturn:
        fail(self.path, field, expected, got)

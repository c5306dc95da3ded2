"""Which bytes of which files a streamed model reads, and what of it a memory budget lets stay in memory.

A *part* is what is read in one go: the tensors of a decoder layer, or those that belong to none. In its buffer it looks
as in its file, page by page, so that a read needs no copy and a tensor is a view::

    file     ...|page    |page    |page    |page    |...      page: 4096 bytes
                    |<- tensors of the layer ->|
    buffer      |page    |page    |page    |page    |

Where a layer's tensors lie apart, as in files that are sorted by dtype, a part is several such extents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..weights.files import PAGE, Stored

GAP = 128 << 10  # bytes between two tensors that are rather read than skipped
MIN_DEPTH = 2  # a layer in use, and one being read
UNITS = {"": 1, "B": 1}
UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def parse_budget(budget: int | str) -> int:
    """Bytes of a number of them, or of a text such as "2GiB" (1024 ** 3) or "1.5 GB" (1000 ** 3)."""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        unit = next((u for u in UNITS if match and u.lower() == match[2].lower()), None)
        if unit is not None:
            return int(float(match[1]) * UNITS[unit])
    elif type(budget) is int and budget >= 0:
        return budget
    raise ValueError(f'load: memory_budget: expected bytes, or a text such as "2GiB" or "500MB", got {budget!r}')


class StreamedTensor(NamedTuple):
    """A tensor of the files, and what it becomes."""

    key: str  # in the files
    name: str  # of the parameter, in the model
    stored: Stored
    dtype: torch.dtype
    converted: bool = False  # by transformers, which makes a parameter of it and others


class Place(NamedTuple):
    """Where a tensor lies in its part's buffer."""

    position: int
    tensor: StreamedTensor

    @property
    def is_view(self) -> bool:
        """Else it is copied out of the buffer: cast, or because its elements are not aligned in the file."""
        key, name, stored, dtype, converted = self.tensor
        return dtype == stored.dtype and self.position % dtype.itemsize == 0 and not converted

    @property
    def nbytes(self) -> int:
        return math.prod(self.tensor.stored.shape) * self.tensor.dtype.itemsize

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor in a buffer (uint8 [bytes]), or a copy."""
        stored = self.tensor.stored
        raw = buffer[self.position : self.position + stored.end - stored.begin]
        if self.position % stored.dtype.itemsize:
            raw = raw.clone()
        return raw.view(stored.dtype).view(stored.shape).to(self.tensor.dtype)


@dataclass(frozen=True)
class Part:
    name: str
    extents: list[tuple[str, int, int, int]]  # file, begin, end, position in the buffer
    places: list[Place]

    @classmethod
    def of(cls, name: str, tensors: Iterable[StreamedTensor]) -> Part:
        extents: list[tuple[str, int, list[StreamedTensor]]] = []  # file, end, what lies in it
        places = []
        for tensor in sorted(tensors, key=lambda t: (str(t.stored.path), t.stored.begin)):
            path, begin, end = str(tensor.stored.path), tensor.stored.begin, tensor.stored.end
            if begin == end:
                places.append(Place(0, tensor))
            elif extents and extents[-1][0] == path and begin <= extents[-1][1] + GAP:
                extents[-1] = path, max(end, extents[-1][1]), [*extents[-1][2], tensor]
            else:
                extents.append((path, end, [tensor]))
        at, found = 0, []
        for path, end, inside in extents:
            begin = inside[0].stored.begin // PAGE * PAGE
            found.append((path, begin, end, at))
            places += [Place(at + tensor.stored.begin - begin, tensor) for tensor in inside]
            at += _whole_pages(end - begin)
        return cls(name, found, places)

    @property
    def buffer_bytes(self) -> int:
        return sum(_whole_pages(end - begin) for _, begin, end, _ in self.extents)

    @property
    def read_bytes(self) -> int:
        return sum(end - begin for _, begin, end, _ in self.extents)

    @property
    def copied_bytes(self) -> int:
        """What is needed besides the buffer while the part is in use."""
        return sum(place.nbytes for place in self.places if not place.is_view)

    @property
    def resident_bytes(self) -> int:
        """What the part takes when it stays: the buffer, unless nothing of it is used as it lies there."""
        views = any(place.is_view for place in self.places)
        return self.buffer_bytes * views + self.copied_bytes


def _whole_pages(count: int) -> int:
    return -(-count // PAGE) * PAGE


@dataclass(frozen=True)
class Plan:
    """What is streamed, and how many bytes of memory weights and buffers take in all."""

    streamed: tuple[int, ...]  # layers, ascending
    slots: int  # of the ring
    slot_bytes: int  # of a buffer
    bytes: int


def plan(layers: Sequence[Part], rest: Part, budget: int, depth: int) -> Plan:
    """Streams as few layers as the budget allows, at even distances: what is computed between two reads is even.

    The ring has up to `depth` buffers; fewer, but at least `MIN_DEPTH`, if else the budget would not do at all.
    """
    least = None
    for slots in range(max(depth, MIN_DEPTH), MIN_DEPTH - 1, -1):
        for count in range(len(layers) + 1):
            found = _plan(layers, rest, spread(count, len(layers)), min(slots, count + 1))
            if found.bytes <= budget:
                return found
            least = found if least is None or found.bytes < least.bytes else least
    raise ValueError(
        f"load: memory_budget: expected at least {least.bytes} bytes ({least.bytes / 2**20:.1f} MiB: "
        f"{rest.resident_bytes / 2**20:.1f} MiB of weights that belong to no decoder layer, and {least.slots} "
        f"buffers of {least.slot_bytes / 2**20:.1f} MiB), got {budget}"
    )


def _plan(layers: Sequence[Part], rest: Part, streamed: tuple[int, ...], slots: int) -> Plan:
    resident = [rest, *(layer for i, layer in enumerate(layers) if i not in streamed)]
    kept = sum(part.resident_bytes for part in resident)
    ring, slot = 0, 0
    if streamed:
        slot = max(layers[i].buffer_bytes for i in streamed)
        ring = slots * slot + max(layers[i].copied_bytes for i in streamed)
    # A part of which everything is cast is read to a buffer that goes again, before there is a ring.
    passing = max(part.buffer_bytes + part.copied_bytes - part.resident_bytes for part in resident)
    return Plan(streamed, slots if streamed else 0, slot, kept + max(ring, passing))


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of 0 to total - 1, at even distances."""
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))

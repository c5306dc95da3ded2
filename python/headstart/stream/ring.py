"""Decoder layers that stay on storage and are read, ahead of time, whenever a token needs them.

    storage --> ring of page-aligned buffers --> views of them as a layer's parameters --> its forward
                (csrc/stream/, by threads)       (on a GPU: a copy in one of two slots)

A model is built without memory; what belongs to no decoder layer, and as many layers as the budget allows, are read
once and stay. The others have parameters only while their forward runs; before and after it they are meta tensors.
The file's bytes are the parameters' bytes, so packed weights (int4, bitmap) are computed with as they were read, and
nothing is decompressed to memory first.

While a layer computes, the next ones are read; while the last ones compute, the next token's first ones. Which layer
comes next is known, so the schedule is the same every time. A forward in another order, or one that stops midway, costs
what was read ahead for nothing.
"""

from __future__ import annotations

import functools
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..weights.packed_linear import packed_layers
from .plan import Part, Plan

DEPTH = 3  # buffers of the ring
DEVICE_SLOTS = 2  # a layer in use, and one being copied


class WeightStream:
    """Gives a model's streamed layers their parameters while they run; `stream_of(model)`.

    Layers run one at a time, whatever the threads. In a process that was forked later the layers cannot run.

    Args:
        layers: of each streamed layer, in the order in which they run, the module and what it reads.
        plan: how many buffers of which size.
        device: where the layers compute.
        options: for `_stream.Streamer`: threads, block, source, bytes_per_second.
    """

    def __init__(self, layers: Sequence[tuple[nn.Module, Part]], plan: Plan, device: torch.device, **options):
        self.plan, self.device = plan, device
        self.layers = [layer for layer, _ in layers]
        self.parts = [part for _, part in layers]
        self._lock = threading.RLock()
        self._checked: set[int] = set()  # layers of which the packed data were read once
        self._targets = [_targets(layer, part) for layer, part in layers]
        buffers = [_Memory(plan.slot_bytes, pin=device.type == "cuda") for _ in range(plan.slots)]
        self._buffers = buffers
        self._streamer = _streamer(self.parts, buffers, **options)
        if device.type == "cuda":
            self._ring = _DeviceRing(self._streamer, buffers, self.parts, device)
        else:
            self._ring = _HostRing(self._streamer, buffers, self.parts)
        for index, layer in enumerate(self.layers):
            layer.forward = functools.partial(_forward, layer, self, index)
            _guard(layer, device)

    @contextmanager
    def held(self, index: int) -> Iterator[None]:
        """While it lasts, streamed layer `index` has its parameters, and no other thread's layers run."""
        with self._lock, self._ring.held(index) as tensors:
            targets = self._targets[index]
            empty = [parameters[field] for parameters, field in targets]
            for (parameters, field), tensor in zip(targets, tensors, strict=True):
                parameters[field] = tensor
            try:
                if index not in self._checked:
                    self._check(index)
                yield
            finally:
                for (parameters, field), tensor in zip(targets, empty, strict=True):
                    parameters[field] = tensor

    def _check(self, index: int) -> None:
        part = self.parts[index]
        for name, layer in packed_layers(self.layers[index]).items():
            layer.check(f"{part.extents[0][0]}: {part.name}.{name}")
        self._checked.add(index)

    def start(self) -> None:
        """Begins to read the first layers, before anybody asks for them."""
        self._streamer.start()

    def statistics(self) -> dict[str, float]:
        """Bytes read, by how (``cached``: copied from the page cache, ``direct``: past it, ``buffered``: through it);
        ``layers`` acquired, of them ``mispredicted``; ``dropped``, read for nothing; seconds ``reading``, in which a
        read was in flight, and ``waiting``, in which a layer had to wait."""
        return self._streamer.statistics()

    def take_events(self) -> list[tuple[str, int, float, float, int]]:
        """(kind, streamed layer, begin, end, bytes) since the last call: a layer's "read", the "wait" for it, and
        "hold", in which it computed. Seconds as those of time.perf_counter."""
        return self._streamer.take_events()

    def close(self) -> None:
        """Ends the reading threads and gives the buffers back; the model cannot run any more."""
        self._streamer.close()
        self._ring.close()
        for buffer in self._buffers:
            buffer.unpin()

    def __deepcopy__(self, memo):
        raise RuntimeError("a model with streamed weights cannot be copied; load it once more")

    def __reduce__(self):
        raise RuntimeError("a model with streamed weights cannot be pickled; load it where it is needed")


def stream_of(model: nn.Module) -> WeightStream | None:
    """What streams a model's weights; None if all of them are in memory."""
    return vars(model).get("_headstart_stream")


def _targets(layer: nn.Module, part: Part) -> list[tuple[dict[str, nn.Parameter], str]]:
    """Where the part's parameters belong: their modules' own dictionaries."""
    found = []
    for place in part.places:
        module, _, field = place.tensor.name.removeprefix(f"{part.name}.").rpartition(".")
        found.append((layer.get_submodule(module)._parameters, field))
    return found


@torch.compiler.disable
def _forward(layer: nn.Module, stream: WeightStream, index: int, *args, **kwargs):
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        raise RuntimeError(
            f"{stream.parts[index].name}: streamed weights are gone when gradients would need them; run it under "
            "torch.no_grad(), or load the model without memory_budget"
        )
    with stream.held(index):
        return type(layer).forward(layer, *args, **kwargs)


# --- memory --------------------------------------------------------------------------------------------------------


class _Memory:
    """Page-aligned bytes, as large as asked for and no larger, that go when the last view of them goes."""

    def __init__(self, count: int, pin: bool = False):
        self.raw = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.raw.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(self.raw, dtype=torch.uint8)
        self._pinned = pin
        if pin:  # torch's own pinned memory comes in powers of two
            runtime = torch.cuda.cudart()
            torch.cuda.check_error(int(runtime.cudaHostRegister(self.tensor.data_ptr(), count, 0)))

    def unpin(self) -> None:
        if self._pinned:
            self._pinned = False
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())))


def _streamer(parts: Sequence[Part], buffers: Sequence[_Memory], **options):
    try:
        from .._stream import Streamer
    except ImportError as error:
        raise ImportError(
            f"headstart.load: memory_budget: the weight streamer is not there ({error}); build it for this Python: "
            "`pip install pybind11`, then `make build` in the source tree, or `pip install --no-build-isolation .`"
        ) from None
    files = sorted({path for part in parts for path, *_ in part.extents})
    number = {path: i for i, path in enumerate(files)}
    layers = [(part.name, [(number[path], *where) for path, *where in part.extents]) for part in parts]
    return Streamer(files, layers, [b.raw for b in buffers], list(range(len(parts))), **options)


def read_part(part: Part, **options) -> torch.Tensor:
    """A part's buffer, uint8, in memory of its own."""
    if not part.extents:
        return torch.empty(0, dtype=torch.uint8)
    memory = _Memory(part.buffer_bytes)
    streamer = _streamer([part], [memory], **options)
    try:
        streamer.acquire(0)
    finally:
        streamer.close()
    return memory.tensor


class _Ring:
    def __init__(self, streamer, buffers: Sequence[_Memory], parts: Sequence[Part]):
        self._streamer, self._parts = streamer, parts
        self._buffers = [buffer.tensor for buffer in buffers]
        self._views: dict[tuple[int, int], list[nn.Parameter]] = {}  # by slot and layer, where nothing is copied

    def _parameters(self, index: int, slot: int, memory: torch.Tensor) -> list[nn.Parameter]:
        found = self._views.get((slot, index))
        if found is None:
            part = self._parts[index]
            found = [nn.Parameter(place.of(memory), requires_grad=False) for place in part.places]
            if not part.copied_bytes:
                self._views[slot, index] = found
        return found

    def close(self) -> None:
        self._views.clear()


class _HostRing(_Ring):
    """The layer is computed with where it was read."""

    @contextmanager
    def held(self, index: int) -> Iterator[list[nn.Parameter]]:
        slot = self._streamer.acquire(index)
        try:
            yield self._parameters(index, slot, self._buffers[slot])
        finally:
            self._streamer.release(slot)


class _DeviceRing(_Ring):
    """The layer is copied to one of two slots on a GPU, by a stream of its own, while the layer before computes.

    The host runs ahead of the GPU: when it has enqueued a layer it enqueues the copy of the next one, if that is read
    already; the copy waits, on the GPU, for the layer that used the slot before. A buffer goes back to the readers when
    its copy is done.
    """

    def __init__(self, streamer, buffers: Sequence[_Memory], parts: Sequence[Part], device: torch.device):
        super().__init__(streamer, buffers, parts)
        size = max(part.buffer_bytes for part in parts)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(DEVICE_SLOTS)]
        self._computed: list[torch.cuda.Event | None] = [None] * DEVICE_SLOTS
        self._copies = torch.cuda.Stream(device)
        self._copying: list[tuple[int, torch.cuda.Event]] = []  # buffers, oldest first
        self._fetched: tuple[int, int, torch.cuda.Event] | None = None  # layer, slot, copied
        self._turn = 0

    @contextmanager
    def held(self, index: int) -> Iterator[list[nn.Parameter]]:
        if self._fetched is None or self._fetched[0] != index:
            self._fetch(index)
        (_, slot, copied), self._fetched = self._fetched, None
        compute = torch.cuda.current_stream(self._slots[slot].device)
        compute.wait_event(copied)
        try:
            yield self._parameters(index, slot, self._slots[slot])
        finally:
            self._computed[slot] = compute.record_event()
        following = (index + 1) % len(self._parts)
        if self._streamer.ready(following):
            self._fetch(following)

    def _fetch(self, index: int) -> None:
        while self._copying and (len(self._copying) >= len(self._buffers) - 1 or self._copying[0][1].query()):
            buffer, copied = self._copying.pop(0)
            copied.synchronize()
            self._streamer.release(buffer)
        buffer = self._streamer.acquire(index)
        slot, self._turn = self._turn, (self._turn + 1) % DEVICE_SLOTS
        count = self._parts[index].buffer_bytes
        if self._computed[slot] is not None:
            self._copies.wait_event(self._computed[slot])
        with torch.cuda.stream(self._copies):
            self._slots[slot][:count].copy_(self._buffers[buffer][:count], non_blocking=True)
            copied = self._copies.record_event()
        self._copying.append((buffer, copied))
        self._fetched = index, slot, copied

    def close(self) -> None:
        self._copies.synchronize()
        self._copying.clear()
        super().close()


# --- what a model with streamed layers does not do -----------------------------------------------------------------


class _Refusal:
    """Stands in the place of a method."""

    def __init__(self, what: str, cure: str):
        self._words = f"{what}: the weights of streamed layers are in files, not in memory; {cure}"

    def __call__(self, *args, **kwargs):
        raise RuntimeError(self._words)

    def __reduce__(self):
        raise RuntimeError("a model with streamed weights cannot be pickled; load it where it is needed")


def _guard(layer: nn.Module, device: torch.device) -> None:
    read = "read the tensors from the model's files, or load it without memory_budget"
    layer.register_state_dict_pre_hook(_Refusal("state_dict", read))
    layer.register_load_state_dict_pre_hook(_Refusal("load_state_dict", "load it without memory_budget"))
    layer._apply = functools.partial(_apply, layer, device)


def guard_model(model: nn.Module, path: Path, device: torch.device) -> None:
    """What would save or move weights that are not there says so."""
    model.save_pretrained = _Refusal("save_pretrained", f"copy {path}, or load it without memory_budget")
    model._apply = functools.partial(_apply, model, device)


def _apply(module: nn.Module, device: torch.device, fn: Callable, recurse: bool = True) -> nn.Module:
    """`nn.Module.to` and its like do nothing where nothing would change, and else say why they cannot."""
    for dtype in {parameter.dtype for parameter in module.parameters()}:
        after = fn(torch.empty(0, dtype=dtype, device=device))
        if after.dtype != dtype or after.device != device:
            _Refusal("to", "load the model with the device and the dtype that it is to have")()
    return module

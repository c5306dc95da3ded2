"""Where an operator runs in the tests, and how a test calls it there.

A test that takes `ops` runs once in every place that has the operators of its file's `STEM`. There, ``ops.int4_gemm``
has the signature of ``torch.ops.headstart.int4_gemm``, and takes and returns CPU tensors.

| kind | what runs |
|---|---|
| reference | plain torch |
| cpu | ``_cpu.so``, in every tier that this CPU has |
| interpreter | the Triton kernels, through Triton's interpreter, in a process of its own (test_interpreter.py) |
| lanes | the CUDA kernels, lane by lane on the CPU (lane_model/) |
| cuda | ``_cuda.so``, on a GPU |
| triton | the Triton kernels, on a GPU |

``@places("cpu", "cuda")`` names the kinds where a test runs: a case that takes minutes in the interpreter, or a promise
that only some places give. What an operator allocates held NaN before, so a value that a kernel does not write shows.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from headstart import _library

KINDS = ("reference", "cpu", "interpreter", "lanes", "cuda", "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
places = pytest.mark.places
interpreted = pytest.mark.interpreted


@dataclass(frozen=True)
class Stem:
    """The operators of a family, and the ways of running them that a test must see.

    Args:
        operators: Their names, as in `_library.define`.
        interpreter: Values of constants of `headstart.triton.<name>`, by the name of the variant.
        lanes: Variants that `lane_model/<name>.py` knows; none where there is no CUDA kernel.
        cuda: Whether `_cuda.so` has the operators.
    """

    name: str
    operators: tuple[str, ...]
    interpreter: dict[str, dict[str, object]] = field(default_factory=lambda: {"": {}})
    lanes: tuple[str, ...] = ()
    cuda: bool = True


WGMMA = ("ascending", "descending", "wgmma, ascending", "wgmma, descending")  # an sm_80 device, and a Hopper
STEMS = {
    stem.name: stem
    for stem in (
        Stem("sparse_attention", ("sparse_attention", "merge_attention")),
        Stem("merge_attention", ("merge_attention",)),
        Stem(
            "prefill_index",
            ("vertical_slash_index", "block_topk_index", "adaptive_block_index"),  # A-shape is plain torch everywhere
            lanes=WGMMA,
        ),
        Stem("centroid_lookup", ("centroid_lookup",), lanes=WGMMA),
        Stem(
            "int4_gemm",
            ("int4_gemm",),
            interpreter={
                "parts added in order": {"PART": 128, "PROGRAMS": 0},
                "parts added by a kernel of their own": {"PART": 128, "PROGRAMS": 10**6},
            },
            lanes=WGMMA,
        ),
        Stem(
            "bitmap",
            ("bitmap_decompress", "bitmap_decompress.out", "bitmap_gemm"),
            interpreter={
                "one program a row": {"SEGMENT": 2**20, "PART": 2**20},
                "segments and parts": {"SEGMENT": 512, "PART": 128},
            },
            lanes=("ascending", "descending"),
        ),
    )
}


class Ops:
    """The operators of a stem in one place: ``ops.int4_gemm(...)``, ``ops.bitmap_decompress_out(..., out=out)``."""

    def __init__(self, kind: str, operators: dict[str, Callable]):
        self.kind = kind
        for name, call in operators.items():
            setattr(self, name.replace(".", "_"), call)


def is_operator(name: str) -> bool:
    return hasattr(torch.ops.headstart, name.partition(".")[0])


def torch_operator(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.headstart, packet), overload or "default")


def parameters(stem: Stem, kinds: tuple[str, ...], quick: bool) -> list:
    """A `pytest.param` of (kind, variant) for each place of these kinds; `quick`: the best and the generic tier."""
    has_triton = [name for name in stem.operators if name in _library.triton_kernels]
    if INTERPRETED:
        variants = stem.interpreter if has_triton and "interpreter" in kinds else ()
        return [_parameter("interpreter", variant, interpreted) for variant in variants]
    found = {
        "reference": [_parameter("reference", "")],
        "cpu": [_parameter("cpu", tier) for tier in tiers(quick)],
        "lanes": [_parameter("lanes", variant, pytest.mark.slow) for variant in stem.lanes],
        "cuda": [_parameter("cuda", "", pytest.mark.gpu)] if stem.cuda else [],
        "triton": [_parameter("triton", "", pytest.mark.gpu)] if has_triton else [],
    }
    return [parameter for kind in kinds for parameter in found.get(kind, ())]


def tiers(quick: bool) -> list[str]:
    names = _library.cpu_tiers() or ["no compiled CPU kernels"]
    return list(dict.fromkeys([names[0], _library.cpu_tier() or names[-1]])) if quick else names


def _parameter(kind: str, variant: str, *marks):
    return pytest.param((kind, variant), id=variant if kind == "cpu" else f"{kind}, {variant}".strip(", "), marks=marks)


@contextmanager
def opened(stem: Stem, kind: str, variant: str, request: pytest.FixtureRequest) -> Iterator[Ops]:
    """The operators in a place, which is left as it was found."""
    if kind == "reference":
        key = torch._C.DispatchKey.CompositeExplicitAutograd
        yield Ops(kind, {name: _with_key(torch_operator(name), key) for name in stem.operators})
    elif kind == "cpu":
        with cpu_tier(variant):
            yield Ops(kind, {name: _spoiling_memory(name, torch_operator(name)) for name in stem.operators})
    elif kind == "interpreter":
        request.getfixturevalue("interpreter")
        request.getfixturevalue("poisoned")
        monkeypatch = request.getfixturevalue("monkeypatch")
        for constant, value in stem.interpreter[variant].items():
            monkeypatch.setattr(f"headstart.triton.{stem.name}.{constant}", value)
        yield Ops(kind, {name: call for name, call in _library.triton_kernels.items() if name in stem.operators})
    elif kind == "lanes":
        with importlib.import_module(f"lane_model.{stem.name}").operators(variant) as operators:
            yield Ops(kind, operators)
    else:
        require_cuda_kernels()
        names = [name for name in stem.operators if kind == "cuda" or name in _library.triton_kernels]
        yield Ops(kind, {name: on_gpu(gpu_kernel(name, kind), name) for name in names})


@contextmanager
def cpu_tier(name: str) -> Iterator[str]:
    """The CPU kernels run in this tier."""
    if not _library.cpu_tiers():
        pytest.skip(f"no compiled CPU kernels: {_library.cpu.error}")
    before = _library.cpu_tier()
    _library.set_cpu_tier(name)
    try:
        yield name
    finally:
        _library.set_cpu_tier(before)


def _with_key(operator, key) -> Callable:
    return lambda *args, **options: operator._op_dk(key, *args, **options)


def _spoiling_memory(name: str, kernel: Callable) -> Callable:
    """The kernel, called after memory of its outputs' sizes was filled with NaN and freed, to be handed out again."""

    def call(*args, **options):
        moved = [_to_meta(x) for x in args], {key: _to_meta(x) for key, x in options.items()}
        try:
            outputs = torch_operator(name)(*moved[0], **moved[1])
        except (RuntimeError, ValueError):
            outputs = ()  # bad input: the call below says so
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        device = next((x.device for x in args if isinstance(x, torch.Tensor)), None)
        spoiled = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in outputs if x is not None]
        spoiled = [x.fill_(math.nan if x.dtype.is_floating_point else -1) for x in spoiled]
        del spoiled, outputs
        return kernel(*args, **options)

    return call


def _to_meta(x):
    return x.to("meta") if isinstance(x, torch.Tensor) else x


# --- a GPU -----------------------------------------------------------------------------------------------------------


def require_cuda_kernels() -> None:
    """Skips without a GPU; fails where there is one and the CUDA library does not serve it."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    missing = _library.missing_gpu_kernels()
    if missing is not None:
        pytest.fail(f"the CUDA kernels cannot run here. Cause: {missing[0]}. Cure: {missing[1]}.", pytrace=False)


def gpu_kernel(name: str, kind: str = "cuda") -> Callable:
    """An operator's kernel, for CUDA tensors: Triton's, or the one of `_cuda.so`, from which it must run here."""
    if kind == "triton":
        return _library.triton_kernels[name]
    server = _library.served_by(name, "CUDA")
    assert "_cuda.so" in server, f"{name} runs on {server}, not from _cuda.so"
    return torch_operator(name)


def cuda_ops(*names: str) -> Ops:
    """These operators of `_cuda.so`, for CPU tensors."""
    return Ops("cuda", {name: on_gpu(gpu_kernel(name), name) for name in names})


def to_gpu(x):
    """The same tensor there: its strides, its offset, and what surrounds it."""
    if not isinstance(x, torch.Tensor):
        return x
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return whole.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def on_gpu(kernel: Callable, name: str) -> Callable:
    """The kernel, for CPU tensors: all that they lie in is moved to the GPU, and the outputs are brought back."""

    def call(*args, **options):
        moved = {key: to_gpu(x) for key, x in options.items()}
        run = _spoiling_memory(name, kernel) if is_operator(name) else kernel
        outputs = run(*(to_gpu(x) for x in args), **moved)
        if name.endswith(".out"):  # with what surrounds the output, so that a write there shows
            out = options["out"]
            whole = torch.empty(0, dtype=out.dtype, device="cuda").set_(moved["out"].untyped_storage())
            torch.empty(0, dtype=out.dtype).set_(out.untyped_storage()).copy_(whole)
            return None
        return outputs.cpu() if isinstance(outputs, torch.Tensor) else tuple(x.cpu() for x in outputs)

    return call


def expect_no_wait(step: Callable) -> None:
    """Runs a step in which nothing may wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def expect_same_when_replayed(step: Callable, change: Callable) -> None:
    """Captures a step as a CUDA graph; replayed after changes of its inputs, it must give what the step gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        change()
        graph.replay()
        fresh = step()
        pairs = [(captured, fresh)] if isinstance(captured, torch.Tensor) else zip(captured, fresh)
        assert all(torch.equal(got, want) for got, want in pairs)

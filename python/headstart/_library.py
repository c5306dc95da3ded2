"""Where operators are defined and compiled libraries are loaded.

Every operator is defined in Python, once, by `define`: its schema, its fake kernel, and a plain-torch reference
as the implementation of last resort. A compiled library (`_cpu.so`, `_cuda.so`) or a Triton kernel only *adds*
implementations for a device. So the operators exist, and run, whatever failed to build or load; the failure is
kept and told on the first call that would have used the library, with its cure.

The namespace is named here and nowhere else, in Python (`NAMESPACE`) as in C++ (`HEADSTART_NAMESPACE`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

NAMESPACE = "headstart"

_definitions = torch.library.Library(NAMESPACE, "FRAGMENT")
_package = Path(__file__).parent
triton_kernels: dict[str, Callable] = {}  # Triton's implementations, by operator

# Operators that a compiled library serves once it is loaded; the others are served by torch alone so far.
CPU_KERNELS = frozenset(
    {
        "sparse_attention",
        "merge_attention",
        "vertical_slash_index",
        "block_topk_index",
        "adaptive_block_index",
        "centroid_lookup",
        "int4_gemm",
        "int4_pack",
        "int4_unpack",
        "bitmap_compress",
        "bitmap_decompress",
        "bitmap_decompress.out",
        "bitmap_gemm",
    }
)
CUDA_KERNELS = frozenset(
    {
        "sparse_attention",
        "merge_attention",
        "vertical_slash_index",
        "block_topk_index",
        "adaptive_block_index",
        "centroid_lookup",
        "int4_gemm",
    }
)


def define(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    triton: Callable | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> torch._ops.OpOverload:
    """Defines `torch.ops.headstart.<name>` and returns it; ``"op.out"`` names an overload.

    `schema` is the part after the name, e.g. ``(Tensor x, *, float? scale=None) -> Tensor``. `reference` serves
    every device that has no kernel; `fake` gives the outputs' shapes and dtypes, and makes the same input checks;
    `triton` serves CUDA where no compiled library does.
    """
    _definitions.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, *tags))

    @functools.wraps(reference)
    def fallback(*args, **kwargs):
        _warn_if_kernel_is_missing(name, args)
        return reference(*args, **kwargs)

    _definitions.impl(name, fallback, "CompositeExplicitAutograd")
    if triton is not None:
        triton_kernels[name] = triton
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_definitions)
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload or "default")


def has_kernel(name: str, device: str) -> bool:
    """Whether an operator has an implementation of its own on a device (``"CPU"``, ``"CUDA"``)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device)


class CompiledLibrary:
    """A shared library of kernels beside this file, and why it is not loaded, if it is not."""

    def __init__(self, device: str, cure: str):
        self.device = device
        self.path = _package / f"_{device}.so"
        self.cure = cure
        self.error: str | None = None
        self.handle: ctypes.CDLL | None = None

    def load(self) -> None:
        if not self.path.exists():
            self.error = f"{self.path} does not exist"
            return
        try:
            torch.ops.load_library(str(self.path))
            self.handle = ctypes.CDLL(str(self.path))
        except OSError as error:
            self.error = f"{error} (torch here is {torch.__version__})"


cpu = CompiledLibrary("cpu", "run `make build` in the source tree, or `pip install --no-build-isolation .`")
cuda = CompiledLibrary("cuda", "run `make build` in the source tree with nvcc on the PATH")


def load_compiled_libraries() -> None:
    cpu.load()
    wanted = os.environ.get("HEADSTART_ISA")
    if wanted and cpu.handle is not None and wanted != cpu_tier():
        warnings.warn(
            f"headstart: HEADSTART_ISA: expected one of {' '.join(cpu_tiers())}, got {wanted}; using {cpu_tier()}",
            RuntimeWarning,
            stacklevel=2,
        )
    if torch.version.cuda is None:
        cuda.error = f"torch {torch.__version__} is built without CUDA"
    else:
        cuda.load()


def register_triton_kernels() -> None:
    """Lets Triton serve the CUDA operators that no compiled library does, where there are CUDA and Triton."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return
    for name, function in triton_kernels.items():
        if not has_kernel(name, "CUDA"):
            _definitions.impl(name, function, "CUDA")


_warned: set[str] = set()


def _warn_if_kernel_is_missing(name: str, args: tuple) -> None:
    device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), None)
    library, kernels = {"cpu": (cpu, CPU_KERNELS), "cuda": (cuda, CUDA_KERNELS)}.get(device, (None, ()))
    if name in kernels and library.error is not None and device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"headstart: the {device} kernels are not loaded, so {name} and others run as slow references. "
            f"Cause: {library.error}. Cure: {library.cure}.",
            RuntimeWarning,
            stacklevel=3,
        )


# --- CPU tiers ---------------------------------------------------------------------------------------------------


def cpu_tiers() -> list[str]:
    """The instruction-set tiers this CPU can run, lowest first, e.g. ``["generic", "avx2", "avx512"]``."""
    if cpu.handle is None:
        return []
    cpu.handle.headstart_cpu_tiers.restype = ctypes.c_char_p
    return cpu.handle.headstart_cpu_tiers().decode().split()


def cpu_tier() -> str | None:
    """The tier in use: the highest of `cpu_tiers`, unless `HEADSTART_ISA` or `set_cpu_tier` asked for a lower one."""
    if cpu.handle is None:
        return None
    cpu.handle.headstart_cpu_tier.restype = ctypes.c_char_p
    return cpu.handle.headstart_cpu_tier().decode()


def set_cpu_tier(name: str) -> None:
    """Makes the CPU kernels of this process run in tier `name` (for tests and measurements)."""
    if name not in cpu_tiers():
        raise ValueError(f"set_cpu_tier: name: expected one of {cpu_tiers()}, got {name!r}")
    cpu.handle.headstart_set_cpu_tier(name.encode())

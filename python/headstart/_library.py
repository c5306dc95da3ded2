"""Where operators are defined and compiled libraries are loaded.

Every operator is defined in Python, once, by `define`: its schema, its fake kernel, and a plain-torch reference
as the implementation of last resort. A compiled library (`_cpu.so`, `_cuda.so`) or a Triton kernel only *adds*
implementations for a device. So the operators exist, and run, whatever failed to build or load. The failure is kept,
and a warning on the first call that would have used the library tells it with its cure.

The namespace is named here and nowhere else, in Python (`NAMESPACE`) as in C++ (`HEADSTART_NAMESPACE`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

NAMESPACE = "headstart"
OLDEST_TORCH = "2.11"  # that the libraries were built against and loaded into (CMakeLists.txt)

_definitions = torch.library.Library(NAMESPACE, "FRAGMENT")
_package = Path(__file__).parent
triton_kernels: dict[str, Callable] = {}  # Triton's implementations, by operator


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


def served_by(name: str, device: str) -> str:
    """What runs an operator on a device: ``"_cpu.so"``, ``"_cuda.so"``, ``"Triton"`` or ``"torch"``, the reference."""
    if not has_kernel(name, device):
        return "torch"
    # The dispatcher remembers the file that registered each kernel.
    kernels = torch._C._dispatch_dump(f"{NAMESPACE}::{name}").splitlines()
    place = next((line for line in kernels if line.startswith(f"{device}:")), "")
    return "Triton" if ".py:" in place else f"_{device.lower()}.so"


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
        if _release(torch.__version__) < _release(OLDEST_TORCH):
            self.error = f"torch here is {torch.__version__}, and {self.path} needs {OLDEST_TORCH} or later"
            self.cure = f"pip install 'torch>={OLDEST_TORCH}'"
            return
        try:
            torch.ops.load_library(str(self.path))
            self.handle = ctypes.CDLL(str(self.path))
        except OSError as error:
            # torch's own error names the file alone; what the loader said is its cause.
            cause = str(error.__cause__ or error)
            where = "" if str(self.path) in cause else f"{self.path}: "
            self.error = f"{where}{cause} ({self._built_with()}; torch here is {torch.__version__})"

    def operators(self) -> list[str]:
        """The operators that the library serves, as csrc/kernels.inc lists them; none if it is not loaded."""
        names = getattr(self.handle, f"headstart_{self.device}_operators", None)
        if names is None:
            return []
        names.restype = ctypes.c_char_p
        return names().decode().split()

    def _built_with(self) -> str:
        """What CMakeLists.txt left in the file, which tells it even where the file cannot be loaded."""
        note = re.search(rb"headstart: (built with torch [\w.+]+)", self.path.read_bytes())
        return note[1].decode() if note else "it does not tell which torch it was built with"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


cpu = CompiledLibrary("cpu", "run `make build` in the source tree, or `pip install --no-build-isolation .`")
cuda = CompiledLibrary("cuda", "run `make gpu-build` in the source tree with nvcc on the PATH")


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
    # A machine without nvcc has no `_cuda.so`, and Triton is what is meant to run there. One that is there and does not
    # load must not be replaced in silence.
    broken = cuda.error is not None and cuda.path.exists()
    for name, function in triton_kernels.items():
        if not has_kernel(name, "CUDA"):
            _definitions.impl(name, _warning_stand_in(function) if broken else function, "CUDA")


def _warning_stand_in(function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*args, **kwargs):
        _warn_once(cuda, "Triton's kernels run in its place")
        return function(*args, **kwargs)

    return run


_warned: set[str] = set()


def _warn_if_kernel_is_missing(name: str, args: tuple) -> None:
    """A reference runs: on a CPU because its library is missing, on a GPU also where there is no kernel by design."""
    device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), None)
    library = {"cpu": cpu, "cuda": cuda if name in triton_kernels else None}.get(device)
    if library is not None and library.error is not None:
        _warn_once(library, f"{name} and others run as slow references")


def _warn_once(library: CompiledLibrary, consequence: str) -> None:
    if library.device not in _warned:
        _warned.add(library.device)
        warnings.warn(
            f"headstart: the {library.device} kernels are not loaded, so {consequence}. "
            f"Cause: {library.error}. Cure: {library.cure}.",
            RuntimeWarning,
            stacklevel=4,
        )


# --- GPUs --------------------------------------------------------------------------------------------------------


def missing_gpu_kernels() -> tuple[str, str] | None:
    """(cause, cure) if not every operator of `_cuda.so` runs from it on a GPU here; None if all do.

    What claims to test or to time the CUDA kernels asks this first: elsewhere Triton or torch would stand in for them.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA", "install a CUDA build of torch"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device", "run it where `nvidia-smi` lists one"
    if cuda.error is not None:
        return cuda.error, cuda.cure
    if not cuda.operators():
        return f"{cuda.path} is loaded and has no operators of headstart", cuda.cure
    for name in cuda.operators():
        if (server := served_by(name, "CUDA")) != "_cuda.so":
            return f"{cuda.path} is loaded, and {name} runs on {server}", cuda.cure
    return None


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


def set_cuda_dense_rows(int4: int = 0, bitmap: int = 0) -> None:
    """From how many rows on int4_gemm and bitmap_gemm multiply a dense copy of the weight on a GPU, in this process.

    For measurements; 0 means what the library is built with.
    """
    cuda.handle.headstart_cuda_set_dense_rows(ctypes.c_int64(int4), ctypes.c_int64(bitmap))

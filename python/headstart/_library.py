"""Defines operators and loads compiled libraries.

Every operator is defined once, in Python, by `define`. It has a schema, a fake kernel, and a plain-torch reference,
which runs if there is no other implementation. A compiled library (`_cpu.so`, `_cuda.so`) or a Triton kernel only
*adds* implementations for a device. So the operators exist and run even if a library failed to build or load. The
failure is kept. The first call that would have used the library warns of the failure and names its cure.

`NAMESPACE` is the only place in Python that names the namespace. In C++ it is `HEADSTART_NAMESPACE`.
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
OLDEST_TORCH = "2.11"  # the oldest torch that the libraries were built against and loaded into (CMakeLists.txt)

_definitions = torch.library.Library(NAMESPACE, "FRAGMENT")
_package = Path(__file__).parent
triton_kernels: dict[str, Callable] = {}  # the Triton implementations, by operator
_choosers: dict[str, Callable] = {}  # what chooses between Triton and the CUDA library, by operator


def define(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    triton: Callable | None = None,
    cuda: Callable | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> torch._ops.OpOverload:
    """Defines `torch.ops.headstart.<name>` and returns it.

    Args:
        name: the operator. ``"op.out"`` names an overload.
        schema: the part after the name, e.g. ``(Tensor x, *, float? scale=None) -> Tensor``.
        reference: the implementation for every device that has no kernel.
        fake: gives the shapes and dtypes of the outputs, and makes the same input checks.
        triton: the implementation for CUDA if no compiled library has one.
        cuda: runs in its place, and chooses for each call between `triton` and the library's ``_<name>_sm90``.
        tags: tags for torch, in addition to ``pt2_compliant_tag``.
    """
    _definitions.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, *tags))

    @functools.wraps(reference)
    def fallback(*args, **kwargs):
        _warn_if_kernel_is_missing(name, args)
        return reference(*args, **kwargs)

    _definitions.impl(name, fallback, "CompositeExplicitAutograd")
    if triton is not None:
        triton_kernels[name] = triton
    if cuda is not None:
        _choosers[name] = cuda
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_definitions)
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload or "default")


def has_kernel(name: str, device: str) -> bool:
    """Whether an operator has a kernel, not only the reference, for a device (``"CPU"``, ``"CUDA"``)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device)


def served_by(name: str, device: str) -> str:
    """What runs an operator on a device: ``"_cpu.so"``, ``"_cuda.so"``, ``"Triton"`` or ``"torch"`` (the reference).

    ``"_cuda.so, Triton"`` means that each call chooses.
    """
    if not has_kernel(name, device):
        return "torch"
    # The dispatcher remembers the file that registered each kernel.
    kernels = torch._C._dispatch_dump(f"{NAMESPACE}::{name}").splitlines()
    place = next((line for line in kernels if line.startswith(f"{device}:")), "")
    if ".py:" not in place:
        return f"_{device.lower()}.so"
    return "_cuda.so, Triton" if name in _choosers and has_kernel(f"_{name}_sm90", device) else "Triton"


class CompiledLibrary:
    """A shared library of kernels in the folder of this file. If it is not loaded, `error` says why."""

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
            # torch's own error names only the file. Its cause is the error of the loader.
            cause = str(error.__cause__ or error)
            where = "" if str(self.path) in cause else f"{self.path}: "
            self.error = f"{where}{cause} ({self._built_with()}; torch here is {torch.__version__})"

    def operators(self) -> list[str]:
        """The operators in the library, which csrc/kernels.inc lists. The list is empty if it is not loaded."""
        names = getattr(self.handle, f"headstart_{self.device}_operators", None)
        if names is None:
            return []
        names.restype = ctypes.c_char_p
        return names().decode().split()

    def _built_with(self) -> str:
        """The torch version that CMakeLists.txt wrote into the file. It can be read even if loading the file fails."""
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
    """Registers Triton kernels for the CUDA operators that are in no compiled library, if there are CUDA and Triton."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return
    # A machine without nvcc has no `_cuda.so`, and Triton is meant to run there. But if there is a `_cuda.so` and it
    # does not load, Triton must not replace it without a warning.
    broken = cuda.error is not None and cuda.path.exists()
    for name, function in triton_kernels.items():
        if not has_kernel(name, "CUDA"):
            function = _choosers.get(name, function)
            _definitions.impl(name, _warning_stand_in(function) if broken else function, "CUDA")


def _warning_stand_in(function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*args, **kwargs):
        _warn_once(cuda, "Triton's kernels run in its place")
        return function(*args, **kwargs)

    return run


_warned: set[str] = set()


def _warn_if_kernel_is_missing(name: str, args: tuple) -> None:
    """Warns once if a reference runs because a library is not loaded.

    On a GPU, an operator that has no kernel by design does not cause a warning.
    """
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
    """None if every operator of `_cuda.so` runs from it on a GPU of this machine, otherwise (cause, cure).

    Tests and benchmarks of the CUDA kernels call this first. Otherwise Triton or torch could run in place of the
    kernels.
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
    """The instruction-set tiers that this CPU can run, lowest first, e.g. ``["generic", "avx2", "avx512"]``."""
    if cpu.handle is None:
        return []
    cpu.handle.headstart_cpu_tiers.restype = ctypes.c_char_p
    return cpu.handle.headstart_cpu_tiers().decode().split()


def cpu_tier() -> str | None:
    """The tier in use.

    It is the highest of `cpu_tiers`, without the bf16 dot product where that is slower than FMA (csrc/cpu/tiers.cpp
    measures it), unless `HEADSTART_ISA` or `set_cpu_tier` chose another.
    """
    if cpu.handle is None:
        return None
    cpu.handle.headstart_cpu_tier.restype = ctypes.c_char_p
    return cpu.handle.headstart_cpu_tier().decode()


def cpu_unit_rates() -> dict[str, tuple[str, float]]:
    """What the multipliers of this CPU do now: {instruction: (operands, 1e9 operations a second on one core)}."""
    if cpu.handle is None:
        return {}
    cpu.handle.headstart_cpu_unit_rates.restype = ctypes.c_char_p
    lines = (line.split("\t") for line in cpu.handle.headstart_cpu_unit_rates().decode().splitlines())
    return {name: (unit, float(rate)) for name, unit, rate in lines}


def set_cpu_tier(name: str) -> None:
    """Makes the CPU kernels of this process run in tier `name`, for tests and measurements.

    Raises a ValueError if this CPU cannot run the tier.
    """
    if name not in cpu_tiers():
        raise ValueError(f"set_cpu_tier: name: expected one of {cpu_tiers()}, got {name!r}")
    cpu.handle.headstart_set_cpu_tier(name.encode())


def set_cuda_dense_rows(int4: int = 0, bitmap: int = 0) -> None:
    """Sets from which number of rows of x on int4_gemm and bitmap_gemm multiply a dense copy of the weight on a GPU.

    It is for measurements, and holds for this process. 0 means the number that the library was built with.
    """
    cuda.handle.headstart_cuda_set_dense_rows(ctypes.c_int64(int4), ctypes.c_int64(bitmap))

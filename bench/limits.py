"""The machine's limits: how fast it multiplies, reads and copies at best. Reports give shares of these limits.

A share means something only if no kernel can pass the limit. So each limit is the fastest of several ways: loops that
keep everything in registers and moves past the caches (limits.cpp, compiled when it is needed), torch's own products,
sums and copies, and headstart's int8 kernel with its data in the caches. Each way counts with its fastest call.
`run.py` measures before the cases, after them, and again after a case that passed a limit; the highest rate counts.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import torch

import machine
from headstart.ops.int4_gemm import Int4Weight
from measure import interleave

SOURCE = Path(__file__).with_name("limits.cpp")
# A loop of limits.cpp: what it multiplies, and the flags in /proc/cpuinfo that it needs.
LOOPS = {
    "fma": ("fp32", "avx2 fma"),
    "fma 512": ("fp32", "avx512f"),
    "bf16 dot": ("bf16", "avx512_bf16"),
    "vpmaddwd": ("int16", "avx2"),
    "vpmaddwd 512": ("int16", "avx512bw"),
    "vpdpwssd": ("int16", "avx_vnni"),
    "vpdpwssd 512": ("int16", "avx512_vnni"),
    "vpmaddubsw": ("int8", "avx2"),
    "vpmaddubsw 512": ("int8", "avx512bw"),
    "vpdpbusd": ("int8", "avx_vnni"),
    "vpdpbusd 512": ("int8", "avx512_vnni"),
}
MOVES = {  # vectors read, vectors written; a decompressed weight writes more than it reads, a merge reads more
    "read": {"vector loads": (1, 0)},
    "copy": {"streamed copy": (1, 1), "streamed sum of two": (2, 1), "streamed doubling": (1, 2)},
}
# The units that are exact enough for each kind of operands. A kernel's limit is the fastest of them.
UNITS = {
    "fp32": ("fp32",),
    "bf16": ("fp32", "bf16", "int16"),
    "int8": ("fp32", "bf16", "int16", "int8"),
}
SIZES = (512, 1024, 2048)  # of a square product; slow machines stop at a smaller size


def measure(quick: bool = False, when: str = "before the run") -> dict:
    """{"when": ..., "rates": {limit: {way: rate}}}: 1e9 operations a second, and GB/s."""
    seconds = 0.2 if quick else 1.0
    rates: dict[str, dict[str, float]] = {name: {} for name in (*UNITS["int8"], "read", "copy")}
    for name, unit in supported_loops().items():
        rates[unit][f"{name} in registers"] = loop_rate(name, seconds)
    for unit, products in torch_products().items():
        for name, product in products.items():
            rate = product_rate(product, seconds)
            if rate is not None:
                rates[unit][name] = rate
    rates["int8"]["headstart int4_gemm, int8 activations, in cache"] = own_int8_rate(seconds)
    for name, ways in bandwidths(seconds).items():
        rates[name] |= ways
    return {"when": when, "rates": {name: ways for name, ways in rates.items() if ways}}


def highest(measured: list[dict]) -> dict[str, dict]:
    """{limit: {"rate": ..., "way": ..., "when": ...}}: the highest rate of all that was measured."""
    found: dict[str, dict] = {}
    for one in measured:
        for name, ways in one["rates"].items():
            for way, rate in ways.items():
                if name not in found or rate > found[name]["rate"]:
                    found[name] = {"rate": rate, "way": way, "when": one["when"]}
    return found


def fastest_unit(operands: str, found: dict[str, dict], unknown: Collection[str] = ()) -> str | None:
    """The unit that limits products of such operands; None if their own unit has no rate, or if a rate is too low."""
    units = [unit for unit in UNITS[operands] if unit in found]
    if operands not in units or not set(units).isdisjoint(unknown):
        return None
    return max(units, key=lambda unit: found[unit]["rate"])


# --- loops and moves of limits.cpp -----------------------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL | None:
    """limits.cpp, compiled for this CPU; None without a C++ compiler, and then torch's rates are all there is."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limits.so"
        flags = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
        done = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(path)], capture_output=True, text=True)
        if done.returncode:
            return None
        loaded = ctypes.CDLL(str(path))
    loaded.multiply_rate.restype = loaded.move_rate.restype = ctypes.c_double
    loaded.multiply_rate.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_double]
    loaded.move_rate.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_int] * 3]
    return loaded


def supported_loops() -> dict[str, str]:
    """{name: unit} of the loops that this CPU can run."""
    if library() is None:
        return {}
    flags = machine.cpu_flags()
    return {name: unit for name, (unit, needed) in LOOPS.items() if flags.issuperset(needed.split())}


# Runs are as short as a call of a fast kernel. On a busy machine, short runs find a free moment, as such a kernel does.
RUN_SECONDS, BYTES_PER_THREAD = 1e-3, 4 << 20


def loop_rate(name: str, seconds: float) -> float:
    threads = torch.get_num_threads()
    runs = max(1, round(seconds / RUN_SECONDS))
    return max(library().multiply_rate(name.encode(), threads, RUN_SECONDS) for _ in range(runs))


def move_rate(source: torch.Tensor, target: torch.Tensor, mix: tuple[int, int]) -> float:
    """The best rate of a walk over all of the tensors, in runs; each run finds its data out of the caches."""
    threads = torch.get_num_threads()
    size = min(source.nbytes, threads * BYTES_PER_THREAD)
    return max(
        library().move_rate(source.data_ptr() + start, target.data_ptr() + start, size, threads, *mix)
        for start in range(0, source.nbytes - size + 1, size)
    )


# --- torch and headstart ---------------------------------------------------------------------------------------------


def torch_products() -> dict[str, dict[str, Callable[[int], Callable]]]:
    """{unit: {name: product}}; product(size) makes a call that multiplies two square matrices."""

    def floats(dtype: torch.dtype):
        def product(size: int):
            a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
            return lambda: a @ b

        return product

    def bytes_of(size: int) -> torch.Tensor:
        return torch.randint(0, 127, (size, size), dtype=torch.int8)

    def int_mm(size: int):
        a, b = bytes_of(size), bytes_of(size)
        return lambda: torch._int_mm(a, b)

    def onednn(size: int):
        x, weight = bytes_of(size).to(torch.uint8), torch.ops.onednn.qlinear_prepack(bytes_of(size), [size, size])
        of_weight = weight, torch.ones(size), torch.zeros(size, dtype=torch.int64), None
        to_float = 1.0, 0, torch.float32, "none", [], ""
        return lambda: torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, *of_weight, *to_float)

    products = {unit: {"torch product": floats(dtype)} for unit, dtype in machine.DTYPES.items()}
    return products | {"int8": {"torch._int_mm": int_mm, "torch's oneDNN int8 linear layer": onednn}}


def product_rate(product: Callable[[int], Callable], seconds: float) -> float | None:
    """The best rate over sizes; None if this torch does not have the operator on this CPU."""
    rates = []
    for size in SIZES:
        try:
            call = product(size)
            call()
        except (RuntimeError, AttributeError, NotImplementedError):
            return None
        fastest_us = min(interleave({"": call}, seconds=seconds / len(SIZES), min_rounds=3)[""])
        rates.append(2 * size**3 / fastest_us / 1e3)
        if 8 * fastest_us > 1e6 * seconds:  # the next size has eight times the work
            break
    return max(rates)


def own_int8_rate(seconds: float) -> float:
    """headstart's product with int8 activations, where neither memory nor few rows hold it up."""
    rows, size, group_size = 256, 1024, 128
    weight = Int4Weight.quantize(torch.randn(size, size), group_size)
    x = torch.randn(rows, size).bfloat16()

    def call():
        operands = x, weight.packed, weight.scales, weight.zeros
        return torch.ops.headstart.int4_gemm(*operands, group_size=group_size, n=size, int8_activations=True)

    call()
    return 2 * rows * size**2 / min(interleave({"": call}, seconds=seconds, min_rounds=3)[""]) / 1e3


def bandwidths(seconds: float) -> dict[str, dict[str, float]]:
    """GB/s read, and GB/s read and written, by way; over tensors that are several times as large as the caches."""
    source = torch.ones(machine.cold_bytes() // 4096, 1024)
    vector, target = torch.ones(1024), torch.empty_like(source)
    calls = {
        "torch sum": lambda: source.sum(),
        "torch max": lambda: source.amax(),
        "torch matrix-vector product": lambda: torch.mv(source, vector),
        "torch copy": lambda: target.copy_(source),
    }
    for call in calls.values():
        call()
    times = interleave(calls, seconds=2 * seconds, min_rounds=5)
    rates = {name: source.nbytes / min(t) / 1e3 for name, t in times.items()}
    found = {"copy": {"torch copy": 2 * rates.pop("torch copy")}, "read": rates}
    for limit, moves in MOVES.items() if library() is not None else ():
        for name, mix in moves.items():
            found[limit][name] = max(move_rate(source, target, mix) for _ in range(5))
    return found

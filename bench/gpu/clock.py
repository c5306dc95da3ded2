"""How the GPU benchmarks take times, and the file that keeps them.

Two ways, because two things are wanted. `Clock.cold` times one launch by CUDA events after the caches were flushed:
what a large kernel takes. `Clock.rotated` captures launches over different buffers in one CUDA graph: what a small
kernel takes inside a captured decode step, without the launch. Baseline and kernel take turns within one run; figures
are medians in milliseconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import machine
from headstart import _library

SLEEP_CYCLES = 3_000_000  # about 1.6 ms: longer than Python takes to launch what is timed


def environment() -> dict:
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "driver": driver(),
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        **machine.software(),
    }


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


class Clock:
    """Times callables in turn until each has its repeats or the time is up."""

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.l2_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 2**26)
        # Read before each launch, never written: dirty lines would be written back while the kernel is timed.
        self._other = torch.ones(max(2 * self.l2_bytes, 2**27) // 4, device="cuda")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def copies(self, bytes_a_call: int) -> int:
        """How many sets of buffers `rotated` needs, so that none is still in the cache when its turn comes again."""
        return max(2, -(-4 * self.l2_bytes // max(bytes_a_call, 1)))

    def cold(self, calls: dict[str, Callable], seconds: float = 1.5) -> dict[str, float]:
        for call in calls.values():
            call()
        torch.cuda.synchronize()

        def once(call: Callable) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._other.sum()
            torch.cuda._sleep(SLEEP_CYCLES)  # so that no event waits for Python
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end)

        return self._in_turn({name: lambda call=call: once(call) for name, call in calls.items()}, seconds)

    def rotated(self, calls: dict[str, Sequence[Callable]], seconds: float = 1.0) -> dict[str, float]:
        """Per call; each name has one callable for every set of buffers."""
        graphs = {name: (captured(each), len(each)) for name, each in calls.items()}

        def once(graph: torch.cuda.CUDAGraph, count: int) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP_CYCLES)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / count

        return self._in_turn({name: lambda pair=pair: once(*pair) for name, pair in graphs.items()}, seconds)

    def _in_turn(self, timed: dict[str, Callable[[], float]], seconds: float, repeats: int = 20) -> dict[str, float]:
        """At least three rounds of all, whatever they take."""
        times = {name: [] for name in timed}
        stop = time.monotonic() + min(seconds, max(self.left(), 0))
        for done in range(repeats):
            if done >= 3 and time.monotonic() > stop:
                break
            for name, once in timed.items():
                times[name].append(once())
        return {name: statistics.median(t) for name, t in times.items()}


def captured(calls: Sequence[Callable]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls, one after another."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def rooflines(clock: Clock) -> dict[str, float]:
    """The machine's limits: a large bfloat16 matrix product, a copy (bytes read and written), a sum (bytes read)."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    ms = clock.cold({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source), "read": lambda: source.sum()})
    copy = 2 * source.nbytes / ms["copy"] / 1e6
    return {
        "bf16_matmul_tflops": 2 * 8192**3 / ms["matmul"] / 1e9,
        "copy_gbps": copy,
        "read_gbps": max(source.nbytes / ms["read"] / 1e6, copy),
    }


class Results:
    """The rows of every family of benchmarks.

    The file is written anew after each row, so that a run that is stopped leaves what it measured. A run of some
    families leaves the others' rows as they were.
    """

    def __init__(self, path: Path, limits: dict[str, float], here: dict):
        self.path, self.limits, self._here = path, limits, here
        self._content = json.loads(path.read_text()) if path.is_file() else {"families": {}}
        self._family = ""

    @staticmethod
    def path_of(gpu: str) -> Path:
        return machine.RESULTS / f"{machine.device_slug(gpu)}.json"

    def begin(self, family: str) -> None:
        self._family = family
        self._content["families"][family] = {
            "environment": self._here, "rooflines": self.limits, "complete": False, "rows": [],
        }  # fmt: skip

    def end(self) -> None:
        self._content["families"][self._family]["complete"] = True
        self._write()

    def add(self, op: str, case: dict, ms: dict[str, float], *, server: str | None = None, **figures: float) -> None:
        """One measured case: what was timed, medians by name ("headstart" among them), and figures made from them."""
        server = server or _library.served_by("bitmap_decompress.out" if op == "bitmap_decompress" else op, "CUDA")
        row = {"op": op, "served_by": server, **case, "ms": ms, **figures}
        self._content["families"][self._family]["rows"].append(row)
        self._write()
        words = "  ".join(f"{name} {value}" for name, value in case.items())
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        mine = ms["headstart"]
        versus = "  ".join(f"{t / mine:.2f}x {name}" for name, t in ms.items() if name != "headstart")
        print(f"{op:<20} {words}  {mine:.4f} ms  {numbers}  {versus}  [{server}]", flush=True)

    def note(self, **values: object) -> None:
        """Something that a family found, beside its rows."""
        self._content["families"][self._family].update(values)
        self._write()

    def _write(self) -> None:
        machine.write_json(self._content, self.path)


def expect_right(op: str, case: dict, error: float, limit: float) -> None:
    """No time is kept of a wrong result."""
    if not error < limit:
        sys.exit(f"bench/gpu: {op} is wrong at {case}: error {error:.3g}, expected less than {limit}")


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.float() - exact.float()).abs().max() / exact.float().abs().max())

"""The machine: what it is, and what it can do at best, measured in the same run as the kernels.

A kernel's percentages stand against these rates: torch's own matrix product (2048³, bf16 and fp32), the fastest way we
know to read a tensor from memory, and a copy of one.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

import torch

from headstart import _library
from headstart.doctor import RELEVANT_FLAGS
from measure import interleave

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BUSY_LOAD = 0.5  # processes that run or wait beside us, averaged over a minute


def environment() -> dict:
    """What has to be known to read the numbers later."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    load = os.getloadavg()[0]
    status = _git("status", "--porcelain", "--", ":!bench/results")
    return {
        "cpu": fields.get("model name") or platform.machine(),
        "flags": [flag for flag in RELEVANT_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(),
        "tiers": _library.cpu_tiers(),
        "tier": _library.cpu_tier(),
        "torch": torch.__version__,
        "aten_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": round(load, 2),
        "busy": load > BUSY_LOAD,
    }


def slug(environment: dict) -> str:
    """A file name for the machine, e.g. ``amd-epyc-9v45-2-threads-avx512_bf16``."""
    name = re.sub(r"\((R|TM|C)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", environment["cpu"], flags=re.IGNORECASE)
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{name}-{environment['threads']}-threads-{environment['tier']}"


def cache_bytes() -> int:
    """The size of the largest cache of the first core; 32 MiB where Linux does not tell."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=32 << 20)


def cold_bytes() -> int:
    """How much has to be read before the caches hold nothing from before; at most 1 GiB, to fit small machines."""
    return min(max(4 * cache_bytes(), 128 << 20), 1 << 30)


def gemm_gflops(quick: bool = False) -> dict[str, float]:
    """The rate of torch's square matrix product by dtype: medians. 1024³ if quick, which is a little slower."""
    size, seconds, min_rounds = (1024, 0.3, 3) if quick else (2048, 2.0, 5)
    calls = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        calls[name] = lambda a=a, b=b: a @ b
        calls[name]()
    times = interleave(calls, seconds=seconds, min_rounds=min_rounds)
    return {name: 2 * size**3 / statistics.median(t) / 1e3 for name, t in times.items()}


def bandwidth(quick: bool = False) -> dict[str, float | str]:
    """GB/s read, by the best of several ways, and GB/s copied, counting what is read and what is written."""
    source = torch.ones(cold_bytes() // 4096, 1024)
    vector = torch.ones(1024)
    target = torch.empty_like(source)
    calls = {
        "sum": lambda: source.sum(),
        "max": lambda: source.amax(),
        "matrix-vector": lambda: torch.mv(source, vector),
        "copy": lambda: target.copy_(source),
    }
    for call in calls.values():
        call()
    times = interleave(calls, seconds=0.3 if quick else 2.0, min_rounds=5)
    rates = {name: source.nbytes / statistics.median(t) / 1e3 for name, t in times.items()}
    copy = 2 * rates.pop("copy")
    method = max(rates, key=rates.get)
    return {"read_gbs": rates[method], "read_method": method, "copy_gbs": copy}


def measure(quick: bool = False) -> dict:
    return {"gemm_gflops": gemm_gflops(quick), **bandwidth(quick)}


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

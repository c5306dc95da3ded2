"""The machine that a result was measured on, and the file that the result goes to.

`software`, `device_slug`, `write_json` and `git` work without headstart's CPU library; `environment` describes the CPU.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from headstart import _library
from headstart._files import write_whole
from headstart.doctor import RELEVANT_FLAGS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BUSY_LOAD = 0.5  # other processes that ran or waited, on average over the last minute


def software() -> dict:
    """The versions, the commit and the date: the same fields for a CPU and for a GPU."""
    status = git("status", "--porcelain", "--", ":!bench/results")
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "uncommitted": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def environment() -> dict:
    """What a reader must know about the CPU and the software to understand the numbers."""
    flags, load = cpu_flags(), os.getloadavg()[0]
    return {
        "cpu": cpuinfo().get("model name") or platform.machine(),
        "flags": [flag for flag in RELEVANT_FLAGS if flag in flags],
        "cores": len(cpus()),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(),
        "tiers": _library.cpu_tiers(),
        "tier": _library.cpu_tier(),
        "aten_capability": torch.backends.cpu.get_cpu_capability(),
        **software(),
        "load_average": round(load, 2),
        "busy": load > BUSY_LOAD,
    }


def device_slug(name: str) -> str:
    """A device's name as part of a file name: ``AMD EPYC 9V45 96-Core Processor`` becomes ``amd-epyc-9v45``."""
    name = re.sub(r"\((R|TM|C)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def slug(environment: dict) -> str:
    """The name of a CPU's results file, e.g. ``amd-epyc-9v45-2-threads-avx512_bf16``."""
    return f"{device_slug(environment['cpu'])}-{environment['threads']}-threads-{environment['tier']}"


def write_json(content: dict, path: Path) -> None:
    """Writes the file in one step: a reader finds the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))


def git(*arguments: str) -> str | None:
    """What git prints; None if git is missing or fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- the CPU ---------------------------------------------------------------------------------------------------------


def cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}


def cpu_flags() -> set[str]:
    fields = cpuinfo()
    return set((fields.get("flags") or fields.get("Features") or "").split())


def cpus() -> list[int]:
    """The processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cache_bytes(folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """The size of the largest level of cache: all caches of that level which serve this process's processors.

    Threads on several core complexes have several last-level caches, and data may stay in each of them. 32 MiB if Linux
    does not tell.
    """
    sizes: dict[tuple[str, str], int] = {}
    for cpu in cpus():
        for cache in (folder / f"cpu{cpu}" / "cache").glob("index*"):
            try:
                names = ("level", "shared_cpu_list", "size", "type")
                level, shared, size, kind = ((cache / name).read_text().strip() for name in names)
            except OSError:
                continue
            match = re.fullmatch(r"(\d+)([KMG]?)", size)
            if match and kind != "Instruction":
                sizes[level, shared] = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    levels: dict[str, int] = {}
    for (level, _), size in sizes.items():
        levels[level] = levels.get(level, 0) + size
    return max(levels.values(), default=32 << 20)


def cold_bytes() -> int:
    """How many bytes must be read until the caches hold no older data; at most 1 GiB, to fit small machines."""
    return min(max(4 * cache_bytes(), 128 << 20), 1 << 30)

"""Registers, stack and shared memory of the GPU kernels, read from their machine code: no GPU is needed.

``python bench/registers.py`` asks the built ``_cuda.so`` and compiles the Triton kernels (tests/test_triton_code.py).
It writes bench/results/registers.json, from which `pages.py` makes docs/registers.md.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "python/headstart/_cuda.so"
RESULTS = ROOT / "bench/results/registers.json"
TYPES = {"headstart::BFloat16": "bf16", "headstart::Float16": "fp16", "float": "fp32", "unsigned short": "16 bits"}
TYPES |= {"unsigned int": "32 bits", "unsigned char": "8 bits", "headstart::cuda::": "", "(anonymous namespace)::": ""}
FUNCTION = re.compile(r"Function (?P<name>.*?):\n\s*REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)")
HEAD = """# Registers of the GPU kernels

`python bench/pages.py` makes this page from `bench/results/registers.json`; do not edit it. `python bench/registers.py`
writes that file. No GPU is needed, because the figures stand in the machine code. A thread has at most 255 registers.
Stack is what does not fit, in bytes for each thread. Shared memory is in bytes for each block. CUDA C++ kernels ask for
most of it at launch; that part is not shown.
"""


def main() -> int:
    """Measures, and writes the results file."""
    import torch
    import triton

    if not LIBRARY.exists():
        print(f"registers: {LIBRARY} does not exist; run `HEADSTART_CUDA=ON make build`", file=sys.stderr)
        return 1
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    content = {
        "nvcc": re.search(r"release ([\d.]+)", version)[1],
        "triton": triton.__version__,
        "torch": torch.__version__,
        "cuda": cuda_kernels(),
        "triton_kernels": triton_kernels(),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def cuobjdump() -> str:
    """The program of the CUDA toolkit, or Triton's copy of it."""
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=bundled) or "cuobjdump"


def cuda_kernels() -> list[dict]:
    found, tool = [], cuobjdump()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tool, "-xelf", "all", LIBRARY], check=True, capture_output=True, cwd=folder)
        for cubin in sorted(Path(folder).iterdir()):
            target = re.search(r"\.(sm_\w+)\.cubin", cubin.name)[1]
            text = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
            text = subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout
            found += [{**kernel(match), "target": target} for match in FUNCTION.finditer(text)]
    return sorted(found, key=lambda row: (row["kernel"], row["case"], row["target"]))


def kernel(match: re.Match) -> dict:
    """The name of the kernel, and as its case what distinguishes it: its template arguments."""
    name = match["name"].removeprefix("void ")
    for long, short in TYPES.items():
        name = name.replace(long, short)
    name = name[: name.rindex("(")]
    base, _, arguments = name.partition("<")
    sizes = {field: int(match[field]) for field in ("registers", "stack", "shared")}
    return {"kernel": base, "case": arguments.removesuffix(">").strip(), **sizes}


def triton_kernels() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "registers.jsonl")
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_triton_code.py", "--registers", path]
        subprocess.run(command, check=True, cwd=ROOT)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page(content: dict) -> str:
    lines = [HEAD, f"nvcc {content['nvcc']}, Triton {content['triton']}, torch {content['torch']}.", ""]
    for title, rows in (("CUDA C++", content["cuda"]), ("Triton", content["triton_kernels"])):
        lines += [f"## {title}", "", *table(rows), ""]
    return "\n".join(lines)


def table(rows: list[dict]) -> list[str]:
    """A row for each kernel and case, with the figures of all targets."""
    targets = sorted({row["target"] for row in rows})
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["kernel"], row["case"]), {})[row["target"]] = row
    lines = [f"| kernel | case | {' | '.join(f'{target}: registers, stack, shared' for target in targets)} |"]
    lines.append(f"|---|---|{'--:|' * len(targets)}")
    for (name, case), of_target in found.items():
        cells = [of_target.get(target) for target in targets]
        words = [f"{c['registers']}, {c['stack']}, {c['shared']:,}" if c else "" for c in cells]
        lines.append(f"| {name.removesuffix('_kernel')} | {case} | {' | '.join(words)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

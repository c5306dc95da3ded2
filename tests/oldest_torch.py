"""What the oldest torch that headstart supports offers to a compiled library, kept as tests/data/torch-<version>.json.

Made from an installation of that torch, its CUDA build: ``<its python> tests/oldest_torch.py``. The tests compare the
sources and the built libraries with it, so that what only a newer torch has is found without that torch.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

DATA = Path(__file__).parent / "data"
# The folders of torch's headers that a library of the stable ABI may include.
STABLE = ("torch/csrc/stable", "torch/headeronly", "torch/csrc/inductor/aoti_torch/c")
LIBRARIES = ("libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")
EXPORTED = re.compile(r"(aoti_)?torch_\w+")


def headers(torch_root: Path) -> dict[str, Path]:
    """The files of `STABLE` by the names that sources include them with."""
    include = torch_root / "include"
    found = [path for folder in STABLE for path in sorted((include / folder).rglob("*.h"))]
    return {path.relative_to(include).as_posix(): path for path in found}


def macros(torch_root: Path) -> set[str]:
    names = set()
    for path in headers(torch_root).values():
        names |= set(re.findall(r"^[ \t]*#[ \t]*define[ \t]+(\w+)", path.read_text(errors="replace"), re.MULTILINE))
    return names


def exported(library: Path) -> set[str]:
    """The C functions that a shared library offers to users of the stable ABI."""
    command = ["nm", "--dynamic", "--defined-only", "--format=just-symbols", str(library)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {name for line in done.stdout.splitlines() if EXPORTED.fullmatch(name := line.partition("@")[0])}


def load(version: str) -> dict:
    return json.loads((DATA / f"torch-{version}.json").read_text())


def main() -> None:
    import torch

    root, version = Path(torch.__file__).parent, ".".join(torch.__version__.split(".")[:2])
    content = {
        "version": torch.__version__,
        "headers": sorted(headers(root)),
        "macros": sorted(macros(root)),
        "symbols": {name: sorted(exported(root / "lib" / name)) for name in LIBRARIES},
    }
    path = DATA / f"torch-{version}.json"
    path.write_text(json.dumps(content, indent=0) + "\n")
    print(f"{path}: torch {torch.__version__}, {len(content['macros'])} macros")


if __name__ == "__main__":
    main()

"""How Triton kernels are compiled for a GPU that is absent, and how their launches are recorded."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


class Recorder:
    """Stands in for a kernel and keeps what it would have been launched with."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.grid, self.args, self.options = grid, args, options

        return launch


def record(monkeypatch, *modules) -> dict[str, Recorder]:
    """Lets the kernels of these modules record their launches instead of running."""
    recorders = {}
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            recorders[name] = Recorder(getattr(module, name))
            monkeypatch.setattr(module, name, recorders[name])
    return recorders


def compile_launch(modules, monkeypatch, name: str, capability: int, call):
    """Compiles kernel `name` of one of `modules` as `call` last launches it on a device of this capability."""
    import triton

    if tool("ptxas") is None:
        pytest.skip("triton brings no ptxas, and there is none on the PATH")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from headstart.triton._common import Limits

    with monkeypatch.context() as patch:
        recorders = record(patch, *modules)
        for module in modules:
            if hasattr(module, "device_limits"):
                limits = Limits(SHARED_MEMORY[capability], 2**25, capability == 90)
                patch.setattr(module, "device_limits", lambda device, limits=limits: limits)
        call()
    kernel = recorders[name].kernel
    args, constants = recorders[name].args, dict(recorders[name].options)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    signature, attributes = {}, {}
    for position, (argument, value) in enumerate(zip(kernel.arg_names, args)):
        if isinstance(value, torch.Tensor):
            signature[argument] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if isinstance(value, float) else "i32"
    signature |= dict.fromkeys(constants, "constexpr")
    constants = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def tool(name: str) -> str | None:
    """The path of one of CUDA's programs: triton's own copy, or the one on the PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return str(bundled) if bundled.exists() else shutil.which(name)


def main_loop(ptx: str) -> str:
    """The shortest loop of a kernel's PTX that multiplies on tensor cores."""
    starts, loops = {}, []
    for at, line in enumerate(lines := ptx.splitlines()):
        if label := re.match(r"(\$L\w+):", line):
            starts[label[1]] = at
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if jump and jump[1] in starts:
            loops.append("\n".join(lines[starts[jump[1]] : at + 1]))
    return min((loop for loop in loops if "mma." in loop), key=len)


def resources(binary, folder: Path) -> dict[str, int] | None:
    """Registers and stack (spills) of a thread, from the cubin; None where there is no cuobjdump."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        return None
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    text = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": binary.metadata.shared}

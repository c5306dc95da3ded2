"""What nvcc made of the CUDA kernels, read from the library that was built: no GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import headstart

LIBRARY = Path(headstart.__file__).parent / "_cuda.so"
MAGIC = {"Float16": "0x64006400", "BFloat16": "0x43004300", "float32": "0x4b000000"}
MASK = {"Float16": "0xf000f0?", "BFloat16": "0xf000f", "float32": "0xf"}
FEW_ROWS = {
    "Float16": "Int4BlockINS_7Float16ELi1E",
    "BFloat16": "Int4BlockINS_8BFloat16ELi1E",
    "float32": "Int4BlockIfLi1E",
}


@pytest.fixture(scope="module")
def cuobjdump():
    """Runs cuobjdump, of the CUDA toolkit or of Triton."""
    triton = importlib.util.find_spec("triton")
    bundled = [Path(folder) / "backends/nvidia/bin" for folder in (triton.submodule_search_locations if triton else [])]
    tool = next(filter(None, (shutil.which("cuobjdump", path=path) for path in (None, *bundled))), None)
    if tool is None or not LIBRARY.exists():
        pytest.skip(f"needs cuobjdump and {LIBRARY}")

    def run(*arguments: str | Path, cwd: Path | None = None) -> str:
        return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True, cwd=cwd).stdout

    return run


@pytest.fixture(scope="module")
def resources(cuobjdump) -> list[tuple[str, int, int]]:
    """Of every kernel and target: its mangled name, and its bytes of stack and of local memory."""
    pattern = r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    found = re.findall(pattern, cuobjdump("-res-usage", LIBRARY))
    return [(name, int(stack), int(local)) for name, stack, local in found]


@pytest.fixture(scope="module")
def cubins(cuobjdump, tmp_path_factory) -> list[Path]:
    """The files of machine code in the library, one a source and target."""
    folder = tmp_path_factory.mktemp("cubins")
    cuobjdump("-xelf", "all", LIBRARY, cwd=folder)
    return list(folder.iterdir())


def test_no_kernel_spills_registers(resources):
    assert len(resources) > 50
    assert [kernel for kernel in resources if kernel[1] or kernel[2]] == []


@pytest.mark.parametrize("dtype", MAGIC)
def test_a_pair_of_int4_weights_takes_one_logic_instruction(cuobjdump, resources, cubins, dtype):
    """Its code is cut out of the word and put into the magic number at once; 0xea is (a & b) | c."""
    names = {name for name, *_ in resources if FEW_ROWS[dtype] in name}
    assert len(names) == 1
    name = names.pop()
    holders = [cubin for cubin in cubins if name.encode() in cubin.read_bytes()]
    assert holders
    for cubin in holders:
        target = cuobjdump("-sass", "-fun", name, cubin)
        assert f"Function : {name}" in target
        assert not re.search(rf"LOP3\.LUT .*{MAGIC[dtype]}", target)
        assert len(re.findall(rf"LOP3\.LUT R\d+, R\d+(\.reuse)?, {MASK[dtype]}, R\d+(\.reuse)?, 0xea", target)) >= 16

"""`make gpu` cannot pass without having run the CUDA library's kernels: without a GPU, or with a broken library.

No GPU is needed: a `sitecustomize` module tells torch that it has one, and each test makes the library that it wants.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("gpu-smoke", "gpu-test", "gpu-bench", "gpu-profile")
A_GPU = """
import torch
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda *_: "a GPU"
torch.cuda.get_device_capability = lambda *_: (9, 0)
"""
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what `make gpu` needs, without compiled libraries, under a torch that says it has a GPU."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("python", "tests", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(A_GPU)
    return tmp_path


def make(tree: Path, target: str, *options: str, gpu: bool = True, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(tree / "site") if gpu else ""} | environment
    command = ["make", "-C", tree, target, f"PYTHON={sys.executable}", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def empty_library(path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (path.parent / "empty.cpp").write_text('extern "C" int nothing() { return 0; }\n')
    subprocess.run([compiler, "-shared", "-fPIC", path.parent / "empty.cpp", "-o", path], check=True)


def test_every_step_begins_with_the_gate(tree):
    gate = make(tree, "gpu-build-now", "GPU_PREBUILT=1", "--dry-run").stdout.splitlines()
    assert len(gate) == 3 and gate[1].endswith("-m headstart_launcher doctor --gpu")  # between make's own two lines
    for step in STEPS:
        commands = make(tree, f"{step}-now", "--dry-run").stdout.splitlines()
        assert commands[1] == gate[1] and len(commands) > len(gate), step


def test_a_library_that_cannot_be_loaded_fails_the_whole(tree):
    library = tree / "python" / "headstart" / "_cuda.so"
    library.write_bytes(b"not a library")
    done = make(tree, "gpu", "GPU_PREBUILT=1")
    assert done.returncode != 0
    assert "headstart: the CUDA kernels cannot run here. Cause: " in done.stderr
    assert f"{library}: file too short" in done.stderr and "make gpu-build" in done.stderr
    assert "passed" not in done.stdout and "right" not in done.stdout


def test_the_tests_themselves_fail_where_another_would_stand_in(tree):
    (tree / "python" / "headstart" / "_cuda.so").write_bytes(b"not a library")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(tree / name) for name in ("site", "python", "tests"))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_cuda_graphs.py",
        "-q",
        "-k",
        "test_side_streams",
    ]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "1 error" in done.stdout, done.stdout + done.stderr
    assert "the CUDA kernels cannot run here. Cause: " in done.stdout and "file too short" in done.stdout


def test_a_library_that_serves_nothing_fails_the_whole(tree):
    empty_library(tree / "python" / "headstart" / "_cuda.so")
    done = make(tree, "gpu", "GPU_PREBUILT=1", GPU_STEPS="gpu-smoke")
    assert done.returncode != 0
    assert "_cuda.so is loaded and has no operators of headstart. Cure: run `make gpu-build`" in done.stderr


def test_no_gpu_and_no_compiler_are_one_line_each(tree):
    done = make(tree, "gpu", gpu=False, CUDA_VISIBLE_DEVICES="")
    words = [line for line in done.stderr.splitlines() if line.startswith("headstart:")]
    assert done.returncode != 0 and len(words) == 1
    assert "needs a CUDA device" in words[0] or "nvcc not found" in words[0]
    without = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
    if shutil.which("make", path=without) is None:
        pytest.skip("make stands beside nvcc")
    done = make(tree, "gpu-build", PATH=without)
    words = [line for line in done.stderr.splitlines() if line.startswith("headstart:")]
    assert done.returncode != 0 and len(words) == 1
    assert "nvcc not found. Install the CUDA toolkit or add its bin folder to PATH." in words[0]


def test_the_first_call_that_a_stand_in_serves_warns_with_the_cause(tree):
    (tree / "python" / "headstart" / "_cuda.so").write_bytes(b"not a library")
    script = (
        "import warnings, headstart; from headstart import _library\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    _library._warn_if_kernel_is_missing('int4_gemm', ())\n"
        "    for _ in range(2): _library._warning_stand_in(print)('ran')\n"
        "print(len(seen), seen[0].message)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree / "site"), str(tree / "python")])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second, message = done.stdout.splitlines()
    assert (first, second) == ("ran", "ran")
    assert message.startswith("1 headstart: the cuda kernels are not loaded, so Triton's kernels run in its place.")
    assert "file too short" in message


def test_the_smoke_test_runs_every_operator_of_the_library():
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests")])}
    script = "import gpu_smoke; print(*gpu_smoke.CASES); print(*gpu_smoke.INT4_ROWS)"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    cases, rows = (line.split() for line in done.stdout.splitlines())
    listed = re.findall(
        r'^HEADSTART_(?:CUDA_)?OPERATOR\("([\w.]+)"', (ROOT / "csrc" / "kernels.inc").read_text(), re.MULTILINE
    )
    assert len(listed) > 5 and set(listed) == set(cases)
    assert rows == ["1", "12", "40", "200"]

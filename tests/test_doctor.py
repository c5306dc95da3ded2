"""`headstart doctor` tells the cause and the cure, in whatever state the installation is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import headstart
import headstart_launcher
from headstart import _library

SOURCE = Path(headstart.__file__).resolve().parents[1]


def doctor(*arguments: str, path: tuple[Path | str, ...] = (SOURCE,), **environment: str) -> tuple[int, str]:
    """Exit code and output of `headstart doctor`, with `path` ahead of the installed packages."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | environment
    command = [sys.executable, "-m", "headstart_launcher", "doctor", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done.returncode, done.stdout


def fake_module(folder: Path, name: str, code: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    return folder


def copy_of_the_package(folder: Path) -> Path:
    """A folder with the package's Python files and no compiled library."""
    shutil.copytree(SOURCE / "headstart", folder / "headstart", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(SOURCE / "headstart_launcher.py", folder)
    return folder


@pytest.fixture(scope="module")
def report() -> dict:
    code, output = doctor("--json")
    found = json.loads(output)
    assert found["healthy"] == (code == 0)
    return found


def test_report_agrees_with_the_package(report):
    assert report["healthy"] == (_library.cpu.handle is not None)
    assert report["headstart"] == {"version": headstart.__version__, "path": str(SOURCE / "headstart")}
    assert report["torch"]["version"] == torch.__version__
    assert report["cpu"]["tiers"] == _library.cpu_tiers()
    assert report["libraries"]["cpu"]["loaded"] == (_library.cpu.handle is not None)
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("headstart::")}
    assert set(report["operators"]) == names >= {"sparse_attention", "merge_attention"}
    for name, served in report["operators"].items():
        assert (served["CPU"] == "_cpu.so") == _library.has_kernel(name, "CPU"), name


def test_text_names_the_tiers_and_every_operator(report):
    if _library.cpu.handle is None:
        pytest.skip(f"no compiled CPU kernels: {_library.cpu.error}")
    text = [line for _, line in headstart_launcher.load("doctor").lines(report)]
    assert text[-1] == "healthy"
    assert f"  tiers found    {' '.join(_library.cpu_tiers())}" in text
    for name in _library.cpu.operators():
        row = next(line for line in text if line.split()[:1] == [name])
        assert row.split()[1] == "_cpu.so", row


def test_forced_tier_is_shown():
    if "generic" not in _library.cpu_tiers():
        pytest.skip("no compiled CPU kernels")
    code, output = doctor(HEADSTART_ISA="generic")
    assert code == 0
    assert "tier in use    generic (HEADSTART_ISA)" in output


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_broken_torch(tmp_path, arguments):
    fake_module(tmp_path, "torch", "raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    code, output = doctor(*arguments, path=(tmp_path, SOURCE))
    assert code == 1
    assert "libtorch_cpu.so: cannot open shared object file" in output
    assert "pip install 'torch>=2.11'" in output


def test_broken_package(tmp_path):
    package = copy_of_the_package(tmp_path) / "headstart"
    (package / "_library.py").write_text("raise AttributeError('module torch has no attribute library')")
    code, output = doctor(path=(tmp_path,))
    assert code == 1
    assert "import headstart: AttributeError: module torch has no attribute library" in output
    assert "cure" in output


def test_import_that_kills_the_process(tmp_path):
    fake_module(tmp_path, "torch", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    code, output = doctor(path=(tmp_path, SOURCE))
    assert code == 1
    assert "died of SIGILL" in output
    assert "HEADSTART_ISA=generic" in output


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_library_missing_or_damaged(tmp_path, content):
    package = copy_of_the_package(tmp_path) / "headstart"
    if content is not None:
        (package / "_cpu.so").write_bytes(content)
    code, output = doctor("--json", path=(tmp_path,))
    report = json.loads(output)
    assert code == 1
    cause = report["problems"][0]["cause"]
    assert str(package / "_cpu.so") in cause
    assert ("does not exist" in cause) == (content is None)
    assert "make build" in report["problems"][0]["cure"]
    assert report["operators"]["sparse_attention"]["CPU"] == "torch"


def test_report_without_rich_and_typer(tmp_path):
    fake_module(tmp_path, "torch", "raise ImportError('gone')")
    fake_module(tmp_path, "rich", "raise ImportError('no rich')")
    fake_module(tmp_path, "typer", "raise ImportError('no typer')")
    code, output = doctor(path=(tmp_path, SOURCE))
    assert code == 1
    assert "import torch: ImportError: gone" in output


def test_other_commands_say_what_is_missing_in_one_line(tmp_path):
    fake_module(tmp_path, "torch", "raise ModuleNotFoundError('No module named torch', name='torch')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCE}"}
    command = [sys.executable, "-m", "headstart_launcher", "demo"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("headstart: No module named torch")
    assert "headstart doctor" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_does_not_import_torch(tmp_path):
    fake_module(tmp_path, "torch", "raise ImportError('imported')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCE}", "COLUMNS": "100"}
    command = [sys.executable, "-m", "headstart_launcher", "--help"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("demo", "bench", "doctor"))

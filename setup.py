"""Compiles the kernels with CMake for `pip install .`; everything else is in pyproject.toml.

`pip install -e .` and `python setup.py build_ext --inplace` put the libraries into `python/headstart` and keep
their objects in `build/`, as `make build` does, so that nothing is compiled twice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCE_PACKAGE = ROOT / "python" / "headstart"
RELEASE = "-DCMAKE_BUILD_TYPE=Release"
NO_COMPILER = (
    "headstart: no C++ compiler found. Install one: `apt install build-essential` (Debian, Ubuntu), "
    "`dnf install gcc-c++` (Fedora), or set CXX to a compiler that knows C++17."
)


def jobs() -> int:
    """Compile jobs at once: one a core, and 2 GB of free memory for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, available // 2_000_000_000))


def check_compiler() -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name):
        raise SystemExit(NO_COMPILER)


class CMakeBuild(build_ext):
    """Builds every kernel library and installs it beside the Python files, in the source tree or in the wheel."""

    def run(self) -> None:
        check_compiler()
        package = self.destination()
        build = ROOT / "build" if package == SOURCE_PACKAGE else Path(self.build_temp).resolve()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        self.call("cmake", "-S", ROOT, "-B", build, *generator, f"-DPython_EXECUTABLE={sys.executable}", RELEASE)
        self.call("cmake", "--build", build, "--parallel", jobs())
        self.call("cmake", "--install", build, "--prefix", package)

    def destination(self) -> Path:
        return SOURCE_PACKAGE if self.inplace or self.editable_mode else Path(self.build_lib).resolve() / "headstart"

    def call(self, *command: object) -> None:
        words = [str(word) for word in command]
        try:
            subprocess.run(words, check=True)
        except FileNotFoundError:
            raise SystemExit(f"headstart: {words[0]} not found. Install it: `pip install cmake ninja`.") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"headstart: `{' '.join(words)}` failed with exit code {error.returncode}.") from None

    # What setuptools asks of a build_ext; the one extension below only tells it that there is something to compile.

    def get_outputs(self) -> list[str]:
        return [] if self.destination() == SOURCE_PACKAGE else [str(path) for path in self.destination().glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
        return [str(path.relative_to(ROOT)) for path in [ROOT / "CMakeLists.txt", *sources]]


setup(ext_modules=[Extension("headstart._kernels", sources=[])], cmdclass={"build_ext": CMakeBuild})

"""One build serves every torch from the oldest that is named on: its symbols, headers, macros, and the errors told."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import oldest_torch
from headstart import _library

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
OLDEST = oldest_torch.load(_library.OLDEST_TORCH)
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
LIBRARIES = (_library.cpu, _library.cuda)

# --- the version ---------------------------------------------------------------------------------------------------


def test_every_place_names_the_same_oldest_torch():
    oldest = _library.OLDEST_TORCH
    assert OLDEST["version"].startswith(f"{oldest}.")
    assert set(re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())) == {oldest}
    cmake = (ROOT / "CMakeLists.txt").read_text()
    major, minor = map(int, oldest.split("."))
    assert f"set(HEADSTART_OLDEST_TORCH {oldest})" in cmake
    assert f"set(HEADSTART_TORCH_TARGET 0x{major:02x}{minor:02x}{'00' * 6})" in cmake


# --- sources -------------------------------------------------------------------------------------------------------


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)


def test_sources_include_only_headers_of_the_oldest_torch():
    included = {
        (name, path.name)
        for path in SOURCES
        for name in re.findall(r'#\s*include\s*[<"]((?:torch|ATen|c10)/[^>"]+)[>"]', path.read_text())
    }
    assert included, "no source includes a header of torch"
    newer = sorted((name, source) for name, source in included if name not in OLDEST["headers"])
    assert newer == [], f"torch {OLDEST['version']} does not have these headers, or not in its stable ABI"


def test_sources_use_only_macros_of_the_oldest_torch():
    newer = oldest_torch.macros(TORCH) - set(OLDEST["macros"])
    used = {
        (name, path.name)
        for path in SOURCES
        for name in re.findall(r"\b[A-Z][A-Z0-9_]{3,}\b", without_comments(path.read_text()))
        if name in newer
    }
    assert used == set(), f"torch {OLDEST['version']} does not define these macros"


# --- built libraries -----------------------------------------------------------------------------------------------


@pytest.fixture(params=LIBRARIES, ids=lambda library: library.path.name)
def library(request) -> Path:
    if not request.param.path.exists():
        pytest.skip(f"{request.param.path} is not built")
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("binutils are not installed")
    return request.param.path


def lines(*command: object) -> list[str]:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.splitlines()


def undefined(library: Path) -> set[str]:
    """The names that a library must find elsewhere, without those that it can do without."""
    parts = (line.split() for line in lines("nm", "--dynamic", "--undefined-only", library))
    return {name.partition("@")[0] for kind, name in parts if kind == "U"}


def needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.*)\]", "\n".join(lines("readelf", "--dynamic", library)))


def exports(library: Path) -> set[str]:
    return {line.partition("@")[0] for line in lines("nm", "-D", "--defined-only", "--format=just-symbols", library)}


def found_by_the_loader() -> dict[str, Path]:
    cache = shutil.which("ldconfig") or "/sbin/ldconfig"
    pairs = (line.split(" => ") for line in lines(cache, "-p") if " => " in line)
    return {name.split()[0]: Path(place.strip()) for name, place in pairs}


def test_every_symbol_is_in_a_library_that_is_named(library):
    system, offered, seen = found_by_the_loader(), set(), set()
    waiting = needed(library)
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(waiting)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        place = TORCH / "lib" / name if (TORCH / "lib" / name).exists() else system.get(name)
        if place is None:
            continue
        offered |= exports(place)
        if place.parent == TORCH / "lib":
            waiting += [other for other in needed(place) if (TORCH / "lib" / other).exists()]
    missing = undefined(library) - offered
    if library == _library.cuda.path:  # here torch may be built without CUDA, and the CUDA runtime may be missing
        missing -= set(OLDEST["symbols"]["libtorch_cuda.so"])
        if any(name.startswith("libcudart.so") for name in seen):
            missing = {name for name in missing if not re.match(r"(__)?cuda[A-Z]", name)}
    assert missing == set(), f"{library.name} names {sorted(seen)}, and none of them has these symbols"


def test_every_symbol_of_torch_is_in_the_oldest_torch(library):
    wanted = {name for name in undefined(library) if oldest_torch.EXPORTED.fullmatch(name)}
    assert len(wanted) > 10
    there = set(OLDEST["symbols"]["libtorch_cpu.so"])
    if library == _library.cuda.path:
        there |= set(OLDEST["symbols"]["libtorch_cuda.so"])
    assert wanted - there == set(), f"torch {OLDEST['version']} does not have these symbols"


# --- what the user is told -----------------------------------------------------------------------------------------


def fresh(path: Path) -> _library.CompiledLibrary:
    library = _library.CompiledLibrary("cpu", "build it again")
    library.path = path
    return library


def test_a_torch_too_old_is_named_with_the_cure(tmp_path, monkeypatch):
    path = tmp_path / "_cpu.so"
    path.write_bytes(b"anything")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    library = fresh(path)
    library.load()
    assert library.error == f"torch here is 2.9.1+cpu, and {path} needs {_library.OLDEST_TORCH} or later"
    assert library.cure == f"pip install 'torch>={_library.OLDEST_TORCH}'"


def test_a_library_for_another_torch_is_named_with_the_missing_symbol(tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "other.cpp"
    source.write_text(
        f'#define HEADSTART_BUILT_WITH_TORCH "3.1.0+cu140"\n#include "{ROOT / "csrc" / "torch" / "built_with.h"}"\n'
        'extern "C" int aoti_torch_of_the_future(); extern "C" int wanted() { return aoti_torch_of_the_future(); }\n'
        "int now = wanted();\n"
    )
    path = tmp_path / "_cpu.so"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", path], check=True)
    library = fresh(path)
    library.load()
    assert library.handle is None
    assert "undefined symbol: aoti_torch_of_the_future" in library.error
    assert f"(built with torch 3.1.0+cu140; torch here is {torch.__version__})" in library.error


def test_this_torch_is_not_too_old():
    assert _library._release(torch.__version__) >= _library._release(_library.OLDEST_TORCH)
    assert _library._release("2.10.0a0+git1") < _library._release("2.11") <= _library._release("2.11.0+cu130")

"""What the package promises as a whole: its version, its libraries' symbols, its links, its order of imports."""

from __future__ import annotations

import ast
import ctypes
import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import headstart
from headstart import _library

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "headstart"

# --- version -------------------------------------------------------------------------------------------------------


def test_version_is_the_installed_one():
    try:
        installed = importlib.metadata.version("headstart")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("headstart runs from the source tree and is not installed")
    assert installed == headstart.__version__


# --- libraries -----------------------------------------------------------------------------------------------------


def cpu_library() -> Path:
    if not _library.cpu.path.exists():
        pytest.skip(f"{_library.cpu.path} is not built")
    return _library.cpu.path


def symbols(*options: str) -> list[str]:
    library = cpu_library()
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "--dynamic", "--demangle", *options, str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines, f"nm finds no symbols in {library}"
    return [re.sub(r"^[0-9a-f]*\s*[A-Za-z]\s", "", line) for line in lines]


def test_library_needs_only_the_stable_abi():
    unstable = [name for name in symbols("--undefined-only") if re.match(r"(.*\s)?(at|c10|torch)::", name)]
    assert unstable == [], "these symbols change from one torch to the next"


def test_library_has_the_tier_functions():
    defined = symbols("--defined-only")
    for name in ("headstart_cpu_tiers", "headstart_cpu_tier", "headstart_set_cpu_tier"):
        assert name in defined


def test_every_cpu_kernel_is_registered():
    cpu_library()
    assert _library.cpu.error is None
    prefix = f"{_library.NAMESPACE}::"
    defined = {n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)}
    served = set(_library.cpu.operators())
    only_on_gpus = {"_sparse_attention_sm90"}
    assert defined - served == {"a_shape_index", *only_on_gpus}, (
        "the other operators have CPU kernels; a_shape_index has nothing to compute"
    )
    assert {name: _library.served_by(name, "CPU") for name in served} == dict.fromkeys(served, "_cpu.so")


def test_tiers_start_with_generic_and_can_be_set():
    if _library.cpu.handle is None:
        pytest.skip(f"no compiled CPU kernels: {_library.cpu.error}")
    tiers, before = _library.cpu_tiers(), _library.cpu_tier()
    assert tiers[0] == "generic"
    assert before in tiers
    try:
        for tier in tiers:
            _library.set_cpu_tier(tier)
            assert _library.cpu_tier() == tier
        with pytest.raises(ValueError, match="set_cpu_tier: name: expected one of .*, got 'sse9'"):
            _library.set_cpu_tier("sse9")
        assert isinstance(_library.cpu.handle, ctypes.CDLL)
    finally:
        _library.set_cpu_tier(before)


# --- pages ---------------------------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_anchors_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name}: {target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ +(.*)$", linked.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name}: {target}: no such heading"


def test_every_make_target_a_page_names_exists():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z-]+)", page.read_text()))
        assert named <= targets, f"{page.name}: no target {named - targets} in the Makefile"


# --- imports -------------------------------------------------------------------------------------------------------

# From the bottom up: a file imports from its own layer and from those before it. The longest name counts.
LAYERS = (
    ("_library", "_expect", "_files", "_environment", "_quiet", "_stream"),
    ("reference", "triton"),
    ("ops",),
    ("attention",),
    ("weights",),
    ("context", "stream"),
    ("model",),
    ("commands", "", "doctor", "cli", "__main__"),
)
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}


def layer_of(module: str) -> int:
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    found = next((name for name in names if name in LAYER), None)
    assert found is not None, f"{module} is in no layer of LAYERS"
    return LAYER[found]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below headstart; the package itself is the empty name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, inside functions too, but not for type checkers only."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "headstart"}
        elif isinstance(node, ast.ImportFrom):
            here = module.split(".") if module else []
            if path.name != "__init__.py":
                here = here[:-1]
            if node.level:
                base = here[: len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
            elif node.module.split(".")[0] == "headstart":
                base = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in known else ".".join(base))
    return found - {module}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {module: imports(module, path, known) for module, path in known.items()}


def test_imports_point_down_only():
    upward = []
    for module, targets in graph().items():
        for target in sorted(targets):
            if layer_of(target) > layer_of(module):
                upward.append(f"{module} imports {target or 'headstart'}")
    assert upward == []


def test_imports_have_no_circles():
    edges = graph()
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join([*trail, module])}"
        if module not in done:
            for target in edges.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())

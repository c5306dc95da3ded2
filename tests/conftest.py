"""Fixtures and markers of all tests. Runs without hypothesis, and without CUDA."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

import backends

try:
    import hypothesis
except ImportError:
    hypothesis = None
else:
    # No deadlines: the first example of a shape pays for warm-up, and the sanitizers slow everything down.
    hypothesis.settings.register_profile("local", deadline=None)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="leave out slow tests, and all tiers but the best and the generic one"
    )
    parser.addoption("--gpu-report", type=Path, help="a file that gets a line of JSON for every test, as it ends")
    parser.addoption("--registers", type=Path, help="a file that gets a line of JSON for every compiled Triton kernel")


def pytest_configure(config: pytest.Config) -> None:
    # Under pytest-xdist the reports of all workers come to the process that started them, which alone writes.
    if config.getoption("--gpu-report") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ResultsAsTheyCome(config.getoption("--gpu-report")))


class ResultsAsTheyCome:
    """So that a run that is stopped leaves what it found."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            words = {} if report.outcome != "failed" else {"error": report.longreprtext[-4000:]}
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), **words}
            self._file.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def left_out(item: pytest.Item) -> bool:
        interpreted = item.get_closest_marker("interpreted") is not None
        slow = item.get_closest_marker("slow") is not None and config.getoption("--quick")
        return slow or interpreted != backends.INTERPRETED

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    if "ops" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("places")
        kinds = backends.KINDS if marker is None else marker.args
        found = backends.parameters(metafunc.module.STEM, kinds, quick)
        nowhere = pytest.param(None, marks=() if backends.INTERPRETED else backends.interpreted)  # left out, see above
        metafunc.parametrize("ops", found or [nowhere], indirect=True)
    if "cpu_tier" in metafunc.fixturenames:
        metafunc.parametrize("cpu_tier", backends.tiers(quick), indirect=True)


@pytest.fixture
def ops(request: pytest.FixtureRequest):
    """The operators of the file's `STEM`, in one place after the other (backends.py)."""
    with backends.opened(request.module.STEM, *request.param, request) as operators:
        yield operators


@pytest.fixture
def cpu_tier(request: pytest.FixtureRequest):
    """Runs the test once in every instruction-set tier of this CPU; its value is the tier's name."""
    with backends.cpu_tier(request.param) as name:
        yield name


@pytest.fixture
def gpu() -> None:
    """A GPU whose CUDA library serves every operator."""
    backends.require_cuda_kernels()


# --- Triton ---


@pytest.fixture
def check_resources(request: pytest.FixtureRequest, tmp_path: Path):
    """Checks a compiled Triton kernel: it fits its target's shared memory, and has no more than `stack` bytes of stack.

    A kernel with a `case` is added to the file of ``--registers``.
    """
    from triton_testing import SHARED_MEMORY, resources

    def check(binary, name: str, capability: int, case: str | None = None, stack: int = 0) -> None:
        assert binary.metadata.shared <= SHARED_MEMORY[capability]
        used = resources(binary, tmp_path)
        if used is None:
            return
        path = request.config.getoption("--registers")
        if path and case is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kernel": name, "target": f"sm_{capability}", "case": case, **used}) + "\n")
        assert used["stack"] <= stack, f"spills: {used}"

    return check


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch):
    """Triton's interpreter, with what it lacks: scalars under numpy 2.4, bfloat16 arithmetic, and some speed."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def dot(self, a, b, d, *rest):
        return create_dot(self, widened(a), widened(b), d, *rest)

    # Every call of a nested function patches the whole language again, which is most of the time a test takes.
    patch_language, restore, done = interpreter._patch_lang, interpreter._LangPatchScope.restore, set()

    def patch_once(function):
        modules = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if modules in done:
            return interpreter._LangPatchScope()
        done.add(modules)
        return patch_language(function)

    def restored(scope):
        done.clear()
        restore(scope)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter._LangPatchScope, "restore", restored)
    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        nearest = torch.from_numpy(numpy.array(data, numpy.float32)).bfloat16()
        return nearest.view(torch.int16).numpy().view(numpy.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """Memory that kernels are to write starts as NaN, or as all ones."""
    new_empty = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):
        fresh = new_empty(self, *args, **kwargs)
        return fresh.fill_(math.nan if fresh.dtype.is_floating_point else -1)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)

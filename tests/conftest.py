"""Fixtures and markers of all tests. Runs without hypothesis, and without CUDA."""

from __future__ import annotations

import math
import os

import pytest
import torch

from headstart import _library

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cpu_tier" in metafunc.fixturenames:
        tiers = _library.cpu_tiers() or ["no compiled CPU kernels"]
        quick = metafunc.config.getoption("--quick")
        chosen = list(dict.fromkeys([tiers[0], _library.cpu_tier() or tiers[-1]])) if quick else tiers
        metafunc.parametrize("cpu_tier", chosen, indirect=True)


@pytest.fixture
def cpu_tier(request: pytest.FixtureRequest):
    """Runs the test once in every instruction-set tier of this CPU; its value is the tier's name."""
    if not _library.cpu_tiers():
        pytest.skip(f"no compiled CPU kernels: {_library.cpu.error}")
    before = _library.cpu_tier()
    _library.set_cpu_tier(request.param)
    yield request.param
    _library.set_cpu_tier(before)


# --- Triton ---


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

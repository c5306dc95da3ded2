"""Fixtures and markers of all tests. Runs without hypothesis, and without CUDA."""

from __future__ import annotations

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_library.cpu_tiers() or ["no compiled CPU kernels"])
def cpu_tier(request: pytest.FixtureRequest):
    """Runs the test once in every instruction-set tier of this CPU; its value is the tier's name."""
    if not _library.cpu_tiers():
        pytest.skip(f"no compiled CPU kernels: {_library.cpu.error}")
    before = _library.cpu_tier()
    _library.set_cpu_tier(request.param)
    yield request.param
    _library.set_cpu_tier(before)

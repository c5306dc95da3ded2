"""pytest-benchmark suites of the same cases as `run.py`: ``pytest bench --benchmark-only -k "sparse and bf16"``."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import cases


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("headstart benchmarks")
    group.addoption("--tokens", type=int, default=2048, help="sequence length (default 2048)")
    group.addoption("--flex", action="store_true", help="also FlexAttention; compiling it takes minutes")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's FAMILIES become tests, one for each work. The tests of a group follow each other and share tensors."""
    if "family_work" in metafunc.fixturenames:
        tokens, flex = metafunc.config.getoption("tokens"), metafunc.config.getoption("flex")
        params = [
            pytest.param((spec, name), id=f"{spec}-{name.replace(' ', '_')}")
            for family in metafunc.module.FAMILIES
            for spec in cases.specs(family, tokens, flex=flex)
            for name in spec.names
        ]
        metafunc.parametrize("family_work", params, indirect=True)


@functools.lru_cache(maxsize=1)  # keeps the tensors of one group at a time
def _works(spec: cases.Spec) -> dict[str, cases.Work]:
    return {work.name: work for work in spec.build()}


@pytest.fixture
def family_work(request: pytest.FixtureRequest, benchmark) -> cases.Work:
    """One work to time, in the benchmark group of its spec."""
    spec, name = request.param
    work = _works(spec)[name]
    benchmark.group = spec.title
    benchmark.extra_info.update(flops=work.flops, bytes=work.bytes, density=work.density)
    return work

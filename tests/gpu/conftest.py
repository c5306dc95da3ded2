"""GPU tests: skipped without a GPU, failed where there is one and the CUDA library does not serve it.

`make gpu-test` runs them; only here do the Triton and CUDA kernels run as machine code. With ``--gpu-report FILE``
every result is written as it comes, so that a run that is stopped leaves what it found.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from headstart import _library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", type=Path, help="a file that gets a line of JSON for every test, as it ends")


def pytest_configure(config: pytest.Config) -> None:
    # Under pytest-xdist the reports of all workers come to the process that started them, which alone writes.
    if config.getoption("--gpu-report") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ResultsAsTheyCome(config.getoption("--gpu-report")))


class ResultsAsTheyCome:
    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            words = {} if report.outcome != "failed" else {"error": report.longreprtext[-4000:]}
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), **words}
            self._file.write(json.dumps(line) + "\n")


@pytest.fixture(scope="session", autouse=True)
def every_cuda_kernel() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    missing = _library.missing_gpu_kernels()
    if missing is not None:
        pytest.fail(f"the CUDA kernels cannot run here. Cause: {missing[0]}. Cure: {missing[1]}.", pytrace=False)


@pytest.fixture(autouse=True)
def poisoned(every_cuda_kernel) -> None:
    """Fills memory that the allocator hands out again with NaN, so that what a kernel leaves unwritten shows."""
    torch.cuda.empty_cache()
    for _ in range(2):
        torch.full((2**26,), math.nan, device="cuda")

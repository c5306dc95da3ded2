"""All tests that need Triton's interpreter, in processes of their own: it must be chosen before triton is imported.

To see them one by one: ``TRITON_INTERPRET=1 pytest tests/test_<stem>.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from backends import INTERPRETED, STEMS

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_in_the_interpreter(stem: str):
    assert not INTERPRETED
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file = Path(__file__).with_name(f"test_{stem}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-2000:]

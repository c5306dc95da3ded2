"""Which kernels run: the tier that the environment asks for, and the operators without a compiled library."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import headstart
from headstart import _library

SCRIPT = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import headstart
    from headstart import _library
    q = torch.randn(1, 2, 70, 16)
    index = headstart.block_topk_index(q, q, 1)
    out, _ = headstart.sparse_attention(q, q, q, index)
    headstart.merge_attention(out, torch.zeros(1, 2, 70), out, torch.zeros(1, 2, 70))
scores = (q @ q.mT / 4).masked_fill(~index.to_mask(70, 70), -torch.inf)
assert torch.allclose(out, scores.softmax(-1) @ q, atol=1e-5)
print(_library.cpu_tier())
for w in caught:
    if "headstart" in str(w.message):
        print("WARNED", w.category.__name__, w.message)
"""


def run_script(path: Path, **environment: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if name != "HEADSTART_ISA"}
    env |= {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()


PACKAGE = Path(headstart.__file__).parent


@pytest.mark.parametrize("wanted", ("generic", "no_such_tier", None))
def test_isa_is_chosen_by_the_environment(wanted):
    if not _library.cpu_tiers():
        pytest.skip(f"no compiled CPU kernels: {_library.cpu.error}")
    tier, *warned = run_script(PACKAGE.parent, **({} if wanted is None else {"HEADSTART_ISA": wanted}))
    assert tier == "generic" if wanted == "generic" else tier in _library.cpu_tiers()
    if wanted == "no_such_tier":
        tiers = " ".join(_library.cpu_tiers())
        words = f"headstart: HEADSTART_ISA: expected one of {tiers}, got no_such_tier; using {tier}"
        assert warned == [f"WARNED RuntimeWarning {words}"]
    else:
        assert not warned


def test_without_the_library_operators_still_run_and_say_so_once(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "headstart", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    tier, *warned = run_script(tmp_path)
    assert (
        tier == "None" and len(warned) == 1 and warned[0].startswith("WARNED RuntimeWarning headstart: the cpu kernels")
    )
    assert f"Cause: {tmp_path}/headstart/_cpu.so does not exist" in warned[0] and "Cure: run `make build`" in warned[0]


# --- the unit that multiplies ----------------------------------------------------------------------------------------


def test_the_rates_of_the_units():
    rates = _library.cpu_unit_rates()
    assert set(_library.cpu_tiers()) == {"generic"} or rates["fma"][0] == "fp32"
    assert all(unit in ("fp32", "bf16", "int16", "int8") and 0.5 < rate < 1e5 for unit, rate in rates.values())


def test_the_bf16_dot_product_is_used_where_it_is_faster():
    """By its measured rate: some CPUs that have the instruction are slower with it than with FMA."""
    pays = _library.cpu.handle.headstart_bf16_dot_pays
    pays.argtypes = [ctypes.c_double] * 2
    assert pays(100.0, 200.0) and not pays(200.0, 100.0)
    tiers, rates = _library.cpu_tiers(), _library.cpu_unit_rates()
    if {"avx512", "avx512_bf16"} <= set(tiers) and "HEADSTART_ISA" not in os.environ:
        fma, dot = rates["fma 512"][1], rates["bf16 dot"][1]
        if max(fma, dot) > 1.3 * min(fma, dot):  # else either may have been chosen
            assert _library.cpu_tier() == ("avx512_bf16" if dot > fma else "avx512")

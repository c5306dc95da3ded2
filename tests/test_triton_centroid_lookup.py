"""The Triton kernels of centroid lookup, without a GPU: their choices through the interpreter, held to the float64
oracle of `centroid_judge.py`, and their machine code for sm_80 and sm_90.
"""

from __future__ import annotations

import pytest
import torch

import centroid_judge as judge
from headstart import _library
from triton_testing import SHARED_MEMORY, compile_launch, compiled, interpreted, resources, run_in_the_interpreter

pytest.importorskip("triton", reason="triton is not installed")


@compiled
@pytest.mark.slow
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture
def kernels(interpreter, poisoned, monkeypatch):
    """`centroid_judge.OP` is the Triton operator, interpreted."""
    from headstart.triton import centroid_lookup

    monkeypatch.setattr(judge, "OP", judge.cleaned(_library.triton_kernels["centroid_lookup"]))
    return centroid_lookup


@interpreted
@judge.by_case
def test_clusters_are_those_of_the_oracle(kernels, case):
    judge.check_case(case)


@interpreted
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("name", ("decode, grouped heads", "a few queries, small blocks", "parents, blocks"))
def test_max_columns(kernels, name, tied):
    judge.check_room(judge.CASES[name], tied, (0.01, 0.35) if tied else (0.1,))


@interpreted
def test_more_clusters_than_registers_hold(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_SPLITS", 5)
    judge.check_room(judge.Case(1, 1, 1, 8300, 8, judge.FLOAT16), True, (0.1,))


@interpreted
def test_rows_taken_in_turns_by_a_small_workspace(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "WORKSPACE", 5000)
    monkeypatch.setattr(kernels, "SLOTS", 32)
    judge.check_case(judge.CASES["parents, small blocks"])
    judge.check_room(judge.CASES["parents, small blocks"], True, (0.3,))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_limits(kernels):
    judge.check_limits()


@interpreted
def test_strides_do_not_matter(kernels):
    judge.check_strides()


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_broken_offsets(kernels):
    judge.check_broken_offsets(highs=(60,))  # the interpreter has no sums that wrap


@interpreted
def test_without_max_columns_there_is_room_for_every_key(kernels):
    q, centroids, offsets, _ = judge.CASES["one block for all"].inputs()
    count, index = judge.OP(q, centroids, offsets, torch.zeros(1), scale=0.3, block_q=64)
    assert index.shape[-1] == int(offsets[0, -1]) and (count == index.shape[-1]).all()


# --- machine code ----------------------------------------------------------------------------------------------------

LAUNCHES = {
    "prefill": dict(nq=512, parents=None),
    "prefill, parents": dict(nq=512, parents=1300),
    "decode": dict(nq=1, parents=None),
    "decode, parents": dict(nq=1, parents=1300),
}
MULTIPLY = ("cluster_lse_kernel", "cluster_best_kernel")


@compiled
@pytest.mark.parametrize("launch, d", [("prefill", 64), ("prefill", 128), ("prefill, parents", 128), ("prefill", 256),
                                       ("decode", 128), ("decode, parents", 128)])  # fmt: skip
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", [*MULTIPLY, "take_kernel", "expand_runs_kernel"])
def test_kernels_compile(name, capability, launch, d, monkeypatch, tmp_path, record_property, capsys):
    from headstart.triton import centroid_lookup as module

    nq, parents = LAUNCHES[launch].values()
    if name not in MULTIPLY and (d != 128 or nq > 1):
        pytest.skip("the same for every head dim and number of queries")
    q, centroids = torch.empty(1, 8, nq, d, dtype=judge.BFLOAT16), torch.empty(2, 6500, d, dtype=judge.BFLOAT16)
    offsets = torch.zeros(2, 6501, dtype=torch.int32)
    level = {}
    if parents is not None:
        level = dict(parent_centroids=centroids[:, :parents].clone(), parent_offsets=offsets[:, : parents + 1].clone())
        level |= dict(parent_threshold=torch.zeros(1))

    def call():
        options = dict(scale=0.1, block_q=64, max_columns=2000, **level)
        _library.triton_kernels["centroid_lookup"](q, centroids, offsets, torch.zeros(1), **options)

    binary = compile_launch([module], monkeypatch, name, capability, call)
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    if name in MULTIPLY:
        hopper = capability == 90 and nq > 1
        assert ("wgmma.mma_async" if hopper else "mma.sync") in binary.asm["ptx"], "no tensor cores in it"
    used = resources(binary, tmp_path)
    if used is not None:
        record_property("resources", str(used))
        with capsys.disabled():
            print(f"\nsm_{capability} {name} {launch} D={d}: {used}", end=" ")
        assert used["stack"] == 0, f"spills: {used}"

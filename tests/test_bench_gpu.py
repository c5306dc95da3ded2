"""What the GPU benchmarks do without a GPU: import their files, keep results row by row, find crossovers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "bench" / "gpu"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("attention", "clock", "indices", "lookup", "models", "run", "weights"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    yield run
    for name in ("attention", "clock", "indices", "lookup", "models", "run", "weights"):
        sys.modules.pop(name, None)


def test_families_run_in_the_order_that_matters_if_time_runs_out(gpu):
    assert list(gpu.FAMILIES)[:3] == ["attention", "int4", "bitmap"]
    assert {"lookup", "indices", "decode", "merge", "crossovers"} <= set(gpu.FAMILIES)
    assert all(steps for steps in gpu.FAMILIES.values())


def test_profiles_are_listed_with_the_kernels_that_the_sources_have(gpu, capsys):
    assert gpu.main(["--profile", "list"]) == 0
    root = FOLDER.parents[1]
    sources = [*(root / "csrc" / "cuda").glob("*.cu"), *(root / "python" / "headstart" / "triton").glob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(listed) == 5
    for _, kernel in listed:
        assert f"{kernel}(" in text, f"no kernel is named {kernel}"


@pytest.mark.parametrize(
    "fused, dense, first",
    [([1, 2, 3], [2, 2, 2], 20), ([1, 1, 1], [2, 2, 2], None), ([3, 1, 3], [2, 2, 2], 30), ([2, 2, 2], [1, 1, 1], 10)],
)
def test_a_crossover_is_where_dense_stays_ahead(gpu, fused, dense, first):
    import weights

    assert weights.crossover((10, 20, 30), fused, dense) == first


def test_a_table_says_which_targets_are_missed(gpu):
    from gpu import tables

    def attention(density, **ms):
        return {"op": "sparse_attention", "tokens": 8192, "head_dim": 128, "block": 64, "density": density, "ms": ms}

    dense, slow = attention(1.0, headstart=2.0, cudnn=1.0, flash=3.0), attention(0.25, headstart=0.6, cudnn=1.0)
    quick = attention(0.25, headstart=0.5, cudnn=1.0)
    int4 = {"op": "int4_gemm", "rows": 1, "of_read": 0.8, "ms": {"headstart": 0.02, "linear": 0.05}}
    rows = [dense, slow, quick, int4]
    assert [tables.goal(row, rows)[1] for row in rows] == [False, False, True, True]
    lines = tables.table(rows)[2:]
    assert ["missed" in line for line in lines] == [True, True, False, False]
    assert "| 2 ms | 0.50× cudnn, 1.50× flash |" in lines[0] and "| 20 µs | 2.50× linear | 80 % of the read" in lines[3]


def test_every_row_is_on_disk_at_once_and_other_families_stay(gpu, tmp_path, capsys):
    import clock

    path = clock.Results.path_of("NVIDIA H100 80GB HBM3")
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    path = tmp_path / path.name
    for family, value in (("merge", 1.0), ("decode", 2.0), ("merge", 3.0)):
        results = clock.Results(path, {"read_gbps": 3000.0}, {"gpu": "x", "commit": "c"})
        results.begin(family)
        results.add("merge_attention", {"tokens": 7}, {"headstart": value, "torch": 2 * value}, gbps=5.0)
        content = json.loads(path.read_text())["families"]
        assert content[family]["rows"][0]["ms"]["headstart"] == value and not content[family]["complete"]
        results.end()
    content = json.loads(path.read_text())["families"]
    assert set(content) == {"merge", "decode"} and content["merge"]["complete"]
    assert [row["ms"]["headstart"] for row in content["merge"]["rows"]] == [3.0]
    row = content["merge"]["rows"][0]
    assert row["served_by"] in ("_cuda.so", "Triton", "torch") and content["merge"]["environment"]["commit"] == "c"
    assert "2.00x torch" in capsys.readouterr().out


def test_wrong_results_are_not_timed(gpu):
    import clock

    clock.expect_right("int4_gemm", {"rows": 1}, 0.01, 0.03)
    for error in (0.03, float("nan")):
        with pytest.raises(SystemExit, match="int4_gemm is wrong"):
            clock.expect_right("int4_gemm", {"rows": 1}, error, 0.03)


def test_without_a_gpu_it_says_so_in_one_line(gpu, capsys, monkeypatch):
    from headstart import _library

    monkeypatch.setattr(_library, "missing_gpu_kernels", lambda: ("no GPU", "get one"))
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "headstart: the CUDA kernels cannot run here. Cause: no GPU. Cure: get one.\n"

"""The benchmarks: how they time, their maths, one tiny run end to end, and the README's table made from it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
if not BENCH.is_dir():
    pytest.skip("the benchmarks are only in a source tree", allow_module_level=True)
sys.path.append(str(BENCH))

import baselines  # noqa: E402
import cases  # noqa: E402
import machine  # noqa: E402
import measure  # noqa: E402
import readme  # noqa: E402
import report  # noqa: E402

MACHINE = {
    "gemm_gflops": {"bf16": 800.0, "fp32": 200.0},
    "read_gbs": 75.0,
    "read_method": "sum",
    "copy_gbs": 60.0,
}
ENVIRONMENT = {
    "cpu": "Test(R) CPU 9000 8-Core Processor @ 2.50GHz",
    "flags": ["avx2"],
    "threads": 2,
    "tier": "avx2",
    "torch": "2.13.0",
    "aten_capability": "AVX2",
    "commit": "0123456789ab",
    "uncommitted": False,
    "date": "2026-01-02T03:04:05+00:00",
    "load_average": 0.1,
    "busy": False,
}


# --- timing ----------------------------------------------------------------------------------------------------------


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.interleave(calls, seconds=0, min_rounds=4)
    assert "".join(order) == "abc" * 4
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_rounds_fill_the_time_and_no_more():
    now = 0.0

    def clock():
        return now

    def call():
        nonlocal now
        now += 0.25

    assert measure.interleave({"x": call}, seconds=1.5, min_rounds=2, clock=clock)["x"] == [0.25e6] * 6
    assert len(measure.interleave({"x": call}, seconds=0.3, min_rounds=5, clock=clock)["x"]) == 5
    assert len(measure.interleave({"x": call}, seconds=1e9, min_rounds=5, max_rounds=7, clock=clock)["x"]) == 7


def test_rotation_goes_round_enough_copies():
    first = torch.arange(100, dtype=torch.float32)
    rotation = measure.Rotation((first,), cold_bytes=1000)
    seen = [rotation.next()[0] for _ in range(6)]
    assert seen[0] is first and seen[3] is first
    assert len({t.data_ptr() for t in seen}) == 3 and all(torch.equal(t, first) for t in seen)


# --- the maths -------------------------------------------------------------------------------------------------------


def result(name: str, times: list[float], **given) -> dict:
    empty = dict(
        baseline=None, of=None, flops=0, bytes=0, limit=None, density=None, error=None, error_bar=0, targets=[]
    )
    return empty | given | {"name": name, "times_us": times}


def group(*results: dict, family: str = "sparse_attention", dtype: str = "bf16", tier=None) -> dict:
    shape = {"hq": 9, "hkv": 3, "d": 64}
    title = f"{family}, {dtype}"
    return {
        "title": title, "family": family, "dtype": dtype, "shape": shape, "tokens": 8192, "flex": True, "tier": tier,
        "results": list(results),
    }  # fmt: skip


def attention_group() -> dict:
    """Every block in 100 ms, 600 of 800 GFLOP/s; SDPA in 420 ms; a quarter in 28 ms, FlexAttention's in 56 ms."""
    flops = 60e9
    targets = [
        {"metric": "versus.torch SDPA", "at_least": 4, "at_most": None},
        {"metric": "percent.best_gemm", "at_least": 80, "at_most": None},
    ]
    quarter = dict(flops=flops / 4, limit="gemm", density=0.25)
    most = [{"metric": "per_density", "at_least": None, "at_most": 1.15}]
    return group(
        result(baselines.SDPA, [420e3, 400e3, 900e3], baseline=baselines.SDPA, flops=flops, limit="gemm", density=1),
        result(cases.EVERY, [100e3, 99e3, 300e3], flops=flops, limit="gemm", density=1, targets=targets),
        result("density 0.25", [28e3], error=0.01, error_bar=0.02, targets=most, **quarter),
        result("FlexAttention, density 0.25", [56e3], baseline="FlexAttention", of="density 0.25", **quarter),
    )


def test_rates_shares_ratios_and_targets():
    sdpa, full, quarter, flex = report.evaluate(attention_group(), MACHINE)["results"]
    assert full["median_us"] == 100e3 and full["fastest_us"] == 99e3
    assert full["gflops"] == pytest.approx(600) and full["gbs"] is None
    assert full["percent"] == pytest.approx({"gemm": 75, "best_gemm": 75})
    assert full["versus"] == pytest.approx({"torch SDPA": 4.2})  # FlexAttention here is for a quarter only
    assert [t["met"] for t in full["targets"]] == [True, False]
    assert quarter["versus"] == pytest.approx({"torch SDPA": 15, "FlexAttention": 2})
    assert quarter["share_of_full"] == pytest.approx(0.28) and quarter["per_density"] == pytest.approx(1.12)
    assert quarter["targets"][0]["met"] and quarter["targets"][0]["value"] == pytest.approx(1.12)
    assert "versus" not in sdpa and "versus" not in flex
    assert not any(r["wrong"] for r in (sdpa, full, quarter, flex))


def test_fp32_has_two_shares_and_bandwidths_their_own():
    fp32 = group(result(cases.EVERY, [1e6], flops=100e9, limit="gemm", density=1), dtype="fp32")
    assert report.evaluate(fp32, MACHINE)["results"][0]["percent"] == pytest.approx({"gemm": 50, "best_gemm": 12.5})
    moved = group(result("r", [1e3], bytes=60e6, limit="read"), result("c", [1e3], bytes=30e6, limit="copy"))
    read, copied = report.evaluate(moved, MACHINE)["results"]
    assert read["gbs"] == pytest.approx(60) and read["percent"] == pytest.approx({"read": 80})
    assert copied["percent"] == pytest.approx({"copy": 50})


@pytest.mark.parametrize("error, wrong", [(None, False), (0.02, False), (0.03, True), (math.nan, True)])
def test_a_wrong_result_is_named(error, wrong):
    raw = group(result("merge", [10.0], error=error, error_bar=0.02))
    found = {"groups": [report.evaluate(raw, MACHINE)]}
    assert report.wrong_results(found) == (
        [f"sparse_attention, bf16: merge: error {error:.3g}, allowed 0.02"] if wrong else []
    )


def test_words():
    assert [report.time_words(us) for us in (0.5, 12.34, 999.7, 4.561e4, 1.2e6)] == [
        "0.50 µs", "12.3 µs", "1000 µs", "45.6 ms", "1.20 s",
    ]  # fmt: skip
    named = {**ENVIRONMENT, "tier": "avx512_bf16"}
    assert machine.slug(named) == "test-9000-2-threads-avx512_bf16"
    assert report.target_words({"metric": "share_of_full", "at_least": None, "at_most": 0.1}) == "≤ 10 %"


# --- the cases -------------------------------------------------------------------------------------------------------


def test_random_blocks_have_the_density_they_are_asked_for():
    torch.manual_seed(0)
    for density in cases.DENSITIES:
        selected = cases.random_blocks(9, 8192, density)
        assert cases.block_index(selected).density(8192, 8192) == pytest.approx(density, rel=0.05)
        assert selected.diagonal(dim1=-2, dim2=-1).all() and not selected.triu(1).any()


def test_checks_find_a_wrong_result():
    spec = next(cases.specs("sparse_attention", 192, dtypes=("fp32",)))
    work = next(work for work in spec.build() if work.name == cases.EVERY)
    out, lse = work.call()
    assert work.check((out, lse)) <= work.error_bar
    out[0, 4, 70] += 0.5
    assert work.check((out, lse)) > work.error_bar
    out[0, 4, 70] = math.nan
    assert work.check((out, lse)) == math.inf


@pytest.mark.parametrize("family", [*cases.FAMILIES, "tier"])
def test_every_family_runs(family, monkeypatch):
    monkeypatch.setattr(cases, "cold_bytes", lambda: 1 << 16)
    monkeypatch.setattr(cases, "MATRICES", (cases.Matrix(96, 256),))
    for spec in cases.specs(family, 128):
        found = report.evaluate(report.run_group(spec, seconds=0, min_rounds=1), MACHINE)
        assert [r["name"] for r in found["results"]] == spec.names
        assert all(r["median_us"] > 0 and not r["wrong"] for r in found["results"])
        assert json.loads(json.dumps(found))["results"][0]["times_us"]
        report.table(found)


# --- end to end ------------------------------------------------------------------------------------------------------


def run(*command: object) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *map(str, command)]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path):
    output, page = tmp_path / "results.json", tmp_path / "README.md"
    few = (
        "--tokens",
        128,
        "--quick",
        "--seconds",
        0,
        "--dtype",
        "bf16",
        "--only",
        "sparse_attention",
        "--only",
        "tier",
    )
    done = run(BENCH / "run.py", *few, "--output", output)
    assert done.returncode == 0, done.stderr
    for word in ("torch SDPA", "every block", "density 0.25", "GEMM bf16", "targets:"):
        assert word in done.stdout
    results = report.load(output)
    environment = results["environment"]
    assert environment["torch"] == torch.__version__ and environment["tier"] in environment["tiers"]
    assert all(rate > 0 for rate in results["machine"]["gemm_gflops"].values())
    tiers = {g["tier"] for g in results["groups"] if g["family"] == "tier"}
    below = environment["tiers"][: environment["tiers"].index(environment["tier"])]
    assert tiers == {tier for tier in below if "emulated" not in tier}

    page.write_text(f"# A page\n\n{readme.BEGIN}\n{readme.END}\n\nafter\n")
    assert readme.main([str(output), str(page), "--check"]) == 1
    assert readme.main([str(output), str(page)]) == 0
    assert readme.main([str(output), str(page), "--check"]) == 0


@pytest.mark.slow
def test_the_pytest_suites_group_kernels_with_their_baselines(tmp_path):
    pytest.importorskip("pytest_benchmark")
    output = tmp_path / "benchmark.json"
    chosen = ("--tokens", 128, "-k", "decode and bf16 and 9x3x64-128", "--benchmark-max-time=0.01")
    quiet = ("-q", "-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={output}")
    done = run("-m", "pytest", BENCH, *chosen, *quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads(output.read_text())["benchmarks"]
    assert {b["group"] for b in benchmarks} == {"decode, bf16, 9 heads on 3 KV heads, D 64, 128 keys"}
    assert {b["name"].rsplit("-", 1)[1].rstrip("]") for b in benchmarks} == {"torch_SDPA", "every_block"}


def test_short_prompts_compares_twins_that_share_their_weights(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    import short_prompts

    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="sdpa")).eval()
    monkeypatch.setattr(short_prompts, "load_model", lambda *_, dtype: (model.to(dtype), None))
    monkeypatch.setattr(short_prompts, "token_ids", lambda _: torch.arange(300) % 64)
    output = tmp_path / "short.json"
    few = ["--tokens", "200", "--tokens", "96", "--seconds", "0", "--dtype", "fp32", "--output", str(output)]
    assert short_prompts.main([*few, "--allowed", "1000"]) == 0
    results = json.loads(output.read_text())
    assert [(row["linear"], row["tokens"]) for row in results["rows"]] == [
        (linear, n) for linear in ("auto", "model") for n in (96, 200)
    ]
    for row in results["rows"]:
        own, mine = (row["times_us"][name] for name in short_prompts.NAMES)
        assert len(own) == len(mine) == 3 and sum(row["paths"].values()) == 2
        assert row["ratio"] == sorted(b / a for a, b in zip(own, mine))[1]
    assert short_prompts.main([*few, "--linear", "model", "--allowed", "0"]) == 1
    assert "linear=model, 200 tokens" in capsys.readouterr().err
    assert model.config._attn_implementation == "sdpa"

    twin = short_prompts.twin(model)
    assert twin.config is not model.config
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}


# --- the README's table ----------------------------------------------------------------------------------------------


@pytest.fixture
def results_file(tmp_path) -> Path:
    decode = result(cases.EVERY, [1.25e3], bytes=75e6, limit="read", density=1)
    groups = [attention_group(), group(decode, family="decode"), group(decode, family="decode", dtype="fp32")]
    theirs = result(baselines.INT4, [240.0], baseline=baselines.INT4)
    ours = result(cases.INT4_GEMM, [125.0], bytes=7.5e6, limit="read")
    linear_layer = {"shape": {"n": 4096, "k": 2048}, "tokens": 1}
    groups.append(group(theirs, ours, family=cases.INT4_GEMM) | linear_layer)
    path = tmp_path / "bench" / "results" / "test.json"
    found = [report.evaluate(g, MACHINE) for g in groups]
    report.save({"schema": 1, "environment": ENVIRONMENT, "machine": MACHINE, "groups": found}, path)
    return path


def test_readme_round_trip(tmp_path, results_file, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"# A page\n\n{readme.BEGIN}\nold numbers\n{readme.END}\n\nafter\n")
    arguments = [str(results_file), str(page)]
    assert readme.main([*arguments, "--check"]) == 1
    assert "old numbers" in page.read_text() and "not those of" in capsys.readouterr().err
    assert readme.main(arguments) == 0
    text = page.read_text()
    assert text.startswith(f"# A page\n\n{readme.BEGIN}\n| ") and text.endswith(f"{readme.END}\n\nafter\n")
    assert "old numbers" not in text
    for words in (
        "| `sparse_attention`, every block | 100 ms, **4.20× SDPA**, 75 % of GEMM |",
        "| `sparse_attention`, d = 0.25 | 28.0 ms, **15.0× SDPA**, 2.00× FlexAttention, 1.12 · d of every block |",
        "| decode, one query over 8,192 keys | 1.25 ms, 60.0 GB/s, 80 % of read bandwidth |",
        "|  | weight 4,096 × 2,048, group 128 |",
        "| `int4_gemm`, 1 row | 125 µs, **1.92× torch int4**, 60.0 GB/s, 80 % of read bandwidth |",
        "From `bench/results/test.json`",
    ):
        assert words in text
    assert readme.main([*arguments, "--check"]) == 0
    page.write_text(text.replace("4.20×", "4.80×"))
    assert readme.main([*arguments, "--check"]) == 1


@pytest.mark.parametrize(
    "page, message",
    [
        ("nothing", "expected <!-- numbers:begin --> once, found it 0 times"),
        (f"{readme.BEGIN}{readme.BEGIN}{readme.END}", "expected <!-- numbers:begin --> once, found it 2 times"),
        (f"{readme.END}{readme.BEGIN}", "expected <!-- numbers:begin --> before"),
    ],
)
def test_readme_without_its_markers(tmp_path, results_file, capsys, page, message):
    path = tmp_path / "README.md"
    path.write_text(page)
    assert readme.main([str(results_file), str(path)]) == 1
    assert message in capsys.readouterr().err and path.read_text() == page


@pytest.mark.parametrize(
    "text, message", [("{", "not a results file"), ('{"schema": 7}', "expected 1"), ("[]", "None")]
)
def test_a_file_that_is_not_a_results_file(tmp_path, text, message):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        report.load(path)

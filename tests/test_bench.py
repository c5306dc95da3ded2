"""The benchmarks: timing, the maths, limits and targets, a tiny run end to end, and the pages made from results."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
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
import limits  # noqa: E402
import machine  # noqa: E402
import measure  # noqa: E402
import pages  # noqa: E402
import registers  # noqa: E402
import report  # noqa: E402
import run as bench_run  # noqa: E402
import targets  # noqa: E402
import work  # noqa: E402
from headstart import _library  # noqa: E402

RATES = {
    "fp32": {"fma in registers": 200.0, "torch product": 180.0},
    "bf16": {"torch product": 800.0},
    "int8": {"vpdpbusd in registers": 1600.0},
    "read": {"torch sum": 75.0},
    "copy": {"torch copy": 60.0},
}
MACHINE = {"cache_bytes": 32e6, "measured": [{"when": "before the run", "rates": RATES}]}
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
    empty = dict.fromkeys(("baseline", "of", "limit", "density", "error", "tier")) | dict(flops=0, bytes=0, error_bar=0)
    return empty | {"cycle_bytes": 1e9} | given | {"name": name, "times_us": times}


def group(*results: dict, family: str = "sparse_attention", dtype: str = "bf16", **given) -> dict:
    shape = {"hq": 9, "hkv": 3, "d": 64}
    plain = {"title": f"{family}, {dtype}", "family": family, "dtype": dtype, "shape": shape, "tokens": 8192}
    return plain | {"flex": True, "tier": None, "kernel": None, "chosen": "avx2", "results": list(results)} | given


def attention_group() -> dict:
    """Every block in 100 ms, 600 of 800 GFLOP/s; SDPA in 420 ms; a quarter in 28 ms, FlexAttention's in 56 ms."""
    flops = 60e9
    quarter = dict(flops=flops / 4, limit="multiply", density=0.25)
    return group(
        result(baselines.SDPA, [420e3, 400e3, 900e3], baseline=baselines.SDPA, flops=flops, limit="multiply"),
        result(cases.EVERY, [100e3, 99e3, 300e3], flops=flops, limit="multiply", density=1),
        result("density 0.25", [28e3], error=0.01, error_bar=0.02, **quarter),
        result("FlexAttention, density 0.25", [56e3], baseline="FlexAttention", of="density 0.25", **quarter),
    )


def test_rates_shares_ratios_and_targets():
    sdpa, full, quarter, flex = report.evaluate(attention_group(), MACHINE)["results"]
    assert full["median_us"] == 100e3 and full["fastest_us"] == 99e3
    assert full["gflops"] == pytest.approx(600) and full["gbs"] is None
    assert full["percent"] == pytest.approx({"multiply": 75}) and full["limited_by"] == "bf16"
    assert full["versus"] == pytest.approx({"torch SDPA": 4.2})  # this FlexAttention is a baseline of a quarter only
    assert [(t["metric"], t["at_least"], t["met"]) for t in full["targets"]] == [("versus.torch SDPA", 3.3, True)]
    assert quarter["versus"] == pytest.approx({"torch SDPA": 15, "FlexAttention": 2})
    assert quarter["share_of_full"] == pytest.approx(0.28) and quarter["per_density"] == pytest.approx(1.12)
    assert quarter["targets"][0]["met"] and quarter["targets"][0]["value"] == pytest.approx(1.12)
    assert "versus" not in sdpa and "versus" not in flex
    assert not any(r["wrong"] for r in (sdpa, full, quarter, flex))


def test_the_highest_rate_of_a_run_is_the_limit():
    after = {"when": "after the run", "rates": {"fp32": {"torch product": 400.0, "fma in registers": 250.0}}}
    found = limits.highest([*MACHINE["measured"], after])
    assert found["fp32"] == {"rate": 400.0, "way": "torch product", "when": "after the run"}
    assert found["read"] == {"rate": 75.0, "way": "torch sum", "when": "before the run"}
    raw = group(result(cases.EVERY, [1e6], flops=100e9, limit="multiply", density=1), dtype="fp32")
    both = {**MACHINE, "measured": [*MACHINE["measured"], after]}
    shares = [report.evaluate(raw, machine)["results"][0]["percent"]["multiply"] for machine in (MACHINE, both)]
    assert shares == pytest.approx([50, 25])


@pytest.mark.parametrize(
    "family, dtype, name, limit, share",
    [
        ("sparse_attention", "fp32", cases.EVERY, "fp32", 50),
        ("sparse_attention", "bf16", cases.EVERY, "bf16", 12.5),
        (work.INT4_GEMM, "bf16", work.INT8_ACTIVATIONS, "int8", 6.25),
        (work.INT4_GEMM, "bf16", work.INT4_GEMM, "int8", 6.25),  # its codes may be multiplied as bytes
        (work.INT4_GEMM, "bf16", baselines.LINEAR, "bf16", 12.5),
    ],
)
def test_a_product_is_compared_with_the_fastest_unit_that_is_exact_enough(family, dtype, name, limit, share):
    baseline = name if name == baselines.LINEAR else None
    raw = group(result(name, [1e6], flops=100e9, limit="multiply", baseline=baseline), family=family, dtype=dtype)
    found = report.evaluate(raw, MACHINE)["results"][0]
    assert found["limited_by"] == limit and found["percent"] == pytest.approx({"multiply": share})


def test_no_integer_rate_is_no_share_and_no_verdict():
    without = {"when": "before the run", "rates": {name: RATES[name] for name in ("fp32", "bf16")}}
    small_groups = result(work.INT8_SMALL_GROUPS, [1e6], flops=100e9, limit="multiply")
    raw = group(small_groups, family=work.INT4_GEMM, tokens=256)
    found = report.evaluate(raw, {**MACHINE, "measured": [without]})["results"][0]
    assert found["percent"] == {} and found["targets"][0]["met"] is None
    assert report.targets_met({"groups": [{"results": [found]}]}) == (0, 0, 1)
    assert report.evaluate(raw, MACHINE)["results"][0]["targets"][0]["met"] is False  # 6 % of the integer rate


def test_memory_is_no_limit_for_data_in_the_caches():
    moved = (
        result("r", [1e3], bytes=60e6, limit="read"),
        result("c", [1e3], bytes=30e6, limit="copy"),
        result("cached", [1e3], bytes=60e6, limit="read", cycle_bytes=60e6),
    )
    read, copied, cached = report.evaluate(group(*moved), MACHINE)["results"]
    assert read["gbs"] == pytest.approx(60) and read["percent"] == pytest.approx({"read": 80})
    assert copied["percent"] == pytest.approx({"copy": 50})
    assert cached["gbs"] == pytest.approx(60) and cached["percent"] == {} and cached["limited_by"] is None


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
    assert machine.device_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    share = {"metric": "share_of_full", "at_least": None, "at_most": 0.05, "value": 0.0816, "met": False}
    assert report.target_words(share) == "≤ 5 % of every block" and report.bound_words(share) == "≤ 5 %"
    assert report.value_words(share) == "8.16 % of every block"
    assert report.value_words({**share, "value": 0.05001}) == "5.0010 % of every block"
    ratio = {"metric": "versus.torch SDPA", "at_least": 3.3, "at_most": None, "value": 1.331, "met": False}
    assert (report.target_words(ratio), report.value_words(ratio)) == ("≥ 3.3× torch SDPA", "1.33× torch SDPA")


# --- the machine -----------------------------------------------------------------------------------------------------


def test_the_caches_of_all_core_complexes_count(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cpus", lambda: [0, 1, 2, 3])
    for cpu in range(4):
        for index, (level, kind, size, shared) in enumerate(
            [("1", "Instruction", "64K", cpu), ("2", "Unified", "512K", cpu), ("3", "Unified", "8M", cpu // 2)]
        ):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in {"level": level, "type": kind, "size": size, "shared_cpu_list": shared}.items():
                (folder / name).write_text(f"{value}\n")
    assert machine.cache_bytes(tmp_path) == 16 << 20
    assert machine.cache_bytes(tmp_path / "nothing") == 32 << 20


def test_json_is_written_in_one_step(tmp_path):
    path = tmp_path / "folder" / "results.json"
    machine.write_json({"µ": 1}, path)
    with pytest.raises(TypeError):
        machine.write_json({"µ": object()}, path)
    assert json.loads(path.read_text()) == {"µ": 1} and list(path.parent.iterdir()) == [path]


def test_every_loop_has_its_instructions_flags():
    source = (limits.SOURCE.parent.parent / "csrc/cpu/unit_loops.h").read_text()
    line = r'\{"([^"]+)", "(\w+)", Needs::\w+, 12 \* (\d+) \* 2, LOOP\(\w+, "([yz]mm)"\)\}'
    loops = re.findall(line, source)
    assert {name: unit for name, unit, *_ in loops} == {name: unit for name, (unit, _) in limits.LOOPS.items()}
    bits = {"fp32": 32, "bf16": 16, "int16": 16, "int8": 8}
    for name, _, lanes, width in loops:
        assert int(lanes) == {"ymm": 256, "zmm": 512}[width] // bits[limits.LOOPS[name][0]]
        assert name.endswith(" 512") or name == "bf16 dot" or width == "ymm"


@pytest.mark.slow
def test_limits_are_measured_in_several_ways(monkeypatch):
    monkeypatch.setattr(limits, "SIZES", (128,))
    monkeypatch.setattr(machine, "cold_bytes", lambda: 4 << 20)
    rates = limits.measure(quick=True, when="now")["rates"]
    assert set(rates) >= {"fp32", "bf16", "int8", "read", "copy"}
    assert all(rate > 0 for ways in rates.values() for rate in ways.values())
    assert {"torch product"} <= rates["fp32"].keys() and len(rates["int8"]) >= 2
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        assert "vector loads" in rates["read"] and "streamed copy" in rates["copy"]
        if {"avx2", "fma"} <= machine.cpu_flags():
            assert {"fma in registers"} <= rates["fp32"].keys() and {"vpmaddubsw in registers"} <= rates["int8"].keys()
        assert limits.library().multiply_rate(b"no such loop", 1, 0.01) == 0


# --- what makes a run fail -------------------------------------------------------------------------------------------


def fast_group() -> dict:
    """100 GFLOP in 400 ms: 250 GFLOP/s, where the fp32 rate is 200."""
    return group(result(cases.EVERY, [400e3], flops=100e9, limit="multiply", density=1), dtype="fp32")


def choice_group(chosen_us: float, forced_us: float) -> dict:
    times = {"generic": forced_us, "avx2": chosen_us}
    works = [result(f"k, {tier} tier", [us], of="k", tier=tier) for tier, us in times.items()]
    return group(*works, family=cases.CHOICE, kernel="sparse_attention")


def faked_run(monkeypatch, raw: dict, rates: list[float]) -> list[str]:
    """What each call of `limits.measure` was for; each finds the next fp32 rate."""
    asked = []

    def measure_limits(quick, when="before the run"):
        asked.append(when)
        return {"when": when, "rates": {"fp32": {"fma in registers": rates[len(asked) - 1]}}}

    monkeypatch.setattr(limits, "measure", measure_limits)
    monkeypatch.setattr(bench_run, "raw_groups", lambda *_: iter([raw]))
    return asked


def test_a_share_above_100_percent_fails_the_run(monkeypatch, tmp_path, capsys):
    asked = faked_run(monkeypatch, fast_group(), [200.0, 210.0, 220.0])
    output = tmp_path / "results.json"
    assert bench_run.main(["--output", str(output)]) == 1
    assert asked == ["before the run", "after sparse_attention, fp32", "after the run"]
    error = capsys.readouterr().err
    assert "sparse_attention, fp32: every block: 113.6 % of the fp32 rate" in error  # of 220, the highest
    with pytest.raises(ValueError, match="above 100 %.*every block: 113.6 %"):
        report.load(output)


@pytest.mark.parametrize("rates", [[200.0, 300.0, 100.0], [200.0, 210.0, 300.0], [300.0, 100.0]])
def test_a_limit_that_was_taken_too_low_is_corrected(monkeypatch, tmp_path, rates):
    faked_run(monkeypatch, fast_group(), rates)
    output = tmp_path / "results.json"
    assert bench_run.main(["--output", str(output)]) == 0
    saved = json.loads(output.read_text())["groups"][0]["results"][0]
    assert saved["percent"] == pytest.approx({"multiply": 250 / 3})


@pytest.mark.parametrize("chosen_us, status", [(103.0, 0), (106.0, 1), (50.0, 0)])
def test_a_forced_tier_that_beats_the_choice_fails_the_run(monkeypatch, tmp_path, capsys, chosen_us, status):
    faked_run(monkeypatch, choice_group(chosen_us, 100.0), [200.0, 200.0])
    assert bench_run.main(["--output", str(tmp_path / "results.json")]) == status
    assert ("a forced tier is faster: choice of unit, bf16: k, avx2 tier: 1.06 ×" in capsys.readouterr().err) == status


def test_a_choice_that_loses_is_measured_again(monkeypatch):
    runs = []

    def run_group(spec, **given):
        runs.append(given)
        return choice_group(110.0 if len(runs) == 1 else 100.0, 100.0)

    monkeypatch.setattr(report, "run_group", run_group)
    monkeypatch.setattr(cases, "specs", lambda *_, **__: iter([cases.Spec(cases.CHOICE, "bf16", cases.SHAPES[0], 64)]))
    monkeypatch.delenv("HEADSTART_ISA", raising=False)
    options = bench_run.parse(["--only", cases.CHOICE, "--seconds", "1"])

    class Status:
        def update(self, words: str) -> None: ...

    found = list(bench_run.raw_groups(options, Status(), []))
    assert [given["seconds"] for given in runs] == [1, 2] and found[0]["results"][1]["times_us"] == [100.0]
    monkeypatch.setenv("HEADSTART_ISA", "generic")
    assert list(bench_run.raw_groups(options, Status(), [])) == []


def test_the_choice_of_unit_runs_in_every_tier_and_is_restored(monkeypatch):
    monkeypatch.setattr(machine, "cold_bytes", lambda: 1 << 16)
    monkeypatch.setattr(cases, "MATRICES", (work.Matrix(96, 256),))
    chosen = _library.cpu_tier()
    if len(cases.forced_tiers()) < 2:
        pytest.skip("this CPU has one tier")
    specs = list(cases.specs(cases.CHOICE, 128))
    assert [(spec.kernel, spec.dtype, spec.tokens) for spec in specs] == [
        ("sparse_attention", "bf16", 128), ("sparse_attention", "fp32", 128), ("prefill_index", "bf16", 128),
        ("int4_gemm", "bf16", 1), ("int4_gemm", "bf16", 16), ("int4_gemm", "bf16", 256), ("bitmap_gemm", "bf16", 1),
    ]  # fmt: skip
    works = specs[0].build()
    for one in works:
        one.call()
        assert _library.cpu_tier() == one.tier
    lowest = cases.forced_tiers()[0]  # the works force it first, and another one last
    _library.set_cpu_tier(lowest)
    try:
        found = report.evaluate(report.run_group(specs[0], seconds=0, min_rounds=1), MACHINE)
        assert _library.cpu_tier() == lowest == found["chosen"]
    finally:
        _library.set_cpu_tier(chosen)
    judged = [r for r in found["results"] if r["targets"]]
    assert [r["tier"] for r in judged] == [lowest] and 0 < judged[0][targets.FASTEST_TIER] <= 1


# --- the cases -------------------------------------------------------------------------------------------------------


def test_random_blocks_have_the_density_they_are_asked_for():
    torch.manual_seed(0)
    for density in cases.DENSITIES:
        selected = cases.random_blocks(9, 8192, density)
        assert cases.block_index(selected).density(8192, 8192) == pytest.approx(density, rel=0.05)
        assert selected.diagonal(dim1=-2, dim2=-1).all() and not selected.triu(1).any()


def test_checks_find_a_wrong_result():
    spec = next(cases.specs("sparse_attention", 192, dtypes=("fp32",)))
    full = next(one for one in spec.build() if one.name == cases.EVERY)
    out, lse = full.call()
    assert full.check((out, lse)) <= full.error_bar
    out[0, 4, 70] += 0.5
    assert full.check((out, lse)) > full.error_bar
    out[0, 4, 70] = math.nan
    assert full.check((out, lse)) == math.inf


@pytest.mark.parametrize("family", [*cases.FAMILIES, "tier"])
def test_every_family_runs(family, monkeypatch):
    monkeypatch.setattr(machine, "cold_bytes", lambda: 1 << 16)
    monkeypatch.setattr(cases, "MATRICES", (work.Matrix(96, 256),))
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
    # A pytest inside of one of pytest-xdist's processes is not one of them.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**outer, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path):
    output = tmp_path / "results.json"
    few = ["--tokens", 128, "--quick", "--seconds", 0, "--dtype", "bf16"]
    few += [part for family in ("sparse_attention", "tier") for part in ("--only", family)]
    done = run(BENCH / "run.py", *few, "--output", output)
    # Beside other work, a kernel may find a free moment that the limits did not find. All else is a fault.
    faults = done.stderr.splitlines()
    assert done.returncode == (1 if faults else 0), done.stderr
    assert all(line.startswith("bench/run.py: faster than the machine's limit") for line in faults), done.stderr
    for word in ("torch SDPA", "every block", "density 0.25", "the bf16 rate: ", "targets:"):
        assert word in done.stdout
    results = json.loads(output.read_text())
    environment = results["environment"]
    assert environment["torch"] == torch.__version__ and environment["tier"] in environment["tiers"]
    assert [one["when"] for one in results["machine"]["measured"]][:: len(results["machine"]["measured"]) - 1] == [
        "before the run",
        "after the run",
    ]
    tiers = {g["tier"] for g in results["groups"] if g["family"] == "tier"}
    below = environment["tiers"][: environment["tiers"].index(environment["tier"])]
    assert tiers == {tier for tier in below if "emulated" not in tier}


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
    monkeypatch.setattr(short_prompts, "load_model", lambda *_, dtype, packed: (model.to(dtype), None))
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


# --- the pages -------------------------------------------------------------------------------------------------------

README = (
    f"# A page\n\n{pages.BEGIN}\nold numbers\n{pages.END}\n\nbetween\n\n{pages.DEMO_BEGIN}\n{pages.DEMO_END}\nafter\n"
)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A source tree with one results file, and a README that has not seen it yet."""
    decode = result(cases.EVERY, [1.25e3], bytes=75e6, limit="read", density=1)
    dense, full, *rest = attention_group()["results"]
    slow = {**full, "times_us": [200e3]}
    wide = {"shape": {"hq": 8, "hkv": 2, "d": 128}}
    groups = [attention_group(), group(dense, slow, *rest) | wide]
    groups += [group(decode, family="decode"), group(decode, family="decode", dtype="fp32"), choice_group(80.0, 100.0)]
    theirs = result(baselines.INT4, [240.0], baseline=baselines.INT4)
    ours = result(work.INT4_GEMM, [125.0], bytes=7.5e6, limit="read")
    linear_layer = {"shape": {"n": 4096, "k": 2048}, "tokens": 1}
    groups.append(group(theirs, ours, family=work.INT4_GEMM) | linear_layer)
    content = {"schema": 2, "environment": ENVIRONMENT, "machine": MACHINE, "groups": groups}
    machine.write_json(content, tmp_path / "bench" / "results" / "test-9000-2-threads-avx2.json")
    machine.write_json(content, tmp_path / "bench" / "results" / "a-copy-for-other-tokens.json")
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_pages_round_trip(tree, capsys):
    arguments = ["--root", str(tree)]
    assert pages.main([*arguments, "--check"]) == 1
    assert "old numbers" in (tree / "README.md").read_text() and "not the numbers of" in capsys.readouterr().err
    assert pages.main(arguments) == 0 and pages.main([*arguments, "--check"]) == 0
    text, numbers = (tree / "README.md").read_text(), (tree / "docs" / "numbers.md").read_text()
    assert text.startswith(f"# A page\n\n{pages.BEGIN}\n| ") and text.endswith(
        "between\n\n" + README.split("between\n\n")[1]
    )
    assert "old numbers" not in text and "8 heads on 2 KV heads" not in text and "choice of unit" not in text
    for words in (
        "| `sparse_attention`, every block | 100 ms, **4.20× SDPA**, 75 % of the bf16 rate |",
        "| `int4_gemm`, 1 row | 125 µs, **1.92× torch int4**, 60.0 GB/s, 80 % of read bandwidth; "
        "**missed:** 80.0 % of read bandwidth, target ≥ 88 % |",
        "From [`test-9000-2-threads-avx2.json`](bench/results/test-9000-2-threads-avx2.json)",
        "5 of 7 targets are met, 2 are missed. [docs/numbers.md](docs/numbers.md)",
    ):
        assert words in text
    for words in (
        "| `sparse_attention`, every block | 100 ms, **4.20× SDPA**, 75 % of the bf16 rate | 200 ms, **2.10× SDPA**, "
        "38 % of the bf16 rate; **missed:** 2.10× torch SDPA, target ≥ 3.3× |",
        "| `sparse_attention`, d = 0.25 | 28.0 ms, **15.0× SDPA**, 2.00× FlexAttention, 1.12 · d of every block |",
        "| decode, one query over 8,192 keys | 1.25 ms, 60.0 GB/s, 80 % of read bandwidth |",
        "| int8 rate | 1600 GFLOP/s | vpdpbusd in registers, before the run |",
        "|  | weight 4,096 × 2,048, group 128 |",
        "| bf16: k | 100 µs | **80.0 µs** |",
        "| `sparse_attention`, every block, 8 heads on 2 KV heads, D 128 | ≥ 3.3× torch SDPA | 2.10× torch SDPA |",
        "(../bench/results/test-9000-2-threads-avx2.json)",
    ):
        assert words in numbers
    assert numbers.count("\n## ") == 1  # the other results file does not have its CPU's name
    for path in (tree / "README.md", tree / "docs" / "numbers.md"):
        before = path.read_text()
        path.write_text(before.replace("4.20×", "4.80×"))
        assert pages.main([*arguments, "--check"]) == 1 and str(path) in capsys.readouterr().err
        path.write_text(before)
    demo = ROOT / "bench" / "results" / "demo-intel-xeon-2-threads-avx512.json"
    shutil.copy(demo, tree / "bench" / "results")
    assert pages.main([*arguments, "--check"]) == 1 and pages.main(arguments) == 0
    assert "| transformers + SDPA | " in (tree / "README.md").read_text().split(pages.DEMO_BEGIN)[1]


def test_the_pages_of_this_tree_have_the_numbers_of_its_results(capsys):
    assert pages.main(["--check"]) == 0, capsys.readouterr().err


def test_a_file_of_older_rules_has_only_the_shares_that_are_true():
    """Its GEMM rates were taken twice, its bandwidths once, and kernels were faster than the bandwidths."""
    results = report.load(machine.RESULTS / "intel-xeon-2-threads-avx512.json")
    assert results["schema"] == 1 and set(results["unknown"]) == {"read", "copy"}
    share = {}
    for group_, result_ in report.rows(results):
        share[group_["family"], group_["dtype"], group_["shape"].get("d"), result_["name"]] = result_["percent"]
        assert all(percent <= 100 for percent in result_["percent"].values())
        assert group_["family"] != work.INT4_GEMM or result_["baseline"] == baselines.LINEAR or not result_["percent"]
    assert share["sparse_attention", "bf16", 64, cases.EVERY] == pytest.approx({"multiply": 52.4}, abs=0.1)
    assert share["sparse_attention", "fp32", 64, cases.EVERY] == pytest.approx({"multiply": 65.8}, abs=0.1)
    page = pages.numbers_page({"x.json": results})
    assert "| read bandwidth | not known |" in page and "% of read bandwidth," not in page


@pytest.mark.parametrize(
    "page, message",
    [
        ("nothing", "expected <!-- numbers:begin --> once, found it 0 times"),
        (f"{pages.BEGIN}{pages.BEGIN}{pages.END}", "expected <!-- numbers:begin --> once, found it 2 times"),
        (f"{pages.END}{pages.BEGIN}", "expected <!-- numbers:begin --> before"),
    ],
)
def test_readme_without_its_markers(tree, capsys, page, message):
    (tree / "README.md").write_text(page)
    assert pages.main(["--root", str(tree)]) == 1
    assert message in capsys.readouterr().err and (tree / "README.md").read_text() == page


def test_pages_without_results(tree, capsys):
    for path in (tree / "bench" / "results").iterdir():
        path.unlink()
    assert pages.main(["--root", str(tree)]) == 1 and "no results of bench/run.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message", [("{", "not a results file"), ('{"schema": 7}', "expected 2"), ("[]", "None")]
)
def test_a_file_that_is_not_a_results_file(tmp_path, text, message):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        report.load(path)


def test_registers_of_a_kernel_are_read_and_shown():
    text = """ Function void headstart::cuda::(anonymous namespace)::merge_kernel<headstart::BFloat16, 8>(Args, int):
  REG:32 STACK:0 SHARED:1024 LOCAL:0"""
    row = registers.kernel(registers.FUNCTION.search(text))
    assert row == {"kernel": "merge_kernel", "case": "bf16, 8", "registers": 32, "stack": 0, "shared": 1024}
    lines = registers.table([{**row, "target": "sm_80"}, {**row, "target": "sm_90a", "stack": 16}])
    assert lines[-1] == "| merge | bf16, 8 | 32, 0, 1,024 | 32, 16, 1,024 |"

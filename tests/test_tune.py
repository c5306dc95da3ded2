"""The cost model that decides how a layer attends: densities, the fit, the decision, its file, the command."""

import dataclasses
import itertools
import json
import math
import re
import warnings

import numpy as np
import pytest
import torch

from headstart import _library, cli
from headstart.attention import anchor, cost, tune
from headstart.attention.cost import Call
from headstart.attention.density import density
from headstart.attention.patterns import HeadPattern
from headstart.attention.plan import PrefillPlan

for package in ("transformers", "rich", "typer"):
    pytest.importorskip(package)

from headstart import patch  # noqa: E402
from headstart.attention import forward  # noqa: E402
from headstart.attention.forward import force_path  # noqa: E402
from headstart.attention.recording import record  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
SPARSE = ("a_shape", "vertical_slash", "block_topk", "adaptive")


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """Where this test's measurement would be; nothing of the user's is read or written."""
    monkeypatch.delenv("HEADSTART_TUNE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cost.forget()
    anchor._scaled.cache_clear()
    yield tmp_path / "headstart" / "tune.json"
    cost.forget()
    anchor._scaled.cache_clear()


def prompt(n: int, dtype=BF16, **fields) -> Call:
    return Call(1, 9, 3, n, n, 64, dtype)._replace(**fields)


# --- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nq, nk", [(64, 64), (500, 500), (4096, 4096), (256, 4096), (100, 8000)])
@pytest.mark.parametrize(
    "pattern",
    [
        HeadPattern.of("a_shape"),
        HeadPattern.of("a_shape", sink=0, local=64),
        HeadPattern.of("block_topk"),
        HeadPattern.of("vertical_slash"),
        HeadPattern.of("vertical_slash", vertical_size=100, slash_size=300),
        HeadPattern.of("dense"),
    ],
    ids=str,
)
def test_budgets_give_the_density_of_the_index(pattern, nq, nk):
    q, k = torch.randn(1, 2, nq, 32), torch.randn(1, 1, nk, 32)
    index = PrefillPlan(pattern).index(0, q, k)
    # Which bands a vertical-slash head takes is up to its queries and keys.
    tolerance = 0.08 if pattern.name == "vertical_slash" else 0.03
    assert density(pattern, nq, nk) == pytest.approx(index.density(nq, nk), abs=tolerance)


@pytest.mark.parametrize("name", [*SPARSE, "dense"])
def test_density_falls_from_one_with_the_length(name):
    lengths = [1, 64, 100, 128, 200, 500, 1000, 3000, 8192, 50_000, 131_072]
    found = [density(HeadPattern.of(name), n, n) for n in lengths]
    assert found[:2] == [1, 1] and all(0 < d <= 1 for d in found)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(found))
    assert found[-1] == 1 if name == "dense" else found[-1] < 0.15


def test_chunks_add_up_to_the_prompt():
    pattern = HeadPattern.of("adaptive")
    parts = [density(pattern, 1000, end) * Call(1, 1, 1, 1000, end, 8, FP32).pairs for end in (1000, 2000, 3000)]
    assert sum(parts) == pytest.approx(density(pattern, 3000, 3000) * prompt(3000).pairs)


@pytest.mark.parametrize("name", SPARSE)
def test_a_measured_density_is_met_where_it_was_measured(name):
    measured = HeadPattern.of(name, density=0.05)
    assert density(measured, 8192, 8192, tokens=8192) == pytest.approx(0.05)
    assert 0.05 < density(measured, 2000, 2000, tokens=8192) < density(HeadPattern.of(name), 2000, 2000)
    assert density(measured, 64, 64, tokens=8192) == 1
    assert density(measured, 32_768, 32_768, tokens=8192) < 0.05


@pytest.mark.parametrize(
    "threshold, measured",
    [
        (0.8, {256: 0.888, 512: 0.619, 1024: 0.427, 2048: 0.279, 4096: 0.181, 8192: 0.116}),
        (0.93, {256: 0.951, 512: 0.783, 1024: 0.614, 2048: 0.454, 4096: 0.323, 8192: 0.227}),
        (0.98, {256: 0.981, 512: 0.906, 1024: 0.785, 2048: 0.644}),
    ],
)
def test_adaptives_curve_is_that_of_smollm2(threshold, measured):
    for n, share in measured.items():
        assert density(HeadPattern.of("adaptive", threshold=threshold), n, n) == pytest.approx(share, rel=0.08)
    assert density(HeadPattern.of("adaptive", threshold=1), 8192, 8192) == 1


# --- the fit ---------------------------------------------------------------------------------------------------------


def test_non_negative_least_squares_recovers_what_made_the_target():
    rows = np.random.default_rng(0).random((12, 4)) * [1.0, 1e9, 1e5, 1e12]
    want = [3e-5, 2e-12, 0.0, 1e-13]
    assert tune.non_negative_least_squares(rows, rows @ want) == pytest.approx(want, rel=1e-6, abs=1e-20)


def test_non_negative_least_squares_is_the_least_among_the_non_negative():
    """At the minimum the gradient is 0 for positive coefficients, and not negative for those that are 0."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        rows, target = random.normal(size=(9, 4)), random.normal(size=9)
        found = tune.non_negative_least_squares(rows, target)
        gradient = rows.T @ (rows @ found - target)
        assert found.min() >= 0 and abs(gradient[found > 0]).sum() < 1e-9 and gradient.min() > -1e-9


def test_disturbed_shapes_do_not_bend_the_fit():
    rows = [[1e-4 + 1 / n, n] for n in range(1, 12)]
    targets = [3 * a + 2 * b for a, b in rows]
    disturbed = [t * (8 if i in (0, 6, 9) else 1) for i, t in enumerate(targets)]
    fit = tune.non_negative_fit(*([[a / t, b / t] for (a, b), t in zip(rows, disturbed)], [1.0] * len(rows)))
    assert fit == pytest.approx([3, 2], rel=1e-2)


TRUE = {kind: {term: 2e-5 if term == "fixed" else 3e-12 for term in terms} for kind, terms in cost.TERMS.items()}
TRUE["kernel"]["pair"] = 4e-10


def synthetic(shapes) -> list[tune.Sample]:
    """What works would take whose costs are TRUE."""
    made = cost.Costs({}, {"bfloat16": TRUE, "float32": TRUE}, {}, "", "")
    samples = []
    for shape in shapes:
        works = [
            cost.kernel_terms(shape),
            cost.kernel_terms(shape, 0.3),
            cost.kernel_terms(shape, 0.5, 4000),
            cost.stitch_terms(shape),
        ]
        works += [cost.sdpa_terms(shape), cost.sdpa_terms(shape._replace(masked_keys=shape.nk))]
        works += [cost.index_terms(HeadPattern.of(name), shape) for name in SPARSE]
        for kind, terms in works:
            sample = tune.Sample(kind, shape, kind, terms, 1.0)
            samples.append(sample._replace(seconds=tune.predicted(made, sample)))
    return samples


def test_the_fit_predicts_what_it_has_not_seen():
    costs = tune.fit(synthetic(tune.measured_shapes()))
    assert all(error["largest"] < 1e-6 for kinds in costs.residuals.values() for error in kinds.values())
    unseen = [
        Call(1, 32, 8, n, nk, 96, dtype) for n, nk in [(777, 777), (1, 30_000), (300, 9000)] for dtype in (BF16, FP32)
    ]
    for sample in synthetic(unseen):
        assert tune.predicted(costs, sample) == pytest.approx(sample.seconds, rel=1e-5)
    assert costs.coefficients["bfloat16"]["kernel"] == pytest.approx(TRUE["kernel"], rel=1e-5)


def test_measuring_times_every_kind(monkeypatch):
    if not _library.has_kernel("sparse_attention", "CPU"):
        pytest.skip(f"no compiled CPU kernels: {_library.cpu.error}")
    few(monkeypatch)
    steps = []
    samples = tune.measure(advance=lambda: steps.append(1))
    assert len(steps) == len(tune.measured_shapes()) == 6
    assert {sample.kind for sample in samples} == cost.TERMS.keys()
    assert all(0 < sample.seconds < 10 and set(sample.terms) == set(cost.TERMS[sample.kind]) for sample in samples)
    sparse = next(sample for sample in samples if sample.name == "sparse")
    assert 0.25 < sparse.terms["pair"] / (4 * sparse.shape.pairs) < 0.9


def few(monkeypatch):
    monkeypatch.setattr(tune, "SHAPES", ((4, 2, 16),))
    monkeypatch.setattr(tune, "LENGTHS", (64, 192))
    monkeypatch.setattr(tune, "CHUNKS", ((1, 192),))


# --- the decision ----------------------------------------------------------------------------------------------------


def made(**changed) -> cost.Costs:
    """Costs in which SDPA's pair is twice the kernel's, an index is a twentieth of a pair, and calls cost nothing."""
    coefficients = {kind: dict.fromkeys(terms, 0.0) for kind, terms in cost.TERMS.items()}
    for kind, price in {"sdpa": 2.0, "sdpa_masked": 2.0, "kernel": 1.0, "adaptive": 0.4, "kernel_few": 1.0}.items():
        name = "products" if kind == "adaptive" else "pair_dim"
        coefficients[kind][name] = 1e-9 * price
    coefficients["sdpa_decode"]["key_dim"] = 2e-9
    for path, value in changed.items():
        kind, _, term = path.partition("__")
        coefficients[kind][term] = value
    return cost.Costs({}, {"bfloat16": coefficients, "float32": coefficients}, {}, "", "made up")


ADAPTIVE = PrefillPlan.uniform("adaptive")


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_extremes(dtype):
    def choose(costs, n, *, plan=ADAPTIVE, own="sdpa", sparse=True, **fields):
        return costs.fastest(prompt(n, dtype, **fields), plan, 0, own=own, sparse=sparse)

    assert choose(made(), 64) == "dense"  # everything is attended, and the index comes on top
    assert choose(made(), 100_000) == "sparse"
    assert choose(made(), 100_000, sparse=False) == "dense"
    assert choose(made(kernel__fixed=1.0), 64) == "own"
    assert choose(made(kernel__fixed=1.0), 64, own="eager") == choose(made(kernel__fixed=1.0), 64, own=None) == "dense"
    assert choose(made(adaptive__fixed=1e6), 100_000) == "dense"
    assert choose(made(adaptive__fixed=1e6, sdpa__pair_dim=0.9e-9), 100_000) == "own"
    assert choose(made(), 100_000, nq=1, sparse=False) == "dense"
    assert choose(made(sdpa_decode__key_dim=0.5e-9), 100_000, nq=1, sparse=False) == "own"
    # A mask makes SDPA compute what causality forbids.
    cheap = made(sdpa__pair_dim=0.9e-9, sdpa_masked__pair_dim=0.9e-9, adaptive__fixed=1e6)
    assert choose(cheap, 4096) == "own" and choose(cheap, 4096, masked_keys=4096) == "dense"


def test_a_sparse_path_has_to_win_by_the_margin():
    n = 8192
    call = prompt(n)
    attention_alone = made(adaptive__products=0.0).sparse(call, ADAPTIVE, 0)
    exact = made().dense(call)
    room = exact / (1 + cost.SPARSE_MARGIN) - attention_alone
    assert 0 < attention_alone < room
    for index, path in [(0.99 * room, "sparse"), (1.01 * room, "dense")]:
        costs = made(adaptive__products=0.0, adaptive__fixed=index)
        assert costs.fastest(call, ADAPTIVE, 0, own="sdpa", sparse=True) == path


def test_a_layer_is_decided_by_the_densities_of_its_own_heads():
    def layer(share):
        return {head: HeadPattern.of("adaptive", density=share) for head in range(9)}

    plan = PrefillPlan(HeadPattern.of("adaptive"), (layer(0.05), layer(0.99)), provenance={"tokens": 2048})
    paths = [made().fastest(prompt(2048), plan, i, own="sdpa", sparse=True) for i in range(2)]
    assert paths == ["sparse", "dense"]
    costs = made(adaptive__products=0.0)
    assert costs.sparse(prompt(2048), plan, 0) / costs.dense(prompt(2048)) == pytest.approx(0.05, rel=1e-6)


def test_families_of_a_layer_are_built_one_by_one_and_stitched():
    half = {head: HeadPattern.of("vertical_slash") for head in range(3)}
    plan = PrefillPlan(HeadPattern.of("adaptive"), (half,))
    costs = made(adaptive__fixed=1.0, vertical_slash__fixed=10.0, stitch__fixed=100.0, adaptive__products=0.0)
    assert costs.index(prompt(2048), plan.heads(0, 9)) == 111
    assert costs.index(prompt(2048), plan.heads(1, 9)) == 1


def test_of_a_dtype_that_was_not_timed_sdpa_is_not_trusted():
    costs = made(kernel__fixed=1.0)
    assert costs.fastest(prompt(64, torch.float16), ADAPTIVE, 0, own="sdpa", sparse=True) == "dense"
    assert costs.dense(prompt(64, torch.float16)) == costs.dense(prompt(64))


@pytest.mark.parametrize("tier", ["generic", "avx2", "avx512", "avx512_bf16", None])
def test_the_defaults_are_sane(tier):
    costs = cost.defaults(tier, 2)
    for dtype, (heads, kv_heads, d) in itertools.product((BF16, FP32), tune.SHAPES):
        calls = [Call(1, heads, kv_heads, n, n, d, dtype) for n in (16, 64, 256, 1024, 4096, 16_384, 131_072)]
        for predict in (costs.dense, costs.sdpa, lambda call: costs.sparse(call, ADAPTIVE, 0)):
            seconds = [predict(call) for call in calls]
            assert seconds == sorted(seconds) and seconds[0] > 0
        paths = [path for _, path in cost.crossovers(costs, calls[0], ADAPTIVE)]
        assert paths[0] != "sparse" and paths[-1] == "sparse" and paths.count("sparse") == 1
        dense = [path for _, path in cost.crossovers(costs, calls[0], PrefillPlan.uniform("dense"))]
        assert "sparse" not in dense
    eight = cost.defaults(tier, 8)
    assert eight.dense(calls[-1]) == pytest.approx(costs.dense(calls[-1]) / 4, rel=0.01)


# --- on a machine that was never tuned -------------------------------------------------------------------------------


def wrong(costs: cost.Costs, factors: dict[str, float]) -> cost.Costs:
    """The same costs with the coefficients of torch's or of headstart's work multiplied by a factor."""
    coefficients = {
        dtype: {
            kind: {name: value * factors["sdpa" if kind.startswith("sdpa") else "own"] for name, value in terms.items()}
            for kind, terms in kinds.items()
        }
        for dtype, kinds in costs.coefficients.items()
    }
    return dataclasses.replace(costs, coefficients=coefficients)


@pytest.mark.parametrize("sdpa, own", [(4, 1), (0.25, 1), (1, 4), (1, 0.25), (4, 0.25), (0.25, 4)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_wrong_defaults_are_scaled_to_the_machine(dtype, sdpa, own):
    """Coefficients that are wrong by 4 decide as the right ones: here the machine is what the right ones predict."""
    right = cost.defaults("avx2", 2)
    found = anchor.anchored(
        wrong(right, {"sdpa": sdpa, "own": own}), dtype, lambda work: right.seconds(dtype, work.kind, work.terms)
    )
    for kind, terms in right.coefficients[cost.dtype_name(dtype)].items():
        assert found.coefficients[cost.dtype_name(dtype)][kind] == pytest.approx(terms)
    for heads, kv_heads, d in tune.SHAPES:
        for nq, nk in (
            (64, 64),
            (128, 128),
            (512, 512),
            (4096, 4096),
            (32_768, 32_768),
            (1, 300),
            (1, 9000),
            (64, 4096),
        ):
            call = Call(1, heads, kv_heads, nq, nk, d, dtype)
            options = {"own": "sdpa", "sparse": nq >= 64}
            assert found.fastest(call, ADAPTIVE, 0, **options) == right.fastest(call, ADAPTIVE, 0, **options)
    other = FP32 if dtype == BF16 else BF16
    assert found.coefficients[cost.dtype_name(other)] != right.coefficients[cost.dtype_name(other)]  # not asked for


def test_the_costs_in_use_are_those_of_the_timings(file, monkeypatch):
    """Whatever the clock says a work takes is what is predicted for it, and each dtype is timed once."""
    timed = []

    def took(work: tune.Work) -> float:
        assert work.call().isfinite().all()
        timed.append(work)
        return 0.01 * len(timed)

    monkeypatch.setattr(anchor, "shortest", took)
    costs = anchor.in_use(FP32)
    assert costs.source == f"{cost.in_use().source}, scaled to this machine" and anchor.in_use(FP32) is costs
    assert [work.name for work in timed] == ["SDPA", "dense"] * 2
    for i, work in enumerate(timed, start=1):
        assert costs.seconds(FP32, work.kind, work.terms) == pytest.approx(0.01 * i)
    tune.save(measured_here(), file)
    cost.forget()
    assert anchor.in_use(FP32).source == str(file) and len(timed) == 4  # a measurement needs no scaling


def test_the_first_call_and_disturbed_ones_do_not_count(monkeypatch):
    calls, clock = [], iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr(anchor.time, "perf_counter", lambda: next(clock))
    assert anchor.shortest(tune.Work("a work", lambda: calls.append(1), "sdpa", {})) == 2.0
    assert len(calls) == 1 + anchor.RUNS


def test_a_dtype_without_coefficients_is_not_scaled(file):
    assert anchor.in_use(torch.float16).source.startswith("headstart's defaults")
    assert not anchor.in_use(torch.float16).source.endswith("this machine")


# --- the one place of the promise ------------------------------------------------------------------------------------


def choose(here, call, *, device="cpu", own="sdpa", has_kernel=True, window=None):
    return forward.choose_path(here, 0, device, call, own=own, has_kernel=has_kernel, window=window)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(anchor, "in_use", lambda dtype: made())
    return forward.Attachment(ADAPTIVE, "sdpa")


def test_a_path_by_the_costs_in_use(here):
    assert choose(here, prompt(64)) == "dense" and choose(here, prompt(100_000)) == "sparse"
    assert choose(here, prompt(100_000, nq=63)) == choose(here, prompt(100_000, nq=1)) == "dense"
    assert choose(here, prompt(100_000), has_kernel=False) == "own"
    assert choose(forward.Attachment(PrefillPlan.uniform("dense"), "sdpa"), prompt(100_000)) == "dense"


def test_a_window_that_cuts_keys_off_is_attended_as_such(here):
    for n, window, path in [
        (100, 99, "window"),
        (100, 100, "dense"),
        (100_000, 4096, "window"),
        (100_000, None, "sparse"),
    ]:
        assert choose(here, prompt(n), window=window) == path
        assert choose(here, prompt(n), window=window, has_kernel=False) == "own"
    with force_path("sparse"):
        assert choose(here, prompt(100), window=99, has_kernel=False) == "window"
    with force_path("own"):
        assert choose(here, prompt(100), window=99) == "own"


def test_on_a_device_without_costs_the_length_decides(here):
    for n, path in [(16383, "own"), (16384, "sparse"), (100_000, "sparse")]:
        assert choose(here, prompt(n), device="cuda") == path
    assert choose(here, prompt(100_000, nq=63), device="cuda") == "own"
    assert choose(here, prompt(100_000, nq=63), device="cuda", own=None) == "dense"
    assert choose(here, prompt(100_000), device="cuda", has_kernel=False) == "own"


def test_a_decision_is_kept_while_a_cache_grows(here, monkeypatch):
    asked = []
    monkeypatch.setattr(anchor, "in_use", lambda dtype: asked.append(1) or made())
    for nk in range(1024, 2048):
        assert choose(here, prompt(nk, nq=1)) == "dense"
    assert len(asked) == len(here.paths) == 16


def test_a_path_can_be_forced(here):
    with force_path("sparse"):
        assert choose(here, prompt(64)) == choose(here, prompt(64), has_kernel=False) == "sparse"
        assert choose(here, prompt(64, nq=63)) == "dense"
        with force_path("own"):
            assert choose(here, prompt(100_000)) == "own"
        assert choose(forward.Attachment(PrefillPlan.uniform("dense"), "sdpa"), prompt(100_000)) == "dense"
    assert choose(here, prompt(64)) == "dense"
    with pytest.raises(ValueError, match="force_path: path: expected one of sparse, dense, own, got 'fast'"):
        with force_path("fast"):
            pass


@pytest.mark.parametrize("path", ["sparse", "dense", "own"])
def test_every_path_gives_a_models_results(path):
    model, ids = tiny(), torch.randint(0, 64, (2, 130))
    with torch.no_grad():
        want = model(ids).logits
        patch(model, PrefillPlan.uniform("a_shape", sink=0, local=1024))
        with force_path(path), record() as entries:
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
    assert [entry.path for entry in entries] == ([] if path == "own" else [path] * 2)


def tiny(layers=2):
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=layers)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="sdpa")).eval()


def asked_for(run, monkeypatch) -> list[tuple[Call, str | None]]:
    asked = []

    def choose_path(here, layer, device, call, *, own, **_):
        asked.append((call, own))
        return "dense"

    monkeypatch.setattr(forward, "choose_path", choose_path)
    with torch.no_grad():
        run(patch(tiny(layers=1)))
    return asked


def test_the_shape_that_is_decided_on_is_that_of_the_call(monkeypatch):
    import transformers

    def run(model):
        cache = transformers.DynamicCache(config=model.config)
        for n in (70, 65, 1):
            model(torch.zeros(1, n, dtype=torch.long), past_key_values=cache)
        padded = torch.ones(2, 80, dtype=torch.long)
        padded[1, :3] = 0
        model(torch.zeros(2, 80, dtype=torch.long), attention_mask=padded)

    first = Call(1, 4, 2, 70, 70, 16, FP32)
    expected = [first, first._replace(nq=65, nk=135, masked_keys=135), first._replace(nq=1, nk=136)]
    expected.append(Call(2, 4, 2, 80, 80, 16, FP32, masked_keys=80))
    assert asked_for(run, monkeypatch) == [(call, "sdpa") for call in expected]


def test_packed_sequences_are_decided_one_by_one(monkeypatch):
    positions = torch.cat([torch.arange(100), torch.arange(50)])[None]

    def run(model):
        model(torch.zeros(1, 150, dtype=torch.long), position_ids=positions, use_cache=False)

    calls = [Call(1, 4, 2, n, n, 16, FP32) for n in (100, 50)]
    # transformers' SDPA would take them together, so what it costs each alone does not matter.
    assert asked_for(run, monkeypatch) == [(call, None) for call in calls]


# --- the file --------------------------------------------------------------------------------------------------------


def measured_here() -> cost.Costs:
    errors = dict.fromkeys(cost.TERMS, {"median": 0.1, "largest": 0.2})
    residuals = {"bfloat16": errors, "float32": errors}
    return dataclasses.replace(made(), machine=cost.machine_key(), residuals=residuals, date="2026-01-02")


def test_the_files_place(tmp_path, file, monkeypatch):
    assert cost.tune_path() == file
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cost.tune_path() == tmp_path / ".cache" / "headstart" / "tune.json"
    monkeypatch.setenv("HEADSTART_TUNE", str(tmp_path / "mine.json"))
    assert cost.tune_path() == tmp_path / "mine.json"


def test_what_was_measured_here_is_in_use(file):
    assert cost.in_use().source.startswith("headstart's defaults")
    saved = measured_here()
    tune.save(saved, file)
    assert [path.name for path in file.parent.iterdir()] == ["tune.json"]
    cost.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cost.in_use()
    assert cost.in_use() is found and found.source == str(file)
    for field in ("machine", "coefficients", "residuals", "date"):
        assert getattr(found, field) == getattr(saved, field)


def damage(path: list, value):
    content = json.loads(cost.to_json(measured_here()))
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    "text, told",
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("\udcff", "not a JSON file"),
        ("[]", "the file: expected a JSON object"),
        (["format"], "format: expected 'headstart.tune', got 'other'"),
        (["version"], "version: expected 1, got 'other'"),
        (["date"], "date: expected a string, got 7"),
        (["coefficients"], "coefficients: expected an object, got 'other'"),
        (["coefficients", "bfloat16", "kernel"], "coefficients.bfloat16.kernel: expected an object"),
        (["coefficients", "float32", "sdpa", "pair"], "coefficients.float32.sdpa.pair: expected a finite number"),
        (["residuals", "float32", "sdpa", "largest"], "residuals.float32.sdpa.largest: expected a finite number"),
        (["machine", "cpu"], "machine.cpu: expected .*, got 'other'"),
        (["machine", "tier"], "machine.tier: expected .*, got 'other'"),
        (["machine", "threads"], "machine.threads: expected [0-9]+, got 'other'"),
        (["machine", "torch"], "machine.torch: expected .*, got 'other'"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_used_is_told_of_once(text, told, file):
    if isinstance(text, list):
        text = damage(text, 7 if text == ["date"] else "other")
    file.parent.mkdir()
    file.write_text(text, errors="surrogateescape")
    told_once(str(file), told)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, True, None])
def test_a_coefficient_that_no_fit_gives(value, file):
    file.parent.mkdir()
    file.write_text(damage(["coefficients", "bfloat16", "adaptive", "products"], value))
    told_once(str(file), "coefficients.bfloat16.adaptive.products: expected a finite number, at least 0")


def test_a_file_that_is_named_but_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADSTART_TUNE", str(tmp_path / "missing.json"))
    told_once("missing.json", "HEADSTART_TUNE names it, but it does not exist")


def told_once(path: str, reason: str):
    """A patched model warns and runs; the warning comes once."""
    with pytest.warns(RuntimeWarning, match="measurement of this machine is not used") as caught:
        model = patch(tiny())
        with torch.no_grad():
            for _ in range(2):
                assert model(torch.zeros(1, 100, dtype=torch.long)).logits.isfinite().all()
    said = [str(w.message) for w in caught if "measurement of this machine" in str(w.message)]
    assert len(said) == 1 and path in said[0] and "`headstart tune`" in said[0]
    assert re.search(reason, said[0]), said[0]
    assert cost.in_use().source.startswith("headstart's defaults")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_measures_writes_and_shows(file, monkeypatch, capsys):
    if not _library.has_kernel("sparse_attention", "CPU"):
        pytest.skip(f"no compiled CPU kernels: {_library.cpu.error}")
    few(monkeypatch)
    assert cli.main(["tune"]) == 0
    printed = capsys.readouterr().out
    assert "the fastest path of a prompt" in printed and f"in use: {file}" in printed
    content = json.loads(file.read_text())
    assert content["machine"] == cost.machine_key() and content["coefficients"].keys() == {"bfloat16", "float32"}
    monkeypatch.setattr(tune, "measure", None)
    assert cli.main(["tune", "--show"]) == 0
    assert f"in use: {file}" in capsys.readouterr().out
    file.unlink()
    cost.forget()
    assert cli.main(["tune", "--show"]) == 0
    assert "in use: headstart's defaults" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_to_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("HEADSTART_TUNE", str(tmp_path / "blocked" / "tune.json"))
    monkeypatch.setattr(tune, "measure", lambda **_: synthetic(tune.measured_shapes()[::4]))
    assert cli.main(["tune"]) == 1
    assert "blocked" in capsys.readouterr().err

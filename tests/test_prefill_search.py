"""The offline search: what it measures, what it chooses, what it keeps, and how it fails."""

from __future__ import annotations

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

import headstart  # noqa: E402
from headstart import cli  # noqa: E402
from headstart.attention import search as prefill_search  # noqa: E402
from headstart.attention.forward import force_path  # noqa: E402
from headstart.attention.mask import headstart_mask  # noqa: E402
from headstart.attention.patterns import PATTERNS as PATTERN_NAMES  # noqa: E402
from headstart.attention.patterns import HeadPattern  # noqa: E402
from headstart.attention.plan import PrefillPlan  # noqa: E402
from headstart.attention.recording import record  # noqa: E402
from headstart.attention.search import candidates, choose, search_prefill_plan  # noqa: E402

LAYERS, HEADS, TOKENS = 2, 4, 512
PATTERNS = [
    HeadPattern.of("dense"),
    HeadPattern.of("adaptive", threshold=0.6),
    HeadPattern.of("adaptive", threshold=0.9),
    HeadPattern.of("a_shape", sink=64, local=64),
    HeadPattern.of("block_topk", top_k=2),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    config._attn_implementation = "sdpa"
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:  # sharper attention than fresh weights have
        layer.self_attn.q_proj.weight.data *= 40
    return model


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(128, (700,), generator=generator) for name in ("one", "two")}


def search(model, texts, **options):
    return search_prefill_plan(model, texts, **dict(tokens=TOKENS, patterns=PATTERNS, density=0.6) | options)


# --- measuring -----------------------------------------------------------------------------------------------------


def test_errors_and_densities_are_those_of_the_definition(model, texts):
    """Against the model's own layers, run by hand with dense attention and with one head's pattern."""
    plan = search(model, {"one": texts["one"]}, windows=1, density=0.5)
    (start,) = plan.provenance["texts"]["one"]["starts"]
    ids = texts["one"][start : start + TOKENS][None]
    seen = {}
    hooks = []
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(lambda m, a, i=i: seen.__setitem__(("in", i), a[0])))
        hooks.append(
            layer.self_attn.register_forward_pre_hook(
                lambda m, a, k, i=i: seen.__setitem__(("attention", i), k), with_kwargs=True
            )
        )
    with torch.inference_mode():
        model.model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for i, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            dense = attention(**seen["attention", i])[0][0]
            stream = seen["in", i][0]
            for head in range(HEADS):
                pattern = plan.layers[i][head]
                heads = {h: HeadPattern.of("dense") for h in range(HEADS)} | {head: pattern}
                headstart.patch(model, PrefillPlan(HeadPattern.of("dense"), (heads,) * LAYERS))
                with record() as entries, force_path("sparse"):
                    mask = headstart_mask(1, TOKENS, TOKENS)
                    sparse = attention(**seen["attention", i] | {"attention_mask": mask})[0][0]
                headstart.unpatch(model)
                change = (sparse - dense).double().square().sum(-1) / stream.double().square().sum(-1)
                want = change[TOKENS // 8 :].mean().sqrt().item()
                assert pattern.error == pytest.approx(want, rel=2e-3, abs=1e-5), (i, head, pattern)
                assert pattern.density == pytest.approx(
                    entries[0].index.head_density(TOKENS, TOKENS)[head].item() if len(set(heads.values())) > 1 else 1.0
                )


def test_the_model_is_left_as_it_was(model, texts):
    ids = texts["one"][None, :100]
    with torch.inference_mode():
        before = model(ids).logits
        search(model, texts)
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_with_a_window_keep_it(texts):
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.Qwen2Config(
        **sizes, num_hidden_layers=3, use_sliding_window=True, sliding_window=128, max_window_layers=1
    )
    config._attn_implementation = "sdpa"
    model = transformers.Qwen2ForCausalLM(config).eval()
    windowed = [layer.self_attn.sliding_window is not None for layer in model.model.layers]
    assert windowed == [False, True, True]
    plan = search(model, {"one": texts["one"]})
    assert [len(layer) for layer in plan.layers] == [4, 0, 0]
    headstart.patch(model, plan)
    with torch.inference_mode():
        assert model(texts["one"][None, :64]).logits.isfinite().all()


def test_default_candidates_are_matched_in_cost():
    found = candidates(8192)
    assert len(found) == len(set(found)) and {p.name for p in found} == set(PATTERN_NAMES)
    q, k = torch.randn(1, 1, 8192, 16), torch.randn(1, 1, 8192, 16)
    for share in prefill_search.SHARES:
        budget = round(share * 4096 / 64) * 64
        pattern = HeadPattern.of("a_shape", sink=64, local=budget - 64)
        assert pattern in found
        index = prefill_search.pattern_index([pattern], q, k, None, None)
        assert index.density(8192, 8192) == pytest.approx(share, rel=0.35)


# --- choosing ------------------------------------------------------------------------------------------------------


def table(seed: int = 0):
    """Errors that fall as densities grow, differently in every head: [layers, candidates, heads]."""
    torch.manual_seed(seed)
    share = torch.tensor([1.0, 0.5, 0.25, 0.1], dtype=torch.float64)[None, :, None].expand(3, 4, 5).clone()
    error = (1 - share) ** 2 * torch.rand(3, 1, 5, dtype=torch.float64)
    return error, share + 0.05 * (share < 1), share


def best(error, cost, goal: float) -> float:
    """By trying everything: the least cost of one layer's heads within a squared error."""
    options = torch.cartesian_prod(*[torch.arange(error.shape[1])] * error.shape[2])
    heads = torch.arange(error.shape[2])
    errors, costs = error[0][options, heads].sum(1), cost[0][options, heads].sum(1)
    return costs[errors <= goal].min().item()


def test_no_plan_within_the_error_is_much_cheaper():
    error, cost, share = (x[:1] for x in table())
    for budget in (0.05, 0.2, 0.5, 1.0):
        choice = choose(error, cost, share, max_error=budget)
        picked = error.gather(1, choice[:, None]).sum().item()
        assert picked <= budget**2
        found = cost.gather(1, choice[:, None]).sum().item()
        # A multiplier finds the corners of the convex hull: at most one head's step from the best.
        assert found <= best(error, cost, budget**2) + 0.5


def test_a_density_is_kept_and_used():
    error, cost, share = table(1)
    last = math.inf
    for budget in (0.1, 0.2, 0.4, 0.7, 1.0):
        choice = choose(error, cost, share, density=budget)
        density = share.gather(1, choice[:, None]).mean().item()
        assert budget - 0.5 / 15 * 2 <= density <= budget * (1 + 1e-6)
        total = error.gather(1, choice[:, None]).sum().item()
        assert total <= last
        last = total
    assert last == 0


def test_an_error_of_zero_takes_what_is_exact():
    error, cost, share = table(2)
    choice = choose(error, cost, share, max_error=0.0)
    assert (choice == 0).all()


def test_searched_plans_beat_uniform_ones_of_the_same_density(model, texts):
    searched = search(model, texts, density=0.6)
    error, density = searched.provenance["error"], searched.provenance["density"]
    assert density <= 0.6
    for pattern in PATTERNS[1:]:
        uniform = search(model, texts, patterns=[pattern], density=1.0)
        if uniform.provenance["density"] <= density:
            assert error <= uniform.provenance["error"] * 1.001


def test_a_search_is_deterministic(model, texts):
    first, second = (search(model, texts, windows=2, seed=5) for _ in range(2))
    assert first == second
    assert first.provenance["texts"] == second.provenance["texts"]
    other = search(model, texts, windows=2, seed=6)
    assert other.provenance["texts"] != first.provenance["texts"]


# --- the plan and the measurements on disk -------------------------------------------------------------------------


def test_the_plan_is_saved_loaded_and_used(model, texts, tmp_path):
    plan = search(model, texts, density=0.5)
    plan.save(tmp_path / "plan.json")
    loaded = PrefillPlan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.provenance == json.loads(json.dumps(plan.provenance))
    assert (
        loaded.provenance["budget"] == {"density": 0.5} and loaded.provenance["machine"]["torch"] == torch.__version__
    )
    for mine, theirs in zip(plan.layers, loaded.layers):
        assert [(p.error, p.density) for p in mine.values()] == [(p.error, p.density) for p in theirs.values()]
    headstart.patch(model, tmp_path / "plan.json")
    headstart.unpatch(model)


class Interrupt(Exception):
    pass


def test_an_interrupted_search_goes_on(model, texts, tmp_path):
    kept = tmp_path / "kept.json"
    done = []

    def stop():
        done.append(1)
        if len(done) == 3:
            raise Interrupt

    with pytest.raises(Interrupt):
        search(model, texts, measurements=kept, advance=stop)
    assert model.config._attn_implementation == "sdpa"
    before = json.loads(kept.read_text())["measured"]
    assert sum(len(layers) for layers in before.values()) == 3
    steps = []
    plan = search(model, texts, measurements=kept, advance=lambda: steps.append(1))
    assert len(steps) == 2 * LAYERS
    after = json.loads(kept.read_text())["measured"]
    assert all(after[window][layer] == x for window, layers in before.items() for layer, x in layers.items())
    assert plan == search(model, texts)


def test_another_budget_measures_nothing(model, texts, tmp_path, monkeypatch):
    kept = tmp_path / "kept.json"
    search(model, texts, measurements=kept)
    monkeypatch.setattr(prefill_search, "_measure_layer", None)
    plan = search(model, texts, measurements=kept, density=None, max_error=0.0)
    assert plan.provenance["error"] < 1e-6


def damage_truncate(path):
    path.write_text(path.read_text()[:-40])


def damage_numbers(path):
    content = json.loads(path.read_text())
    window = next(iter(content["measured"].values()))
    window["0"]["error"] = window["0"]["error"][:-1]
    path.write_text(json.dumps(content))


def damage_model(path):
    path.write_text(path.read_text().replace('"model_type": "llama"', '"model_type": "mamba"'))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_truncate, r"kept.json: not a file of measurements \(.*\); delete it to measure anew"),
        (damage_numbers, r"kept.json: .*\[0\]: expected \[5, 4\] numbers, got \[4, 4\]; delete it"),
        (damage_model, r"kept.json: model: expected that of this search, got another; delete it"),
    ],
)
def test_damaged_measurements_are_an_error(model, texts, tmp_path, damage, said):
    kept = tmp_path / "kept.json"
    search(model, texts, measurements=kept)
    damage(kept)
    with pytest.raises(ValueError, match=said):
        search(model, texts, measurements=kept)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(density=None), "budget: expected max_error or density, got neither"),
        (dict(max_error=0.1), "budget: expected max_error or density, got both"),
        (dict(density=0.0), "density: expected a share of the attention, above 0 and up to 1, got 0.0"),
        (dict(density=1.5), "density: expected a share"),
        (dict(density=math.nan), "density: expected a share"),
        (dict(density=None, max_error=-1), "max_error: expected at least 0, got -1"),
        (dict(density=None, max_error=math.inf), "max_error: expected at least 0, got inf"),
        (dict(tokens=100), "tokens: expected an integer, at least 256, got 100"),
        (dict(windows=0), "windows: expected an integer, at least 1, got 0"),
        (dict(tokens=1024), r"texts\['one'\]: expected at least 1024 tokens \(a window's length\), got 700"),
        (dict(patterns=[]), "patterns: expected at least one candidate, got 0"),
        (dict(density=0.01), "density: expected one that some candidates meet, got 0.01"),
        (
            dict(patterns=PATTERNS[3:], density=None, max_error=1e-9),
            "max_error: expected at least .*, the error of the most accurate candidates, got 1e-09",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_named(model, texts, options, said):
    with pytest.raises(ValueError, match="search_prefill_plan: " + said):
        search(model, texts, **options)


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    words = {chr(i): i for i in range(128)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def test_the_command_writes_a_plan_that_patches(checkpoint, tmp_path, capsys):
    text, plan = tmp_path / "text.txt", tmp_path / "plan.json"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 16)
    arguments = ["search", str(checkpoint), "--text", str(text), "-o", str(plan), "--tokens", "512"]
    assert cli.main([*arguments, "--density", "0.7"]) == 0
    assert (
        "density 0.6" in capsys.readouterr().out.replace("\n", " ")
        or PrefillPlan.load(plan).provenance["density"] <= 0.7
    )
    assert (tmp_path / "plan.json.measurements.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    headstart.patch(model, plan)
    assert cli.main([*arguments, "--max-error", "0"]) == 0
    assert PrefillPlan.load(plan).provenance["budget"] == {"max_error": 0.0}


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", [], "text.txt: expected a text, got an empty file"),
        ("short " * 10, [], "tokens: expected an integer, at least 256, got 60"),
        (
            "long " * 200,
            ["--tokens", "99999"],
            "search: tokens: expected at most 1,000, which the model and every text",
        ),
        ("long " * 200, ["--density", "2"], "density: expected a share of the attention, above 0 and up to 1, got 2.0"),
        ("long " * 200, ["--density", "1", "--max-error", "1"], "budget: expected max_error or density, got both"),
    ],
)
def test_the_command_names_what_is_wrong(checkpoint, tmp_path, capsys, text, options, said):
    file, plan = tmp_path / "text.txt", tmp_path / "plan.json"
    file.write_text(text)
    assert cli.main(["search", str(checkpoint), "--text", str(file), "-o", str(plan), *options]) == 1
    assert said in capsys.readouterr().err
    assert not plan.exists()


def test_a_missing_model_or_folder_is_named(tmp_path, capsys):
    assert cli.main(["search", str(tmp_path / "none"), "-o", str(tmp_path / "plan.json")]) == 1
    assert "load_model: model: expected a directory with a config.json" in capsys.readouterr().err
    assert cli.main(["search", "smollm2", "-o", str(tmp_path / "no" / "plan.json")]) == 1
    assert "search: output: expected a folder that exists" in capsys.readouterr().err

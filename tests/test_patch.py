"""patch and unpatch on tiny models with random weights: what a model computes, and that it comes back unharmed."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from headstart.attention.forward import force_path  # noqa: E402
from headstart.attention.plan import PrefillPlan  # noqa: E402
from headstart.attention.recording import record  # noqa: E402
from headstart.model.patch import patch, unpatch  # noqa: E402
from headstart.weights import upcast  # noqa: E402
from headstart.weights.int4_linear import Int4Linear  # noqa: E402
from headstart.weights.int4_quantize import quantize_linears  # noqa: E402
from models import EVERYTHING, left_padded, logits, make, tokens  # noqa: E402
from supported import OWN_ATTENTION  # noqa: E402


@pytest.fixture(autouse=True)
def sparse_from_the_first_token():
    """Tiny prompts go the way of long ones, and no warning goes unnoticed."""
    with warnings.catch_warnings(), force_path("sparse"):
        warnings.filterwarnings("error", message="headstart: the model's own attention")
        yield


@pytest.fixture
def paths(monkeypatch):
    """The path of every layer that headstart's attention ran."""
    with record() as entries:
        yield lambda: [entry.path for entry in entries]


# --- the same results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", EVERYTHING)
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_plan_that_selects_everything_is_the_models_own_attention(family, attn, plan, paths):
    model = make(family, attn)
    want = logits(model, tokens())
    got = logits(patch(model, EVERYTHING[plan]), tokens())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert paths() == ["dense" if plan == "dense" else "sparse"] * 2


@pytest.mark.parametrize("plan", EVERYTHING)
def test_left_padding_is_not_attended(plan, paths):
    ids, mask = left_padded([150, 71, 3], 150)
    model = make()
    want = logits(model, ids, attention_mask=mask)
    got = logits(patch(model, EVERYTHING[plan]), ids, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-5, atol=1e-5)
    assert len(paths()) == 2


def test_a_sparse_plan_attends_what_its_index_says(paths):
    model = patch(make(), PrefillPlan.uniform("a_shape", sink=64, local=1))
    ids = tokens(1, 256)
    changed = ids.clone()
    changed[:, 70] = (changed[:, 70] + 1) % 190 + 2
    difference = (logits(model, ids) - logits(model, changed)).abs().amax(-1)[0]
    # Token 70 is neither in the first block nor in a local block of the last 64 queries, nor of those they attend.
    assert difference[70:128].min() > 0 and difference[192:].max() == 0


@pytest.mark.parametrize("prefill", ["adaptive", "vertical_slash", "a_shape", "block_topk", "dense"])
def test_every_named_pattern_runs(prefill, paths):
    assert logits(patch(make(), prefill), tokens()).isfinite().all()
    assert len(paths()) == 2


def test_a_plan_file_is_accepted_by_path(tmp_path, paths):
    plan = PrefillPlan.uniform("a_shape", sink=64, local=64).for_model(make())
    plan.save(tmp_path / "plan.json")
    by_plan = logits(patch(make(), plan), tokens())
    for path in (tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert torch.equal(logits(patch(make(), path), tokens()), by_plan)


def test_chunked_prefill_reads_what_one_pass_reads(paths):
    model = patch(make(), EVERYTHING["adaptive"])
    ids = tokens()
    want = logits(model, ids)
    cache = transformers.DynamicCache(config=model.config)
    got = torch.cat([logits(model, chunk, past_key_values=cache) for chunk in ids.split([70, 65, 1, 14], 1)], 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert paths()[2:] == ["sparse"] * 4 + ["dense"] * 4


# --- generate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [[90], [90, 90], [90, 41, 7]], ids=str)
def test_generate_is_unchanged(options, lengths, paths):
    ids, mask = left_padded(lengths, 90)
    model = make()
    options = dict(max_new_tokens=8, do_sample=False, attention_mask=mask, **options)
    want = model.generate(ids, **options)
    got = patch(model, EVERYTHING["adaptive"]).generate(ids, **options)
    assert torch.equal(got, want)
    assert paths()[:2] == ["sparse"] * 2 and len(paths()) == 16


# --- in, out, and in again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpatch_restores_everything(attn, dtype):
    model = make(attn=attn).to(dtype)
    want, before = logits(model, tokens()), {name: set(vars(m)) for name, m in model.named_modules()}
    unpatch(patch(model, "a_shape", linear="fp32"))
    assert model.config._attn_implementation == attn
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    assert torch.equal(logits(model, tokens()), want)
    assert unpatch(model) is model


def test_patching_twice_takes_the_last_plan_and_one_unpatch():
    model = make()
    want = logits(model, tokens())
    twice = logits(patch(patch(model, "a_shape"), "dense"), tokens())
    assert torch.equal(twice, logits(patch(make(), "dense"), tokens()))
    assert torch.equal(logits(unpatch(model), tokens()), want)


def test_patching_before_or_after_a_change_of_dtype_is_the_same():
    plan = PrefillPlan.uniform("a_shape", sink=1, local=64)
    before, after = patch(make(), plan).to(torch.bfloat16), patch(make().to(torch.bfloat16), plan)
    assert torch.equal(logits(before, tokens()), logits(after, tokens()))
    assert torch.equal(logits(unpatch(before), tokens()), logits(make().to(torch.bfloat16), tokens()))


def test_models_do_not_know_of_each_other():
    narrow, wide = PrefillPlan.uniform("a_shape", sink=1, local=1), EVERYTHING["a_shape"]
    first, second, plain = make(), make("Qwen2", "eager"), make()
    alone = [logits(patch(first, narrow), tokens()), logits(patch(second, wide), tokens()), logits(plain, tokens())]
    together = [logits(model, tokens()) for model in (first, second, plain)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    unpatch(first)
    assert torch.equal(logits(second, tokens()), alone[1])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_models_may_share_a_config(attn):
    first = make(attn=attn)
    second, third = (transformers.LlamaForCausalLM(first.config).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    third.load_state_dict(first.state_dict())
    want = logits(first, tokens())
    sparse = logits(patch(first, PrefillPlan.uniform("a_shape", sink=1, local=1)), tokens())
    patch(second, PrefillPlan.uniform("a_shape", sink=1, local=1))
    assert torch.equal(logits(third, tokens()), want)
    unpatch(first)
    assert torch.equal(logits(first, tokens()), want) and torch.equal(logits(second, tokens()), sparse)
    unpatch(second)
    assert first.config._attn_implementation == attn


def test_a_copy_of_a_patched_model_is_patched_on_its_own():
    model = patch(make().to(torch.bfloat16), "a_shape", linear="fp32")
    want, twin = logits(model, tokens()), copy.deepcopy(model)
    unpatch(model)
    assert torch.equal(logits(twin, tokens()), want)
    torch.nn.init.zeros_(twin.lm_head.weight)
    assert logits(twin, tokens()).abs().max() == 0 and model.lm_head.weight.abs().max() > 0
    assert unpatch(twin).config._attn_implementation == "sdpa"


def test_a_patched_model_is_saved_as_if_it_were_not(tmp_path):
    model = make()
    want = logits(model, tokens())
    patch(model).save_pretrained(tmp_path)
    assert "headstart" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path), tokens()), want)


# --- what headstart does not do --------------------------------------------------------------------------------------


def own_attention_is_said_once(model, reason, run, *, close=False):
    """The patched model's results are the model's own, and each reason is told in one warning."""
    want = run(model)
    patch(model, PrefillPlan.uniform("a_shape", sink=1, local=1))
    with pytest.warns(RuntimeWarning, match=f"own attention.*layer 0.*because of .*{reason}") as caught:
        first = run(model)
        second = run(model)
    assert sum("own attention" in str(w.message) for w in caught) == 1
    for got in (first, second):
        if close:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got, want)


def causal_4d(length, dtype=torch.float32):
    return torch.zeros(length, length, dtype=dtype).masked_fill(
        torch.ones(length, length, dtype=torch.bool).triu(1), torch.finfo(dtype).min
    )[None, None]


def test_output_attentions():
    def run(model):
        with torch.no_grad():
            return torch.stack(model(tokens(), output_attentions=True).attentions)

    own_attention_is_said_once(make(attn="eager"), "output_attentions", run)


def test_a_custom_4d_mask():
    mask = causal_4d(150)
    mask[:, :, 100:, 5] = torch.finfo(torch.float32).min
    own_attention_is_said_once(make(), "a custom", lambda model: logits(model, tokens(), attention_mask=mask))


def test_padding_on_the_right_or_within():
    for hidden in (slice(140, 150), slice(60, 70)):
        mask = torch.ones(2, 150, dtype=torch.long)
        mask[1, hidden] = 0
        own_attention_is_said_once(
            make(), "padding that is not on the left", lambda model, m=mask: logits(model, tokens(), attention_mask=m)
        )


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_families_with_attention_of_their_own(family):
    sizes, _, word = OWN_ATTENTION[family]
    own_attention_is_said_once(make(family, "eager", **sizes), word, lambda m: logits(m, tokens()))


def test_gradients():
    def run(model):
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    own_attention_is_said_once(make(), "gradients", run)


def test_dropout_in_training():
    def run(model):
        torch.manual_seed(3)
        return logits(model.train(), tokens())

    own_attention_is_said_once(make(attention_dropout=0.3), "dropout", run)


def test_attention_that_is_not_causal():
    model = make(is_causal=False)
    own_attention_is_said_once(model, "bidirectional", lambda m: logits(m, tokens(), use_cache=False))


def test_an_unknown_argument_is_never_ignored():
    own_attention_is_said_once(make(), "position_bias", lambda m: logits(m, tokens(), position_bias=torch.zeros(())))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_the_models_own():
    model = make()
    want = logits(model, tokens())
    compiled = torch.compile(patch(model, "a_shape"), backend="eager")
    torch.testing.assert_close(logits(compiled, tokens()), want, rtol=1e-5, atol=1e-5)


# --- linear layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "features", "bias"), [(64, 40, True), (65, 130, False), (300, 33, True)])
def test_upcast_linear_is_at_least_as_close_as_torchs(dtype, rows, features, bias, monkeypatch):
    monkeypatch.setattr(upcast, "TILE_ELEMENTS", 50 * 70)  # several tiles of rows and columns
    torch.manual_seed(0)
    x, weight = torch.randn(2, rows, 70, dtype=dtype), torch.randn(features, 70, dtype=dtype)
    bias = torch.randn(features, dtype=dtype) if bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    error = (upcast.upcast_linear(x, weight, bias).double() - exact).abs().max()
    torchs = (torch.nn.functional.linear(x, weight, bias).double() - exact).abs().max()
    assert error <= torchs * 1.01


def test_linear_layers_are_upcast_in_prefill_only(monkeypatch):
    calls = []
    monkeypatch.setattr(upcast, "upcast_linear", lambda *args: calls.append(args[0].shape) or torch.zeros(()))
    layer = torch.nn.Linear(16, 8, dtype=torch.bfloat16).requires_grad_(False)
    upcast.attach(layer, "fp32")
    layer(torch.zeros(1, 63, 16, dtype=torch.bfloat16))
    layer(torch.zeros(64, 16, dtype=torch.bfloat16).requires_grad_())
    assert calls == []
    layer(torch.zeros(2, 32, 16, dtype=torch.bfloat16))
    assert calls == [(2, 32, 16)]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        layer(torch.zeros(64, 15, dtype=torch.bfloat16))


def test_linear_modes():
    model = make().to(torch.bfloat16)
    patch(model, linear="model")
    assert not any("forward" in vars(module) for module in model.modules())
    hooked = model.lm_head.forward = lambda x: x
    patch(model, linear="auto")
    assert model.lm_head.forward is hooked and "forward" in vars(model.model.layers[0].mlp.up_proj)
    unpatch(model)
    assert model.lm_head.forward is hooked and "forward" not in vars(model.model.layers[0].mlp.up_proj)
    assert upcast.upcast_pays(torch.bfloat16) in (True, False)


def test_int8_activations_let_int4_layers_round_theirs():
    model = quantize_linears(make(), group_size=32)
    layers = [module for module in model.modules() if isinstance(module, Int4Linear)]
    exact = logits(model, tokens())
    layers[0].int8_activations = True  # by hand: neither patch nor unpatch takes it back
    patch(model, "dense", int8_activations=True)
    assert all(layer.int8_activations for layer in layers)
    rounded = logits(model, tokens())
    assert 0 < (rounded - exact).norm() <= 0.05 * exact.norm()
    by_hand = [True] + [False] * (len(layers) - 1)
    patch(model, "dense")
    assert [layer.int8_activations for layer in layers] == by_hand
    unpatch(patch(model, int8_activations=True))
    assert [layer.int8_activations for layer in layers] == by_hand


def test_a_hook_put_over_a_patched_linear_survives_unpatch():
    layer = torch.nn.Linear(70, 33, dtype=torch.bfloat16).requires_grad_(False)
    torch.manual_seed(0)
    x = torch.randn(300, 70, dtype=torch.bfloat16)
    upcast.attach(layer, "fp32")
    inner, in_float32 = layer.forward, layer(x)
    layer.forward = lambda x: inner(x) + 1
    upcast.detach(layer)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias) + 1)
    assert torch.equal(in_float32, upcast.upcast_linear(x, layer.weight, layer.bias))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prefill": "spiral"}, ValueError, "patch: prefill: expected one of dense, .* got 'spiral'"),
        ({"prefill": 3}, ValueError, "patch: prefill: expected one of"),
        ({"prefill": "missing/plan.json"}, FileNotFoundError, "expected a file, got 'missing/plan.json'"),
        ({"linear": "int3"}, ValueError, "patch: linear: expected one of auto, fp32, model, got 'int3'"),
        ({"int8_activations": 1}, ValueError, "patch: int8_activations: expected True or False, got 1"),
        ({"model": torch.nn.Linear(8, 8)}, ValueError, "patch: model: expected a transformers decoder"),
        ({"model": "name"}, ValueError, "patch: model: expected a transformers model, got str"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(arguments, error, message):
    model = make()
    with pytest.raises(error, match=message):
        patch(**{"model": model} | arguments)
    assert model.config._attn_implementation == "sdpa"


def test_a_plan_for_another_model_is_refused():
    plan = PrefillPlan.uniform("a_shape").for_model(make())
    model = make("Qwen2", num_hidden_layers=3)
    with pytest.raises(ValueError, match="another model: model_type: expected 'llama', got 'qwen2'; num_hidden_layers"):
        patch(model, plan)
    assert model.config._attn_implementation == "sdpa"


def test_without_transformers_headstart_imports_and_patch_says_what_is_missing():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch, headstart\n"
        "try: headstart.patch(torch.nn.Linear(1, 1))\n"
        "except ImportError as error: print(error)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == "headstart.patch needs the package transformers: pip install transformers"

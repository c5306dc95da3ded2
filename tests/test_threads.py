"""What one call does is not seen by another: models run, are read and are searched by several threads at once."""

from __future__ import annotations

import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")

from headstart import Context, PrefillPlan, patch, unpatch  # noqa: E402
from headstart.attention import attach  # noqa: E402
from headstart.attention.forward import ContextKeys, force_path  # noqa: E402
from headstart.attention.patterns import HeadPattern  # noqa: E402
from headstart.attention.recording import record  # noqa: E402
from headstart.attention.search import search_prefill_plan  # noqa: E402
from headstart.attention.view import view_of  # noqa: E402
from headstart.commands import inspect  # noqa: E402
from models import logits, make, tokens  # noqa: E402

NARROW = PrefillPlan.uniform("a_shape", sink=1, local=1)
IDS = tokens(1, 200)


def elsewhere(work):
    """What `work` gives in another thread."""
    found, failed = [], []

    def run():
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def build(model, **options):
    return Context.build(model, IDS, prefill="dense", **options)


def same(a: Context, b: Context) -> bool:
    fields = ("keys", "values", "queries", "scores", "errors")
    return all(torch.equal(getattr(x, f), getattr(y, f)) for x, y in zip(a.layers, b.layers) for f in fields)


def state(model):
    """What a call might change in a model: configs, hooks, forwards and other attributes."""
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    return model.config._attn_implementation, [set(vars(m)) for m in model.modules()], [[*map(len, h)] for h in hooks]


def search(model, advance=lambda: None):
    patterns = [HeadPattern.of("dense"), HeadPattern.of("a_shape", sink=64, local=64)]
    texts = {"one": tokens(1, 256)[0]}
    return search_prefill_plan(model, texts, tokens=256, density=0.9, patterns=patterns, advance=advance)


def read(model, advance=lambda: None):
    with torch.inference_mode():
        return inspect.read(model, NARROW, IDS, advance)


CALLS = {"Context.build": lambda model, advance: build(model, advance=advance), "search": search, "inspect": read}


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_a_call_never_changes_the_model_that_it_reads_with(call):
    model = make()
    want, before, seen = logits(model, IDS), state(model), []

    def advance():
        assert state(model) == before
        assert torch.equal(elsewhere(lambda: logits(model, IDS)), want)
        seen.append(1)

    CALLS[call](model, advance)
    assert len(seen) >= 2 and state(model) == before


@pytest.mark.parametrize("call", CALLS)
def test_a_call_on_a_patched_model_leaves_its_patch(call):
    model = patch(make(), NARROW)
    with force_path("sparse"):
        want = logits(model, IDS)
    before = state(model)

    def other():
        with force_path("sparse"):
            return logits(model, IDS)

    CALLS[call](model, lambda: torch.testing.assert_close(elsewhere(other), want, rtol=0, atol=0))
    assert state(model) == before and torch.equal(other(), want)


@pytest.mark.parametrize("call", CALLS)
def test_two_calls_at_once_on_one_model_give_what_each_gives_alone(call):
    model, found = make(), []
    alone = CALLS[call](model, lambda: None)

    def advance():
        if not found:
            found.append(None)
            found[0] = elsewhere(lambda: CALLS[call](model, lambda: None))

    found.append(CALLS[call](model, advance))
    for one in found:
        if call == "Context.build":
            assert same(one, alone)
        elif call == "search":
            assert one == alone
        else:
            assert one.keys() == alone.keys()
            assert all(torch.equal(one[i].index.block_index, alone[i].index.block_index) for i in alone)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_model_that_shares_its_config_with_a_patched_one_is_read_with_its_own(attn):
    first = make(attn=attn)
    second = transformers.LlamaForCausalLM(first.config).eval()
    second.load_state_dict(first.state_dict())
    want = build(second)
    patch(first, NARROW)
    assert same(build(second), want)
    assert inspect.read(second, NARROW, IDS).keys() == {0, 1}
    assert first.config._attn_implementation == "headstart"
    unpatch(first)
    assert first.config._attn_implementation == attn


def test_models_are_patched_while_others_run():
    """Layers with a shared config look for the patch of another model, whose layers come and go."""
    first = make()
    third = transformers.LlamaForCausalLM(first.config).eval()
    want, failed = logits(third, IDS), []
    patch(first, NARROW)

    def churn():
        try:
            for _ in range(30):  # a bounded number: on a busy machine this thread may get more time than the other
                patch(make(num_hidden_layers=1), NARROW)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            assert torch.equal(logits(third, IDS), want)
    finally:
        for thread in threads:
            thread.join()
    assert failed == []


def test_hooks_of_the_model_run_once_when_it_is_read():
    model, ran = make(), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: ran.append(type(module).__name__))
    build(model)
    assert ran == ["LlamaDecoderLayer"] * 2


# --- what is recorded ----------------------------------------------------------------------------------------------


def test_a_context_is_not_calibrated_with_what_others_run():
    model, other = make(), patch(make(num_hidden_layers=3), "dense")
    alone, longer = build(model), tokens(1, 300)

    def advance():  # in another thread, and in this one
        elsewhere(lambda: logits(other, longer))
        logits(other, longer)

    assert same(build(model, advance=advance), alone)
    assert same(build(patch(model, "dense"), advance=advance), alone)


def test_a_recording_has_the_forwards_of_its_own_thread_only():
    model, other = patch(make(), "dense"), patch(make(), "dense")

    def run(model):
        with force_path("dense"):
            return logits(model, IDS)

    def generate():
        with force_path("dense"):
            return other.generate(IDS, max_new_tokens=3, do_sample=False)

    with record() as entries:
        assert elsewhere(generate).shape == (1, 203)
        elsewhere(lambda: run(model))
        assert entries == []
        with record() as inner:
            run(model)
        run(other)
        elsewhere(lambda: run(model))
    assert [len(inner), len(entries)] == [2, 4]
    run(model)
    assert len(entries) == 4


def test_a_forced_path_is_that_of_its_own_thread_only():
    model = patch(make(), NARROW)

    def paths():
        with record() as entries:
            logits(model, IDS)
        return [entry.path for entry in entries]

    alone = paths()
    with force_path("sparse"):
        assert paths() == ["sparse"] * 2
        assert elsewhere(paths) == alone != ["sparse"] * 2
        with force_path("dense"):
            assert paths() == ["dense"] * 2
        assert paths() == ["sparse"] * 2
    assert paths() == alone


# --- a fixed context -------------------------------------------------------------------------------------------------


def test_threads_ask_different_contexts_of_one_model():
    model = make()
    texts = [tokens(1, 200), torch.flip(tokens(1, 200), (1,))]
    contexts = [Context.build(model, text, prefill="dense") for text in texts]
    patch(model, "dense")
    question = tokens(1, 9)
    want = [logits(model, question, past_key_values=context.cache()) for context in contexts]
    assert not torch.equal(*want)
    got, barrier = [[], []], threading.Barrier(2)

    def ask(i):
        barrier.wait()
        for _ in range(10):
            got[i].append(logits(model, question, past_key_values=contexts[i].cache()))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(got[i]) == 10 and all(torch.equal(x, want[i]) for x in got[i]) for i in range(2))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [1, 2])
def test_attention_that_is_not_headstarts_cannot_leave_a_context_out(attn, layers):
    """In the last layer too, after which no other layer could tell."""
    model = make(attn=attn, num_hidden_layers=layers)
    context = build(model)
    with pytest.raises(RuntimeError, match="would leave the fixed context out"):
        logits(model, tokens(1, 9), past_key_values=context.cache())


def test_a_wrapped_context_key_tells_its_shape_and_refuses_the_rest():
    model = make()
    own = torch.randn(1, 2, 9, 16)
    keys = ContextKeys(own, build(model).cache().layers[0])
    assert (keys.shape, keys.dtype, keys.device) == (own.shape, own.dtype, own.device) and keys.own is own
    for use in (lambda: keys + 1, lambda: keys[:, :1], lambda: torch.cat([own, keys])):
        with pytest.raises(RuntimeError, match="would leave the fixed context out"):
            use()


# --- views -----------------------------------------------------------------------------------------------------------


def test_a_view_has_modules_and_configs_of_its_own_and_shares_weights():
    model = patch(make().to(torch.bfloat16), NARROW, linear="fp32")
    view = view_of(model)
    assert torch.equal(logits(view, IDS), logits(model, IDS))
    mine, theirs = set(view.modules()), set(model.modules())
    assert not mine & theirs and len(mine) == len(theirs)
    assert all(a is b for a, b in zip(view.parameters(), model.parameters(), strict=True))
    layer = view.model.layers[0].self_attn
    assert layer.config is view.config is view.model.config and view.config is not model.config
    assert layer.q_proj.forward.args == (layer.q_proj,)  # not the model's
    view.config._attn_implementation = {"": "eager"}
    assert model.config._attn_implementation == "headstart"
    view.model.layers[1].register_forward_hook(lambda *_: None)
    assert not model.model.layers[1]._forward_hooks
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert logits(view, IDS).abs().max() == 0
    unpatch(view)
    assert attach.is_attached(model) and not attach.is_attached(view)

"""`headstart prune`: every row loses its smallest scores, the folder opens, the losses are those of the two models."""

import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

import headstart  # noqa: E402
from artifacts import WORDS, check_layout, tiny_folder, tokenizer  # noqa: E402
from artifacts import run_prune as run  # noqa: E402
from headstart import BitmapLinear, BitmapWeight, cli  # noqa: E402
from headstart.commands.prune import choose_texts  # noqa: E402
from headstart.weights.names import decoder_layers  # noqa: E402
from headstart.weights.prune import prune_layers, prune_weight  # noqa: E402
from models import SIZES, logits, make, tokens  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path)


def text_ids(folder):
    return torch.tensor([int(word[1:]) for word in (folder / "text.txt").read_text().split()])


def loss(model, ids):
    """Of the second half."""
    tail = len(ids) // 2
    return torch.nn.functional.cross_entropy(logits(model, ids[None])[0, -tail - 1 : -1], ids[-tail:]).item()


def by_hand(w, sparsity, norms=1.0):
    """In numpy, row by row."""
    out = w.detach().float().numpy().copy()
    for row, score in zip(out, np.abs(out) * np.asarray(norms, dtype=np.float32)):
        row[np.argsort(score, kind="stable")[: round(sparsity * len(row))]] = 0.0
    return torch.from_numpy(out).to(w.dtype)


# --- one weight -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.004, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("wanda", [False, True])
def test_prune_weight(dtype, sparsity, wanda):
    w = torch.randn(70, 133).to(dtype)
    if dtype == torch.float32:  # no ties, which either may break as it likes
        norms = torch.rand(133) + 0.1 if wanda else None
        assert torch.equal(prune_weight(w, sparsity, norms), by_hand(w, sparsity, norms if wanda else 1.0))
    norms = torch.rand(133) if wanda else None
    pruned = prune_weight(w, sparsity, norms)
    count, before = round(sparsity * 133), (w == 0).sum(1)
    assert pruned.dtype == dtype and ((pruned == 0).sum(1) == before.clamp(min=count)).all()
    assert not torch.signbit(pruned)[(pruned == 0) & (w != 0)].any()  # a bit-exact bitmap would keep -0.0
    kept = pruned != 0
    assert torch.equal(pruned[kept], w[kept])
    score = w.abs().float() * (1 if norms is None else norms)
    assert (score.masked_fill(~kept, torch.inf).amin(1) >= score.masked_fill(kept, -1).amax(1)).all()
    assert BitmapWeight.compress(pruned).values.numel() == 70 * (133 - count) - ((w == 0) & kept).sum()


@pytest.mark.parametrize("sparsity", [0, 1, -0.5, 1.5, float("nan")])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match="prune_weight: sparsity: expected a share of zeros above 0 and below 1, got"):
        prune_weight(torch.ones(2, 2), sparsity)


def test_bad_weights_and_norms():
    for w in (torch.ones(3), torch.ones(2, 2, dtype=torch.int8), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match=r"prune_weight: w: expected finite weights \[N, K\]"):
            prune_weight(w, 0.5)
    for norms in (torch.ones(3), torch.tensor([1, -1.0]), torch.tensor([1, torch.inf])):
        with pytest.raises(ValueError, match=r"prune_weight: norms: expected finite norms \[2\]"):
            prune_weight(torch.ones(2, 2), 0.5, norms)


# --- all layers -----------------------------------------------------------------------------------------------------


def pruned_state(model, **options):
    """What `prune_layers` leaves, layer by layer, and the losses."""
    state, losses, layers = {}, {}, decoder_layers(model)
    for name in prune_layers(model, layers, losses=losses, **options):
        for other in layers[: layers.index(name)]:
            assert all(p.is_meta for p in model.get_submodule(other).parameters())  # one layer at a time
        state |= {key: x.clone() for key, x in model.state_dict().items() if key.startswith(f"{name}.")}
    return state, losses


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_layers_see_what_pruned_layers_give(method):
    """Against pruning that runs the whole model anew for every layer."""
    ids, test = tokens(3, 60), tokens(1, 90)[0]
    want = make(num_hidden_layers=3)
    before = loss(want, test)
    inputs = {}

    def remember(module, args):
        inputs.setdefault(module, []).append(args[0].double())

    for layer in want.model.layers:
        linears = [m for m in layer.modules() if type(m) is torch.nn.Linear]
        hooks = [m.register_forward_pre_hook(remember) for m in linears]
        logits(want, ids)
        for hook in hooks:
            hook.remove()
        for m in linears:
            norms = torch.cat(inputs[m]).flatten(0, 1).norm(dim=0).float() if method == "wanda" else 1.0
            m.weight.data = by_hand(m.weight, 0.6, norms)
    done = []
    options = dict(sparsity=0.6, method=method, samples=list(ids), held_out={"a": test})
    state, losses = pruned_state(make(num_hidden_layers=3), advance=lambda: done.append(1), **options)
    different = [name for name, x in state.items() if not torch.equal(x, want.state_dict()[name])]
    assert not different and len(state) == 3 * 9
    assert losses["a"] == pytest.approx((before, loss(want, test)), abs=1e-5)
    assert len(done) == 3 * (2 + (6 if method == "wanda" else 0))


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2", "Gemma3Text", "Phi3", "OPT", "GPTNeoX", "Mixtral", "Qwen3Moe"])
def test_other_families(family):
    sizes = dict(OPT=dict(word_embed_proj_dim=64, ffn_dim=96), Gemma2=dict(head_dim=16), Gemma3Text=dict(head_dim=16))
    make_it = lambda: make(family, "eager", **sizes.get(family, {}))  # noqa: E731
    ids, model = tokens(2, 80), make_it()
    before = loss(model, ids[0])
    state, losses = pruned_state(make_it(), sparsity=0.5, method="wanda", samples=[ids[1]], held_out={"a": ids[0]})
    linears = {name for name, m in model.named_modules() if type(m) is torch.nn.Linear and f"{name}.weight" in state}
    assert linears
    for name in linears:
        assert ((state[f"{name}.weight"] == 0).float().mean(1) - 0.5).abs().max() < 0.01
    model.load_state_dict(model.state_dict() | state)
    assert losses["a"] == pytest.approx((before, loss(model, ids[0])), abs=1e-4) and losses["a"].after != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sparsity=1.0), "sparsity: expected a share of zeros above 0 and below 1, got 1.0"),
        (dict(method="best"), "method: expected 'magnitude' or 'wanda', got 'best'"),
        (dict(samples=[]), "samples: expected at least one text for 'wanda', got none"),
        (dict(samples=[torch.ones(1, 5)]), "text 0: expected token ids int64"),
    ],
)
def test_bad_arguments_of_prune_layers(options, message):
    model = make()
    options = dict(sparsity=0.5, method="wanda", samples=[tokens(1, 20)[0]]) | options
    with pytest.raises(ValueError, match=f"prune_layers: {message}"):
        next(prune_layers(model, decoder_layers(model), **options))
    torch.testing.assert_close(model.state_dict(), make().state_dict(), rtol=0, atol=0)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["same", "int8", "int4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_is_written(folder, capsys, values, method):
    result = run(folder, method=method, values=values, group_size=32)
    check_layout(folder / "out", 2)
    model = headstart.load(folder / "out")
    bitmaps = {name: m for name, m in model.named_modules() if isinstance(m, BitmapLinear)}
    assert len(bitmaps) == 14 and all(m.values_kind == values for m in bitmaps.values())
    assert type(model.lm_head) is torch.nn.Linear
    shares = [layer.nnz / (layer.in_features * layer.out_features) for layer in bitmaps.values()]
    assert result.density == pytest.approx(np.mean(shares), abs=0.01) and max(shares) <= 0.5
    if values == "same":
        assert set(shares) == {0.5} and result.density == 0.5
        if method == "magnitude":
            for name, layer in bitmaps.items():
                want = by_hand(make().get_submodule(name).weight, 0.5)
                assert torch.equal(layer.weight_bitmap.decompress(), want)
    ids = text_ids(folder)[:100]
    assert result.losses.keys() == {"text.txt"}
    change = result.losses["text.txt"]
    assert change.before == pytest.approx(loss(make(), ids), abs=1e-5)
    assert change.after == pytest.approx(loss(model, ids), abs=1e-5) and change.after != change.before
    size = (folder / "out" / "model.safetensors").stat().st_size
    assert result.bytes == size
    said = capsys.readouterr().out
    assert f" MiB in float32 -> {size / 2**20:,.0f} MiB; 14 layers, with " in said
    assert f"loss on text.txt {change.before:.4f} -> {change.after:.4f} ({change.after - change.before:+.4f})" in said
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert transformers.AutoTokenizer.from_pretrained(folder / "out")("w7").input_ids == [7]
    again.save_pretrained(folder / "again")
    assert torch.equal(logits(headstart.load(folder / "again"), tokens()), logits(model, tokens()))


def test_bytes_of_half_precision(tmp_path):
    """9 bits a weight, 5 and 3 with rounded values, and what offsets and scales add."""
    sizes = dict(hidden_size=256, intermediate_size=512, vocab_size=199, num_hidden_layers=1)
    make(**sizes).bfloat16().save_pretrained(tmp_path / "in")
    tokenizer().save_pretrained(tmp_path / "in")
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    for values, bits in (("same", 9), ("int8", 5), ("int4", 3)):
        run(tmp_path, values=values, method="magnitude", tokens=50, group_size=256)
        layer = headstart.load(tmp_path / "out").model.layers[0].mlp.up_proj
        weight = layer.weight_bitmap
        more = 64 * (512 + 1) + (0 if values == "same" else 16 * 512)
        assert 0.93 * bits * 512 * 256 < 8 * weight.nbytes - more <= bits * 512 * 256


@pytest.mark.parametrize("tied", [False, True])
def test_tied_output_layer_and_generation_config(folder, tied):
    want = make(tie_word_embeddings=tied, attention_bias=True)
    want.save_pretrained(folder / "in")
    transformers.GenerationConfig(max_new_tokens=7).save_pretrained(folder / "in")
    run(folder)
    model = headstart.load(folder / "out")
    assert model.generation_config.max_new_tokens == 7 and type(model.lm_head) is torch.nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert torch.equal(model.model.embed_tokens.weight, want.model.embed_tokens.weight)


def test_what_would_grow_stays_plain(folder, capsys):
    result = run(folder, sparsity=0.03, method="magnitude")
    model = headstart.load(folder / "out")
    plain = [name for name, m in model.model.named_modules() if type(m) is torch.nn.Linear]
    assert len(plain) == 14 and "14 of them plain, as their bitmap would be larger" in capsys.readouterr().out
    want = by_hand(make().model.layers[1].mlp.down_proj.weight, 0.03)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, want) and result.density == 1.0
    check_layout(folder / "out", 2)


def test_replaces_its_own_folder_and_no_other(folder):
    for sparsity in (0.3, 0.6):
        run(folder, sparsity=sparsity, method="magnitude")
    modules = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]["modules"]
    assert modules["model.layers.0.mlp.up_proj"] == {"nnz": 96 * (64 - round(0.6 * 64))}
    with pytest.raises(ValueError, match="prune: output: expected a new folder, an empty one or one of its own"):
        headstart.prune(folder / "in", folder / "in")
    with pytest.raises(ValueError, match="prune: model: expected one that is not quantised"):
        headstart.prune(folder / "out", folder / "twice")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sparsity=1.0), "sparsity: expected a share of zeros above 0 and below 1, got 1.0"),
        (dict(sparsity=0), "sparsity: expected a share of zeros above 0 and below 1, got 0"),
        (dict(method="best"), "method: expected 'magnitude' or 'wanda', got 'best'"),
        (dict(values="int2"), "values: expected 'same', 'int8' or 'int4', got 'int2'"),
        (dict(group_size=0), r"group_size: expected a positive number, or -1 \(a row\), got 0"),
        (dict(windows=0), "windows: expected at least 1, got 0"),
        (dict(tokens=400), "text: expected at least 800 tokens in text.txt, got 600"),
        (dict(tokens=5000), "tokens: expected 2 to 1,024, which the model reads, got 5000"),
    ],
)
def test_bad_arguments_leave_nothing(folder, options, message):
    with pytest.raises(ValueError, match=f"prune: {message}"):
        run(folder, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["in", "text.txt"]


def test_texts(folder):
    (folder / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty.txt: expected a text, got an empty file"):
        run(folder, texts=[folder / "empty.txt"])
    with pytest.raises(ValueError, match="prune: text: expected files of different names"):
        run(folder, texts=[folder / "text.txt"] * 2)
    ids = {"long": torch.arange(1000), "short": torch.arange(430)}
    held_out, samples = choose_texts(ids, "wanda", None, 5, 9999)
    assert {name: len(x) for name, x in held_out.items()} == dict(long=215, short=215)
    assert [len(x) for x in samples] == [215] * 5 and all(x[0] >= 215 for x in samples)
    assert [int(x[0]) for x in samples[:3]] == [310, 500, 690] and [int(x[-1]) for x in samples[3:]] == [429, 429]
    assert choose_texts(ids, "magnitude", None, 5, 300) == (
        {"long": pytest.approx(ids["long"][:300]), "short": pytest.approx(ids["short"][:300])},
        [],
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_interrupted_it_leaves_what_was_there(folder, monkeypatch, stop):
    run(folder, method="magnitude")
    before = (folder / "out" / "model.safetensors").read_bytes()
    compress, calls = BitmapWeight.compress, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 10:  # in the second layer
            raise stop("stopped")
        return compress(*args)

    monkeypatch.setattr(BitmapWeight, "compress", stops)
    for out in ("out", "new"):
        calls.clear()
        with pytest.raises(stop, match="stopped"):
            run(folder, out, method="magnitude", sparsity=0.7)
    assert (folder / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["in", "out", "text.txt"]


def test_weights_that_are_not_finite_are_named(folder):
    model = make()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(folder / "in")
    (folder / "in" / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight: prune_weight: w: expected finite"):
        run(folder, method="magnitude")
    assert not (folder / "out").exists()


def test_a_model_without_plain_linear_layers_is_refused(folder):
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=SIZES["vocab_size"])
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer().save_pretrained(folder / "gpt2")
    with pytest.raises(ValueError, match="prune: model: expected linear layers in its decoder layers, got a GPT2LM"):
        headstart.prune(folder / "gpt2", folder / "out", texts=[folder / "text.txt"], tokens=100)


def test_command(folder, capsys):
    arguments = ["prune", str(folder / "in"), "-o", str(folder / "out"), "--sparsity", "0.75", "--method", "wanda"]
    text = ["--text", str(folder / "text.txt"), "--values", "int8", "--group-size", "16", "--tokens", "64"]
    assert cli.main([*arguments, *text, "--windows", "2"]) == 0
    layer = headstart.load(folder / "out").model.layers[0].mlp.up_proj
    assert layer.values_kind == "int8" and layer.group_size == 16 and layer.nnz <= 0.25 * 64 * 96
    assert cli.main([*arguments, "--method", "odd"]) == 1
    assert "headstart: prune: method: expected 'magnitude' or 'wanda', got 'odd'" in capsys.readouterr().err

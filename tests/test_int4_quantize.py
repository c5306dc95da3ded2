"""`headstart quantize`: what it writes is what rounding to nearest gives, and it appears whole or not at all."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

import headstart  # noqa: E402
from headstart import Int4Weight, cli  # noqa: E402
from headstart.weights.convert import Original, convert  # noqa: E402
from headstart.weights.int4_linear import Int4Linear  # noqa: E402
from headstart.weights.int4_quantize import Quantize, choose_layers  # noqa: E402
from models import logits, make, tokens  # noqa: E402


def written(folder, tmp_path, **options):
    headstart.quantize(folder, tmp_path / "out", **options)
    return headstart.load(tmp_path / "out")


@torch.no_grad()
def by_hand(model, group_size=32, symmetric=False, exclude=(), dtype=None):
    """The model with every linear layer quantised and dequantised, and how many there are."""
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name not in exclude]
    for layer in layers:
        weight = layer.weight if dtype is None else layer.weight.to(dtype)
        layer.weight.copy_(Int4Weight.quantize(weight, group_size, symmetric).dequantize())
    return model, len(layers)


@pytest.mark.parametrize(
    "options",
    [
        dict(group_size=32),
        dict(group_size=32, symmetric=True),
        dict(group_size=64),
        dict(group_size=-1),
        dict(group_size=128, exclude=["lm_head"]),
    ],
    ids=str,
)
def test_is_rounding_to_nearest(tmp_path, options):
    sizes = dict(hidden_size=288, intermediate_size=200, num_hidden_layers=1, attention_bias=True)
    model = make(**sizes)
    model.save_pretrained(tmp_path / "in")
    want, count = by_hand(make(**sizes), **options)
    got = written(tmp_path / "in", tmp_path, **options)
    layers = [m for m in got.modules() if isinstance(m, Int4Linear)]
    assert len(layers) == count == (7 if "exclude" in options else 8)
    assert all((m.zeros is None) == options.get("symmetric", False) for m in layers)
    torch.testing.assert_close(logits(got, tokens()), logits(want, tokens()), rtol=1e-4, atol=1e-4)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, tokens()), logits(got, tokens()))


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_tied_output_layer_stays(tmp_path, shard_size, capsys):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "in", max_shard_size=shard_size)
    got = written(tmp_path / "in", tmp_path, group_size=32)
    assert got.lm_head.weight is got.model.embed_tokens.weight and type(got.lm_head) is torch.nn.Linear
    assert isinstance(got.model.layers[1].mlp.down_proj, Int4Linear)
    said = capsys.readouterr().out
    assert "14 layers, with " in said and "MiB in float32 -> " in said and "tied to the embedding, and stays" in said


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_the_output_layer_has_bits_of_its_own(tmp_path, tied, bits, capsys):
    model = make(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "in")
    got = written(tmp_path / "in", tmp_path, group_size=32, output_bits=bits)
    want = Int4Weight.quantize(model.lm_head.weight.detach(), 32, bits=bits)
    assert torch.equal(got.lm_head.weight_int4.dequantize(), want.dequantize()) and got.lm_head.bits == bits
    rows = want.dequantize() if tied else model.model.embed_tokens.weight
    assert torch.equal(got.model.embed_tokens(tokens()), rows[tokens()])
    assert got.model.layers[0].mlp.up_proj.bits == 4
    folder = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(folder, tokens()), logits(got, tokens()))
    said = capsys.readouterr().out
    assert "15 layers, with " in said and "stays" not in said and ("int8" in said) == (bits == 8)


def test_an_embedding_that_cannot_read_packed_rows_stays_plain(tmp_path):
    model = make("Gemma3Text", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "in")
    got = written(tmp_path / "in", tmp_path, group_size=32, output_bits=8)
    assert got.lm_head.bits == 8 and type(got.model.embed_tokens) is type(model.model.embed_tokens)
    assert torch.equal(got.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_dtype_exclusions_and_generation_config(tmp_path):
    make().save_pretrained(tmp_path / "in")
    transformers.GenerationConfig(max_new_tokens=7).save_pretrained(tmp_path / "in")
    got = written(tmp_path / "in", tmp_path, group_size=32, dtype="bfloat16", exclude=["lm_head", "*.0.*", "v_proj"])
    assert got.dtype == torch.bfloat16 and got.generation_config.max_new_tokens == 7
    names = {name for name, m in got.named_modules() if isinstance(m, Int4Linear)}
    assert len(names) == 6 and all(".1." in name and "v_proj" not in name for name in names)
    assert got.model.layers[1].mlp.up_proj.scales.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="quantize: model: expected one that is not quantised"):
        headstart.quantize(tmp_path / "out", tmp_path / "twice")


def test_replaces_its_own_folder_and_no_other(tmp_path):
    make().save_pretrained(tmp_path / "in")
    for size in (64, 32):
        headstart.quantize(tmp_path / "in", tmp_path / "out", group_size=size)
    content = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert content["group_size"] == 32 and content["weights"] == "int4" and len(content["modules"]) == 15
    with pytest.raises(ValueError, match="quantize: output: expected a new folder, an empty one or one of its own"):
        headstart.quantize(tmp_path / "in", tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="quantize: output: expected a new folder"):
        headstart.quantize(tmp_path / "in", tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="quantize: output: expected a folder in one that exists"):
        headstart.quantize(tmp_path / "in", tmp_path / "no" / "where")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(group_size=20), "quantize: group_size: expected a multiple of 32, or -1"),
        (dict(output_bits=5), "quantize: output_bits: expected 4, 8 or None, got 5"),
        (dict(dtype="int8"), "quantize: dtype: expected one of bfloat16, float16, float32, got 'int8'"),
        (dict(exclude=["nothing"]), "quantize: exclude: expected names of linear layers, .*, got 'nothing'"),
        (dict(exclude=["*"]), "quantize: expected a linear layer to quantise, got 15 that are tied or excluded"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path, options, message):
    make().save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        headstart.quantize(tmp_path / "in", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_weights_that_are_not_finite_leave_nothing(tmp_path):
    model = make()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(
        ValueError, match="model.layers.1.mlp.up_proj.weight: .*expected finite weights, got inf or nan"
    ):
        headstart.quantize(tmp_path / "in", tmp_path / "out", group_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "in")
    headstart.quantize(tmp_path / "in", tmp_path / "out", group_size=32)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def fails(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(transformers.PretrainedConfig, "save_pretrained", fails)
    with pytest.raises(OSError, match="the disk is full"):
        headstart.quantize(tmp_path / "in", tmp_path / "out", group_size=64)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_model_in_memory(tmp_path):
    """As a GGUF file is read: its parameters take gradients."""
    model = make()
    assert model.lm_head.weight.requires_grad
    layers = choose_layers(model)
    convert(Original.of_model(model), Quantize(model, layers, group_size=32), tmp_path / "out")
    want, count = by_hand(make())
    got = headstart.load(tmp_path / "out")
    assert sum(isinstance(m, Int4Linear) for m in got.modules()) == count == len(layers)
    torch.testing.assert_close(logits(got, tokens()), logits(want, tokens()), rtol=1e-4, atol=1e-4)


def test_command(tmp_path, capsys):
    make().save_pretrained(tmp_path / "in")
    arguments = ["quantize", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--group-size", "32", "--symmetric"]
    assert cli.main([*arguments, "--dtype", "float16", "--exclude", "lm_head"]) == 0
    assert isinstance(headstart.load(tmp_path / "out").model.layers[0].mlp.up_proj, Int4Linear)
    assert cli.main(["quantize", str(tmp_path / "nowhere"), "-o", str(tmp_path / "other")]) == 1
    assert "headstart: quantize: model: expected a directory with a config.json" in capsys.readouterr().err


def test_choose_layers_takes_plain_linear_layers():
    model = make(tie_word_embeddings=True)
    model.model.layers[0].mlp.up_proj = Int4Linear.from_weight(Int4Weight.quantize(torch.randn(96, 64), 32))
    names = choose_layers(model, ["model.layers.1.*"])
    parts = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert names == [f"model.layers.0.{part.replace('attn', 'self_attn')}" for part in parts]

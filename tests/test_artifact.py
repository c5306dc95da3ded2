"""Folders in headstart's layout: a decoder layer is one aligned piece of the file, and every loader opens them."""

import json
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")

import headstart  # noqa: E402
from artifacts import check_layout, run_prune, tiny_folder  # noqa: E402
from headstart import quantize  # noqa: E402
from headstart._checkpoint_files import PADDING, LayeredFile  # noqa: E402
from headstart.engine import artifact  # noqa: E402
from headstart.engine.quantizer import HeadstartConfig  # noqa: E402
from models import logits, make, tokens  # noqa: E402


def warned_of_padding(folder, caplog, opened=transformers.AutoModelForCausalLM.from_pretrained):
    """What `opened` gives, and whether transformers spoke of padding."""
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    model = opened(folder)
    transformers.utils.logging.disable_propagation()
    return model, any("headstart.padding" in record.message for record in caplog.records)


def opened_quietly(folder, caplog):
    models, warned = zip(warned_of_padding(folder, caplog), warned_of_padding(folder, caplog, headstart.load))
    assert not any(warned)
    return models


def test_transformers_warns_where_the_config_does_not_say_what_the_folder_is(tmp_path, caplog):
    make().save_pretrained(tmp_path / "in")
    artifact.rewrite(tmp_path / "in", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    del content["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    assert warned_of_padding(tmp_path / "out", caplog)[1]


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_model(tmp_path, tied, caplog):
    model = make(tie_word_embeddings=tied, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "in", max_shard_size="50KB")
    artifact.rewrite(tmp_path / "in", tmp_path / "out")
    found = check_layout(tmp_path / "out", 3)
    assert any(name.startswith(PADDING) for name in found) and ("lm_head.weight" in found) != tied
    for again in opened_quietly(tmp_path / "out", caplog):
        assert torch.equal(logits(again, tokens()), logits(model, tokens()))
        assert not hasattr(again.config, "quantization_config")  # it is a plain model again
        again.half().save_pretrained(tmp_path / "again")
    assert headstart.load(tmp_path / "again").dtype == torch.float16
    with pytest.raises(ValueError, match="rewrite: model: expected one that is not quantised"):
        artifact.rewrite(tmp_path / "out", tmp_path / "twice")


def test_an_int4_model(tmp_path, caplog):
    model = make(num_hidden_layers=3)
    model.save_pretrained(tmp_path / "in", max_shard_size="50KB")
    quantize.run(tmp_path / "in", tmp_path / "out", group_size=32)
    found = check_layout(tmp_path / "out", 3)
    assert "model.layers.2.mlp.down_proj.packed" in found
    first, second = opened_quietly(tmp_path / "out", caplog)
    assert torch.equal(logits(first, tokens()), logits(second, tokens()))


@pytest.mark.parametrize("command", ["quantize", "prune"])
def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch, command):
    tiny_folder(tmp_path, num_hidden_layers=4)
    add, before, count = LayeredFile.add, [], []

    def watched(self, tensors):
        assert not [name for name, alive in before if alive() is not None]
        made = {name: x for name, x in tensors.items() if name.endswith((".packed", ".values"))}
        before.extend((name, weakref.ref(x)) for name, x in made.items())
        count.append(len(made))
        add(self, tensors)

    monkeypatch.setattr(LayeredFile, "add", watched)
    if command == "quantize":
        quantize.run(tmp_path / "in", tmp_path / "out", group_size=32, exclude=["lm_head"])
    else:
        run_prune(tmp_path)
    assert count == [0, 7, 7, 7, 7]


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_that_transformers_fuses_keep_the_checkpoints_names(tmp_path, family):
    model = make(family)
    model.save_pretrained(tmp_path / "in")
    artifact.rewrite(tmp_path / "in", tmp_path / "plain")
    assert any(".experts.0." in name for name in check_layout(tmp_path / "plain", 2))
    assert torch.equal(logits(headstart.load(tmp_path / "plain"), tokens()), logits(model, tokens()))
    quantize.run(tmp_path / "in", tmp_path / "int4", group_size=32)
    check_layout(tmp_path / "int4", 2)
    assert logits(headstart.load(tmp_path / "int4"), tokens()).isfinite().all()


def test_names_that_do_not_fit(tmp_path):
    model = make()
    names = list(model.state_dict())
    assert artifact.known_names("here", model, [*names, "model.rotary_emb.inv_freq"]) == names
    with pytest.raises(ValueError, match="here: odd: expected no such tensor: the model has no place for it"):
        artifact.known_names("here", model, [*names, "odd"])
    with pytest.raises(ValueError, match="here: model.norm.weight: expected a tensor, which no file has"):
        artifact.known_names("here", model, [name for name in names if name != "model.norm.weight"])
    tied = make(tie_word_embeddings=True)
    artifact.known_names("here", tied, [name for name in names if name != "lm_head.weight"])
    with pytest.raises(ValueError, match="lm_head.weight: expected a tensor"):
        artifact.known_names(
            "here", tied, [n for n in names if n not in ("lm_head.weight", "model.embed_tokens.weight")]
        )


@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX", "OPT", "Phi3"])
def test_decoder_layers(family):
    small = dict(GPT2=dict(n_layer=3, n_head=4, n_embd=64), OPT=dict(word_embed_proj_dim=64, ffn_dim=96))
    model = make(family, num_hidden_layers=3, **small.get(family, {})) if family != "GPT2" else gpt2()
    layers = artifact.decoder_layers(model)
    assert len(layers) == 3 and all(
        type(model.get_submodule(x)) is type(model.get_submodule(layers[0])) for x in layers
    )
    groups = artifact.group_by_layer(model, model.state_dict())
    assert all(name.startswith(f"{layer}.") for layer, group in zip(layers, groups[1:]) for name in group)
    assert sorted(sum(groups, [])) == sorted(model.state_dict())
    with pytest.raises(ValueError, match="expected a model with a list of decoder layers, got a Linear"):
        artifact.decoder_layers(torch.nn.Linear(1, 1))


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=3, n_head=4, n_embd=64, vocab_size=99))


def test_a_plain_config_has_no_layers():
    with pytest.raises(ValueError, match="modules: expected none, as weights is 'plain'"):
        HeadstartConfig("plain", modules={"lm_head": {}})

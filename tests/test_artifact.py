"""Folders in headstart's layout: a decoder layer is one aligned piece of the file, and every loader opens them."""

import json
import os
import subprocess
import sys
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")

import headstart  # noqa: E402
from artifacts import WORDS, check_layout, run_prune, tiny_folder, tokenizer  # noqa: E402
from headstart.weights import names as weight_names  # noqa: E402
from headstart.weights.config import HeadstartConfig  # noqa: E402
from headstart.weights.convert import Original, convert  # noqa: E402
from headstart.weights.files import PADDING, CheckpointFiles, LayeredFile  # noqa: E402
from models import logits, make, tokens  # noqa: E402


def lay_out(folder, out):
    convert(Original.of_folder("lay_out", folder), None, out)


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
    lay_out(tmp_path / "in", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    del content["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    assert warned_of_padding(tmp_path / "out", caplog)[1]


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_model(tmp_path, tied, caplog):
    model = make(tie_word_embeddings=tied, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "in", max_shard_size="50KB")
    lay_out(tmp_path / "in", tmp_path / "out")
    found = check_layout(tmp_path / "out", 3)
    assert any(name.startswith(PADDING) for name in found) and ("lm_head.weight" in found) != tied
    for again in opened_quietly(tmp_path / "out", caplog):
        assert torch.equal(logits(again, tokens()), logits(model, tokens()))
        assert not hasattr(again.config, "quantization_config")  # it is a plain model again
        again.half().save_pretrained(tmp_path / "again")
    assert headstart.load(tmp_path / "again").dtype == torch.float16
    with pytest.raises(ValueError, match="lay_out: model: expected one that is not quantised"):
        lay_out(tmp_path / "out", tmp_path / "twice")


def test_an_int4_model(tmp_path, caplog):
    model = make(num_hidden_layers=3)
    model.save_pretrained(tmp_path / "in", max_shard_size="50KB")
    headstart.quantize(tmp_path / "in", tmp_path / "out", group_size=32)
    found = check_layout(tmp_path / "out", 3)
    assert "model.layers.2.mlp.down_proj.packed" in found
    first, second = opened_quietly(tmp_path / "out", caplog)
    assert torch.equal(logits(first, tokens()), logits(second, tokens()))


@pytest.mark.parametrize("command", ["quantize", "prune"])
def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch, command):
    """Neither a packed tensor nor one that was read for an earlier layer is alive when a layer is written."""
    tiny_folder(tmp_path, num_hidden_layers=4)
    add, read, before, count = LayeredFile.add, CheckpointFiles.tensor, [], []

    def reading(self, name):
        x = read(self, name)
        before.append((name, weakref.ref(x)))
        return x

    def writing(self, tensors):
        assert not [name for name, alive in before if name not in tensors and alive() is not None]
        before.clear()
        made = {name: x for name, x in tensors.items() if name.endswith((".packed", ".values"))}
        before.extend((f"written {name}", weakref.ref(x)) for name, x in made.items())
        count.append(len(made))
        add(self, tensors)

    monkeypatch.setattr(CheckpointFiles, "tensor", reading)
    monkeypatch.setattr(LayeredFile, "add", writing)
    if command == "quantize":
        headstart.quantize(tmp_path / "in", tmp_path / "out", group_size=32, exclude=["lm_head"])
    else:
        run_prune(tmp_path)
    assert count == [0, 7, 7, 7, 7]


PEAK = """
import sys
from pathlib import Path
import headstart
from headstart.weights.files import LayeredFile

add, seen = LayeredFile.add, []

def writing(self, tensors):
    seen.append(int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024)
    add(self, tensors)

LayeredFile.add = writing
command, folder = sys.argv[1], Path(sys.argv[2])
if command == "quantize":
    headstart.quantize(folder / "in", folder / "out", group_size=32)
else:
    headstart.prune(folder / "in", folder / "out", texts=[folder / "text.txt"], tokens=100, windows=1)
print(len(seen), max(seen) - seen[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["quantize", "prune"])
def test_the_peak_of_memory_does_not_grow_with_the_layers(tmp_path, command):
    """What the process holds besides mapped files, whenever a layer is written: at most what three layers take in
    bfloat16. Ten packed ones would be as much in int4, and five in pruned and plain weights."""
    sizes = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8)
    model = make(num_hidden_layers=12, **sizes).to(torch.bfloat16)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "in")
    tokenizer().save_pretrained(tmp_path / "in")
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 2))
    # Without the threshold, glibc keeps freed memory to itself.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, command, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    layers, grown = map(int, done.stdout.split()[-2:])
    assert layers == 13 and grown <= 3 * layer


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_that_transformers_fuses_keep_the_checkpoints_names(tmp_path, family):
    model = make(family)
    model.save_pretrained(tmp_path / "in")
    lay_out(tmp_path / "in", tmp_path / "plain")
    assert any(".experts.0." in name for name in check_layout(tmp_path / "plain", 2))
    assert torch.equal(logits(headstart.load(tmp_path / "plain"), tokens()), logits(model, tokens()))
    headstart.quantize(tmp_path / "in", tmp_path / "int4", group_size=32)
    check_layout(tmp_path / "int4", 2)
    assert logits(headstart.load(tmp_path / "int4"), tokens()).isfinite().all()


def test_names_that_do_not_fit(tmp_path):
    model = make()
    names = list(model.state_dict())
    assert weight_names.known_names("here", model, [*names, "model.rotary_emb.inv_freq"]) == names
    with pytest.raises(ValueError, match="here: odd: expected no such tensor: the model has no place for it"):
        weight_names.known_names("here", model, [*names, "odd"])
    with pytest.raises(ValueError, match="here: model.norm.weight: expected a tensor, which no file has"):
        weight_names.known_names("here", model, [name for name in names if name != "model.norm.weight"])
    tied = make(tie_word_embeddings=True)
    weight_names.known_names("here", tied, [name for name in names if name != "lm_head.weight"])
    with pytest.raises(ValueError, match="lm_head.weight: expected a tensor"):
        weight_names.known_names(
            "here", tied, [n for n in names if n not in ("lm_head.weight", "model.embed_tokens.weight")]
        )


@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX", "OPT", "Phi3"])
def test_decoder_layers(family):
    small = dict(GPT2=dict(n_layer=3, n_head=4, n_embd=64), OPT=dict(word_embed_proj_dim=64, ffn_dim=96))
    model = make(family, num_hidden_layers=3, **small.get(family, {})) if family != "GPT2" else gpt2()
    layers = weight_names.decoder_layers(model)
    assert len(layers) == 3 and all(
        type(model.get_submodule(x)) is type(model.get_submodule(layers[0])) for x in layers
    )
    groups = weight_names.group_by_layer(model, model.state_dict())
    assert all(name.startswith(f"{layer}.") for layer in layers for name in groups[layer])
    assert list(groups) == [None, *layers] and sorted(sum(groups.values(), [])) == sorted(model.state_dict())
    with pytest.raises(ValueError, match="expected a model with a list of decoder layers, got a Linear"):
        weight_names.decoder_layers(torch.nn.Linear(1, 1))


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=3, n_head=4, n_embd=64, vocab_size=99))


def test_a_plain_config_has_no_layers():
    with pytest.raises(ValueError, match="modules: expected none, as weights is 'plain'"):
        HeadstartConfig("plain", modules={"lm_head": {}})

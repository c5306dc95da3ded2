"""`headstart.load`: which class opens a folder, where it finds settings of packed weights, what it leaves alone."""

import json
import logging
import re
import sys
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")

import headstart  # noqa: E402
import int4_formats  # noqa: E402
from headstart.weights import quantizer  # noqa: E402
from headstart.weights.config import HeadstartConfig  # noqa: E402
from headstart.weights.sources.source import without_nulls  # noqa: E402
from models import logits, make, tokens  # noqa: E402

# --- models that also read images -----------------------------------------------------------------------------------


def vision_language():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = dict(vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, rope_parameters=rope, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def test_a_vision_language_folder(tmp_path):
    model = vision_language()
    model.save_pretrained(tmp_path)
    loaded = headstart.load(tmp_path)
    assert type(loaded) is type(model) and torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    headstart.quantize(tmp_path, tmp_path / "int4", group_size=32, exclude=["*visual*"])
    packed = headstart.load(tmp_path / "int4")
    layers = [name for name, m in packed.named_modules() if isinstance(m, headstart.Int4Linear)]
    assert len(layers) == 3 * 7 + 1 and not any("visual" in name for name in layers)
    assert torch.equal(packed.model.visual.state_dict()["blocks.0.mlp.up_proj.weight"].float(), up_proj(model))


def up_proj(model):
    return model.model.visual.blocks[0].mlp.up_proj.weight


def test_a_vision_language_folder_in_less_memory(tmp_path):
    pytest.importorskip("headstart._stream", reason="the weight streamer is not built")
    model = vision_language()
    model.save_pretrained(tmp_path)
    weights = sum(p.nbytes for p in model.parameters())
    loaded = headstart.load(tmp_path, memory_budget=weights - 1)
    assert any(p.is_meta for p in loaded.model.language_model.parameters())  # the decoder layers, not the vision tower
    assert not any(p.is_meta for p in loaded.model.visual.parameters())
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("published", [False, True])
def test_a_vision_language_awq_folder(tmp_path, published):
    """Also under the names that the published checkpoints have, which transformers changes as it reads them."""
    model = vision_language()
    codes = int4_formats.write(tmp_path, model, "awq", plain=("lm_head", "visual"))
    if published:
        tensors = {
            name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): x
            for name, x in int4_formats.read(tmp_path).items()
        }
        int4_formats.save_file(tensors, tmp_path / "model.safetensors")
    loaded = headstart.load(tmp_path)
    layers = {name: m for name, m in loaded.named_modules() if isinstance(m, headstart.Int4Linear)}
    assert layers.keys() == codes.keys() and len(codes) == 3 * 7
    assert all(torch.equal(layer.weight_int4.codes(), codes[name]) for name, layer in layers.items())
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(headstart.load(tmp_path / "own"), tokens()), logits(loaded, tokens()))


@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_a_model_of_another_kind_is_refused_in_a_line(tmp_path, budget):
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AutoModelForImageTextToText opens, got 'vit'; open the folder with") as error:
        headstart.load(tmp_path, memory_budget=budget)
    assert str(error.value).startswith(str(tmp_path)) and len(str(error.value)) < 300 + len(str(tmp_path))


# --- settings of packed weights -------------------------------------------------------------------------------------


def move_settings(folder, name, change=lambda settings: None):
    """Out of config.json, to a file of their own."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    settings = content.pop("quantization_config")
    path.write_text(json.dumps(content))
    del settings["quant_method"]
    change(settings)
    (folder / name).write_text(json.dumps(settings))


def old_awq(settings):
    settings |= {"w_bit": settings.pop("bits"), "q_group_size": settings.pop("group_size"), "version": "GEMM"}


@pytest.mark.parametrize(
    ("method", "name", "change"),
    [
        ("awq", "quant_config.json", old_awq),
        ("awq", "quantize_config.json", old_awq),
        ("gptq", "quantize_config.json", lambda settings: None),
    ],
)
def test_settings_in_the_makers_own_file(tmp_path, method, name, change):
    model = make(num_hidden_layers=1)
    codes = int4_formats.write(tmp_path, model, method)
    move_settings(tmp_path, name, change)
    loaded = headstart.load(tmp_path)
    assert sum(isinstance(m, headstart.Int4Linear) for m in loaded.modules()) == len(codes)
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), rtol=1e-4, atol=1e-4)


def test_an_error_names_the_file_that_has_the_settings(tmp_path):
    int4_formats.write(tmp_path, make(num_hidden_layers=1), "gptq")
    move_settings(tmp_path, "quantize_config.json", lambda settings: settings.pop("checkpoint_format"))
    path = tmp_path / "quantize_config.json"
    with pytest.raises(
        ValueError, match=f"^{path}: checkpoint_format: expected .* into quantize_config.json, got None"
    ):
        headstart.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=f"^{path}: the file: expected a JSON object, got"):
        headstart.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=f"^{path}: not a JSON file"):
        headstart.load(tmp_path)


@pytest.mark.parametrize(
    ("method", "maker"), [("awq", "AWQ or GPTQ"), ("gptq", "AWQ or GPTQ"), ("compressed-tensors", "compressed-tensors")]
)
def test_packed_tensors_without_settings_say_what_they_are(tmp_path, method, maker):
    int4_formats.write(tmp_path, make(num_hidden_layers=1), method)
    move_settings(tmp_path, "elsewhere.json")
    with pytest.raises(ValueError, match=f"model.safetensors: model.layers.0.*: expected plain .* of {maker}; write"):
        headstart.load(tmp_path)


def test_our_own_tensors_without_settings_say_what_they_are(tmp_path):
    folder = int4_formats.write_own(tmp_path, make(num_hidden_layers=1))
    move_settings(folder, "elsewhere.json")
    with pytest.raises(ValueError, match="packed: expected plain weights, .* got a packed tensor of headstart; write"):
        headstart.load(folder)


@pytest.mark.parametrize("method", int4_formats.PACKERS)
def test_null_is_what_is_left_out(tmp_path, method):
    """Every setting that a format reads and that may be left out."""
    model = make(num_hidden_layers=1)
    codes = int4_formats.write(tmp_path, model, method)

    def change(q):
        if method == "compressed-tensors":
            group = q["config_groups"]["group_0"]
            group |= {"input_activations": None, "format": None}
            group["weights"] |= {"type": None, "actorder": None}
            q |= {"ignore": None, "kv_cache_scheme": None, "transform_config": None, "sparsity_config": None}
        else:
            names = ("zero_point", "backend", "pack_dtype", "dynamic", "modules_to_not_convert", "format", "desc_act")
            q |= dict.fromkeys(names)

    int4_formats.edit(tmp_path, change)
    loaded = headstart.load(tmp_path)
    assert sum(isinstance(m, headstart.Int4Linear) for m in loaded.modules()) == len(codes)


def test_without_nulls():
    assert without_nulls({"a": None, "b": {"c": None, "d": [None, 0]}, "e": False}) == {
        "b": {"d": [None, 0]},
        "e": False,
    }


@pytest.mark.parametrize("value", ["gptq", ["awq"], 4])
def test_settings_that_are_no_object(tmp_path, value):
    make(num_hidden_layers=1).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": value}))
    with pytest.raises(
        ValueError, match=f"^{path}: quantization_config: expected an object, got {re.escape(repr(value))}"
    ):
        headstart.load(tmp_path)


# --- what from_pretrained leaves out --------------------------------------------------------------------------------


def test_what_is_left_out_stays_out_of_other_loads(tmp_path):
    """It belongs to one call: not to the config, not to another thread, not to a later load."""
    folder = int4_formats.write_own(tmp_path, make(num_hidden_layers=1))
    name, found = "model.layers.0.mlp.up_proj.packed", {}

    def open_it():
        found["model"] = transformers.AutoModelForCausalLM.from_pretrained(folder)

    with quantizer.leaving_out([name]):
        thread = threading.Thread(target=open_it)
        thread.start()
        thread.join()
    assert found["model"].get_parameter(name).any()
    open_it()
    assert found["model"].get_parameter(name).any()


@pytest.mark.parametrize("field", ["source", "left_out", "parameters"])
def test_a_config_cannot_leave_out_anything(field):
    with pytest.raises(ValueError, match=f"quantization_config: {field}: expected no such field"):
        HeadstartConfig(**{field: ["model.norm.weight"]})


# --- the process ----------------------------------------------------------------------------------------------------


def test_threads_that_load_leave_the_process_as_it_was(tmp_path, monkeypatch, capsys):
    model = make(num_hidden_layers=1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    messages, real, tied = transformers.utils.logging, sys.stderr, []
    tie_weights, dtype = transformers.PreTrainedModel.tie_weights, torch.get_default_dtype()
    messages.enable_progress_bar()
    bar, seen = messages.tqdm, []

    def watched(*args, **kwargs):
        seen.append((sys.stderr is real, messages.is_progress_bar_enabled()))
        return bar(*args, **kwargs)

    monkeypatch.setattr("transformers.core_model_loading.tqdm", watched)
    before = logging.getLogger("transformers").level
    capsys.readouterr()  # what saving wrote

    def work():
        for _ in range(3):
            loaded = headstart.load(tmp_path, dtype=torch.bfloat16)
            tied.append(loaded.lm_head.weight is loaded.model.embed_tokens.weight)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert tied == [True] * 12 and transformers.PreTrainedModel.tie_weights is tie_weights
        assert torch.get_default_dtype() == dtype and set(seen) == {(True, True)}  # everybody's stderr and switch
        assert capsys.readouterr().err == ""  # and nobody's bar
        assert sys.stderr is real and messages.is_progress_bar_enabled()
        assert logging.getLogger("transformers").level == before
    finally:
        messages.disable_progress_bar()
        transformers.PreTrainedModel.tie_weights = tie_weights
        torch.set_default_dtype(dtype)


def test_transformers_own_reports_are_still_made(tmp_path, caplog):
    """Other loads, in the same process and after ours, report what they always did."""
    model = make(num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    headstart.load(tmp_path)
    tensors = int4_formats.read(tmp_path)
    int4_formats.save_file(tensors | {"odd": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    transformers.utils.logging.enable_propagation()
    try:
        headstart.load(tmp_path)
        assert "odd" not in caplog.text
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert "odd" in caplog.text
    finally:
        transformers.utils.logging.disable_propagation()

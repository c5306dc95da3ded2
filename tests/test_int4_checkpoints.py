"""`headstart.load`: int4 checkpoints of every format compute what their definition says, and are saved as our own."""

import json
import subprocess
import sys
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")

import headstart  # noqa: E402
import int4_formats  # noqa: E402
from headstart.weights.files import CheckpointFiles  # noqa: E402
from headstart.weights.int4_linear import Int4Linear  # noqa: E402
from models import logits, make, tokens  # noqa: E402
from supported import INT4_FORMATS  # noqa: E402

LAYERS = 14  # of the tiny model: two of seven


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An artifact of our own."""
    return int4_formats.write_own(tmp_path_factory.mktemp("own"), make())


def int4(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Int4Linear)}


def check(model, reference, codes):
    """The layers are int4 with these codes, and the model computes what the reference does."""
    layers = int4(model)
    assert layers.keys() == codes.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.weight_int4.codes(), codes[name])
        assert not any(p.requires_grad for key, p in layer.named_parameters() if key != "bias")
    assert not model.training and not any(p.is_meta for p in model.parameters())
    torch.testing.assert_close(logits(model, tokens()), logits(reference, tokens()), rtol=1e-4, atol=1e-4)


FORMATS = [(packed.method, packed.options) for packed in INT4_FORMATS]


@pytest.mark.parametrize(("method", "options"), FORMATS, ids=str)
def test_every_format(tmp_path, method, options):
    model = make()
    codes = int4_formats.write(tmp_path, model, method, **options)
    loaded = headstart.load(tmp_path)
    assert len(codes) == LAYERS
    check(loaded, model, codes)
    layer = loaded.model.layers[0].mlp.up_proj
    assert (layer.zeros is None) == options.get("symmetric", False)
    assert (layer.permutation is not None) == options.get("act_order", False)
    assert layer.scales.dtype == torch.float16  # as in the file


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("method", int4_formats.PACKERS)
def test_odd_shapes_biases_and_shards(tmp_path, method, group_size):
    """K of 288 and 200, N of 200, which no power of two divides; a layer's tensors lie in several files."""
    sizes = dict(hidden_size=288, intermediate_size=200, num_hidden_layers=1, attention_bias=True)
    model = make(**sizes)
    for layer in model.modules():
        if getattr(layer, "bias", None) is not None:
            torch.nn.init.normal_(layer.bias)
    codes = int4_formats.write(tmp_path, model, method, group_size=group_size, shards=3)
    assert {tuple(c.shape) for c in codes.values()} >= {(200, 288), (288, 200)}
    check(headstart.load(tmp_path), model, codes)


@pytest.mark.parametrize("method", int4_formats.PACKERS)
def test_tied_embeddings_and_layers_left_plain(tmp_path, method):
    model = make(tie_word_embeddings=True)
    codes = int4_formats.write(tmp_path, model, method, plain=("lm_head", "layers.0.mlp", "v_proj"))
    assert len(codes) == LAYERS - 5
    if method == "compressed-tensors":
        int4_formats.edit(tmp_path, lambda q: q.update(ignore=["lm_head", "re:.*layers\\.0\\.mlp.*", "re:.*v_proj"]))
    loaded = headstart.load(tmp_path)
    check(loaded, model, codes)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("method", int4_formats.PACKERS)
def test_an_int4_output_layer(tmp_path, method):
    model = make(vocab_size=200)  # AWQ packs eights of rows
    codes = int4_formats.write(tmp_path, model, method, plain=())
    if method == "compressed-tensors":
        int4_formats.edit(tmp_path, lambda q: q.update(ignore=[]))
    check(headstart.load(tmp_path), model, codes)


@pytest.mark.parametrize("family", ["Qwen2", "Mistral", "Gemma2", "Phi3"])
def test_other_families(tmp_path, family):
    model = make(family, "eager", head_dim=16) if family == "Gemma2" else make(family)
    codes = int4_formats.write(tmp_path, model, "gptq")
    check(headstart.load(tmp_path), model, codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_rest(tmp_path, dtype):
    model = make()
    codes = int4_formats.write(tmp_path, model, "awq")
    loaded = headstart.load(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype and loaded.model.embed_tokens.weight.dtype == dtype
    for name, layer in int4(loaded).items():
        assert layer.scales.dtype == torch.float16 and torch.equal(layer.weight_int4.codes(), codes[name])
    want = logits(model, tokens())
    assert (logits(loaded, tokens()) - want).norm() < 0.02 * want.norm()


def test_device(tmp_path):
    model = make()
    codes = int4_formats.write(tmp_path, model, "gptq", act_order=True)
    check(headstart.load(tmp_path, device="cpu"), model, codes)


def test_generation_config_comes_along(tmp_path):
    model = make()
    int4_formats.write(tmp_path, model, "awq")
    transformers.GenerationConfig(max_new_tokens=7, pad_token_id=0).save_pretrained(tmp_path)
    loaded = headstart.load(tmp_path)
    assert loaded.generation_config.max_new_tokens == 7 and loaded.name_or_path == str(tmp_path)
    assert loaded.generate(tokens(2, 5)).shape == (2, 12)


def test_keys_without_the_base_models_prefix(tmp_path):
    model = make()
    codes = int4_formats.write(tmp_path, model, "gptq")
    tensors = int4_formats.read(tmp_path)
    bare = {name.removeprefix("model."): x for name, x in tensors.items()}
    int4_formats.save_file(bare, tmp_path / "model.safetensors")
    loaded = headstart.load(tmp_path)
    check(loaded, model, codes)
    loaded.save_pretrained(tmp_path / "own")
    check(headstart.load(tmp_path / "own"), model, codes)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_that_transformers_fuses(tmp_path, family):
    """Their weights have other names in the model, and no linear layers: they stay plain, or are refused by name."""
    model = make(family, num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    tensors, codes, true = int4_formats.read(tmp_path), {}, {}
    for layer in ("self_attn.q_proj", "self_attn.o_proj"):
        name = f"model.layers.0.{layer}"
        codes[name], true[name] = int4_formats.replace(tensors, name)
    quantization = int4_formats.quantization_config("gptq", 32, False)
    int4_formats.write_files(tmp_path, model.config, quantization, tensors)
    for name, weight in true.items():
        model.get_submodule(name).weight.data.copy_(weight)
    loaded = headstart.load(tmp_path)
    check(loaded, model, codes)
    loaded.save_pretrained(tmp_path / "own")
    check(headstart.load(tmp_path / "own"), model, codes)
    expert = next(name for name in tensors if "experts.0." in name).removesuffix(".weight")
    int4_formats.replace(tensors, expert)
    int4_formats.write_files(tmp_path, model.config, quantization, tensors)
    with pytest.raises(ValueError, match=f"{expert}: expected a linear layer of .*fuses are not read"):
        headstart.load(tmp_path)


def test_one_layer_is_read_at_a_time(tmp_path, monkeypatch):
    int4_formats.write(tmp_path, make(), "gptq", act_order=True)
    read, tensor = [], CheckpointFiles.tensor

    def watched(self, name):
        layer, x = name.rpartition(".")[0], tensor(self, name)
        assert all(alive() is None for other, alive in read if other != layer)
        read.append((layer, weakref.ref(x)))
        return x

    monkeypatch.setattr(CheckpointFiles, "tensor", watched)
    headstart.load(tmp_path)
    assert len({layer for layer, _ in read}) == LAYERS


# --- what single formats have ---------------------------------------------------------------------------------------


def test_awq_as_older_tools_write_its_config(tmp_path):
    model = make()
    codes = int4_formats.write(tmp_path, model, "awq")
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM", "modules_to_not_convert": None}
    content["quantization_config"] = old
    path.write_text(json.dumps(content))
    check(headstart.load(tmp_path), model, codes)


def test_gptq_biases_of_zeros_are_no_biases(tmp_path):
    model = make()
    codes = int4_formats.write(tmp_path, model, "gptq")
    tensors = int4_formats.read(tmp_path)
    extra = {f"{name}.bias": torch.zeros(c.shape[0]) for name, c in codes.items()}
    int4_formats.save_file(tensors | extra, tmp_path / "model.safetensors")
    loaded = headstart.load(tmp_path)
    check(loaded, model, codes)
    assert all(layer.bias is None for layer in int4(loaded).values())
    extra["model.layers.1.mlp.up_proj.bias"] += 1
    int4_formats.save_file(tensors | extra, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj: bias: expected none, as the model has none, or zeros"):
        headstart.load(tmp_path)


def test_gptq_dynamic_rules(tmp_path):
    model = make()
    codes = int4_formats.write(tmp_path, model, "gptq", sizes={"down_proj": 96}, plain=("lm_head", "v_proj"))
    int4_formats.edit(tmp_path, lambda q: q.update(dynamic={r"-:.*v_proj": {}, r"+:.*down_proj": {"group_size": 96}}))
    loaded = headstart.load(tmp_path)
    check(loaded, model, codes)
    assert loaded.model.layers[0].mlp.down_proj.group_size in (96, -1)
    int4_formats.edit(tmp_path, lambda q: q.update(dynamic={r"+:.*down_proj": {"bits": 8}}))
    with pytest.raises(ValueError, match=r"dynamic: \+:\.\*down_proj: bits: expected 4, got 8"):
        headstart.load(tmp_path)


def test_gptq_under_autogptqs_file_name(tmp_path):
    model = make()
    codes = int4_formats.write(tmp_path, model, "gptq")
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    check(headstart.load(tmp_path), model, codes)


def test_compressed_tensors_groups(tmp_path):
    """A layer's own name goes before a pattern, and that before the class, whatever their order."""
    model = make()
    sizes = {"layers.0.mlp.up_proj": 64, "down_proj": -1}
    codes = int4_formats.write(tmp_path, model, "compressed-tensors", sizes=sizes)

    def change(q):
        group = q["config_groups"]["group_0"]
        down = group["weights"] | {"strategy": "channel", "group_size": None}
        up = group["weights"] | {"group_size": 64}
        byte = group["weights"] | {"num_bits": 8}
        q["config_groups"] |= {
            "down": {"targets": ["re:.*down_proj$"], "weights": down},
            "up": {"targets": ["model.layers.0.mlp.up_proj"], "weights": up},
            "unused": {"targets": ["re:vision.*"], "weights": byte, "format": "int-quantized"},
        }

    int4_formats.edit(tmp_path, change)
    loaded = headstart.load(tmp_path)
    check(loaded, model, codes)
    mlp = loaded.model.layers[0].mlp
    assert (mlp.up_proj.scales.shape[1], mlp.gate_proj.scales.shape[1], mlp.down_proj.scales.shape[1]) == (1, 2, 1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_against_the_package_compressed_tensors(tmp_path, symmetric):
    package = pytest.importorskip("compressed_tensors.compressors.quantized_compressors.pack_quantized")
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (40, 100), generator=rng, dtype=torch.int8)
    zeros = torch.zeros(40, 4, dtype=torch.int8)
    if not symmetric:
        zeros = torch.randint(-8, 8, (40, 4), generator=rng, dtype=torch.int8)
    tensors = {
        "weight_packed": package.pack_to_int32(codes, 4),
        "weight_scale": torch.rand(40, 4, generator=rng),
        "weight_shape": torch.tensor([40, 100]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = package.pack_to_int32(zeros, 4, packed_dim=0).contiguous()
    weight = headstart.Int4Weight.from_compressed_tensors(tensors, 32)
    group = torch.arange(100) // 32
    want = (codes.double() - zeros[:, group]) * tensors["weight_scale"].double()[:, group]
    torch.testing.assert_close(weight.dequantize(torch.float64), want, rtol=1e-6, atol=1e-6)
    written = weight.to_compressed_tensors()
    assert torch.equal(package.unpack_from_int32(written["weight_packed"], 4, torch.Size([40, 100])), codes)


# --- our own --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), FORMATS[::3], ids=str)
def test_a_foreign_checkpoint_is_saved_as_our_own(tmp_path, method, options):
    model = make(attention_bias=True)
    codes = int4_formats.write(tmp_path / "in", model, method, **options)
    loaded = headstart.load(tmp_path / "in")
    loaded.save_pretrained(tmp_path / "out")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "headstart" and quantization["modules"].keys() == codes.keys()
    assert quantization["symmetric"] == options.get("symmetric", False) and "source" not in quantization
    for again in (
        headstart.load(tmp_path / "out"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32),
    ):
        check(again, model, codes)
        assert torch.equal(logits(again, tokens()), logits(loaded, tokens()))
    again.save_pretrained(tmp_path / "out", max_shard_size="20KB")  # in its own place, in shards
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    (tmp_path / "out" / "model.safetensors").unlink()
    check(headstart.load(tmp_path / "out"), model, codes)


def test_patch_and_int4_layers(tmp_path):
    model = make()
    codes = int4_formats.write(tmp_path, model, "awq", plain=("lm_head", "down_proj"))
    loaded = headstart.patch(headstart.load(tmp_path), "dense", linear="fp32")
    check(loaded, model, codes)
    assert "forward" not in vars(loaded.model.layers[0].mlp.up_proj)
    check(headstart.unpatch(loaded), model, codes)


def test_compile(tmp_path):
    model = make()
    int4_formats.write(tmp_path, model, "gptq", act_order=True)
    loaded = headstart.load(tmp_path)
    compiled = torch.compile(loaded, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, tokens(1, 9)), logits(model, tokens(1, 9)), rtol=1e-4, atol=1e-4)


# --- registration ---------------------------------------------------------------------------------------------------

OPEN = (
    "model = transformers.AutoModelForCausalLM.from_pretrained(folder); print(type(model.model.layers[0].mlp.up_proj))"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, headstart",
        "import headstart, transformers",
        "import headstart; assert 'transformers' not in sys.modules; import transformers",
        "import transformers.quantizers.auto, headstart",
        "import headstart, importlib, transformers; importlib.reload(headstart)",
        "import headstart, importlib; importlib.reload(headstart); import transformers",
        "import transformers.quantizers.auto, headstart, importlib; importlib.reload(headstart)",
        "import headstart.weights.quantizer, transformers",
    ],
)
def test_order_of_imports(own, imports):
    gone = "assert not [finder for finder in sys.meta_path if hasattr(finder, 'headstart')]"
    program = "\n".join(["import sys", imports, f"folder = {str(own)!r}", OPEN, gone])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0 and "Int4Linear" in result.stdout, result.stderr

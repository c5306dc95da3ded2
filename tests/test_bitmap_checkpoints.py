"""Pruned checkpoints: compressed-tensors' sparse-bitmask and our own, bit for bit, and what is refused by name."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

import bitmap_formats  # noqa: E402
import headstart  # noqa: E402
from headstart import BitmapLinear, BitmapWeight, save_compressed_tensors  # noqa: E402
from models import logits, make, tokens  # noqa: E402
from supported import BITMAP_VALUES  # noqa: E402

UP = "model.layers.0.mlp.up_proj"


def bitmaps(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BitmapLinear)}


def check(loaded, model, layers):
    """These layers are bitmaps of the model's weights bit for bit, all else is equal, and the logits are."""
    found = bitmaps(loaded)
    assert found.keys() == set(layers) and not loaded.training
    for name, layer in found.items():
        assert torch.equal(layer.weight_bitmap.decompress(), model.get_submodule(name).weight)
        assert not any(p.requires_grad for key, p in layer.named_parameters() if key != "bias")
    state = loaded.state_dict()
    for name, x in model.state_dict().items():
        if name.removesuffix(".weight") not in found:
            assert torch.equal(state[name], x), name
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), rtol=1e-4, atol=1e-5)


# --- compressed-tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["", ".weight"])
@pytest.mark.parametrize("shards", [1, 3])
def test_sparse_bitmask(tmp_path, spelling, shards):
    model = bitmap_formats.prune(make(attention_bias=True, intermediate_size=100))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    layers = bitmap_formats.write(tmp_path, model, spelling=spelling, shards=shards)
    assert len(layers) == 14
    check(headstart.load(tmp_path), model, layers)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spelling", ["", ".weight"])
def test_everything_compressed(tmp_path, spelling, tied):
    """As old tools did: embedding and norms too, which become plain again."""
    model = bitmap_formats.prune(make(tie_word_embeddings=tied))
    layers = bitmap_formats.write(tmp_path, model, spelling=spelling, everything=True, plain=())
    loaded = headstart.load(tmp_path)
    check(loaded, model, [name for name in layers if name != "lm_head" or not tied])
    assert type(loaded.model.embed_tokens) is torch.nn.Embedding


def test_a_layer_without_zeros_is_plain(tmp_path):
    model = bitmap_formats.prune(make())
    model.model.layers[0].mlp.up_proj.weight.data.normal_()
    layers = bitmap_formats.write(tmp_path, model)
    loaded = headstart.load(tmp_path)
    check(loaded, model, [name for name in layers if name != UP])
    assert type(loaded.get_submodule(UP)) is torch.nn.Linear


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_that_transformers_fuses_are_decompressed(tmp_path, family):
    model = bitmap_formats.prune(make(family, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "in")
    tensors, layers = bitmap_formats.read(tmp_path / "in"), []
    for name in [name for name in tensors if ".experts." in name or "_proj" in name]:
        w, module = tensors.pop(name), name.removesuffix(".weight")
        if "expert" in name:
            w = w.masked_fill_(torch.rand(w.shape) < 0.5, 0.0)
        else:
            layers.append(module)
        tensors |= {f"{module}.{key}": x for key, x in bitmap_formats.compress(w).items()}
    sparsity = {"format": "sparse-bitmask", "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    bitmap_formats.write_files(tmp_path / "out", model.config, config, tensors)
    loaded = headstart.load(tmp_path / "out")
    assert bitmaps(loaded).keys() == set(layers)
    zeros = [(p == 0).float().mean() for name, p in loaded.named_parameters() if ".experts." in name]
    assert zeros and all(0.4 < share < 0.6 for share in zeros)
    loaded.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(headstart.load(tmp_path / "own"), tokens()), logits(loaded, tokens()))


def test_dtype_and_config_of_old(tmp_path):
    model = bitmap_formats.prune(make())
    layers = bitmap_formats.write(tmp_path, model)

    def change(content):
        content["compression_config"] = content.pop("quantization_config")

    bitmap_formats.move_config(tmp_path, change)
    loaded = headstart.load(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and bitmaps(loaded).keys() == set(layers)
    for name, layer in bitmaps(loaded).items():
        assert torch.equal(layer.weight_bitmap.decompress(), model.get_submodule(name).weight.bfloat16())
    assert logits(loaded, tokens()).isfinite().all()


def config(change):
    return lambda folder: bitmap_formats.edit(folder, change)


def tensor(change):
    def changed(folder):
        tensors = bitmap_formats.read(folder)
        change(tensors)
        bitmap_formats.save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return changed


def replaced(field, x):
    return tensor(lambda t: t.update({f"{UP}.{field}": x(t[f"{UP}.{field}"])}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(lambda q: q.update(config_groups={"group_0": {}})), "config_groups: expected none: quantised weights"),
        (config(lambda q: q.update(kv_cache_scheme={"num_bits": 8})), "kv_cache_scheme: expected none"),
        (config(lambda q: q["sparsity_config"].update(ignore=[UP])), f"ignore: expected no name of {UP}"),
        (config(lambda q: q["sparsity_config"].update(targets=["re:.*attn.*"])), f"targets: expected one .*{UP[:14]}"),
        (tensor(lambda t: t.pop(f"{UP}.row_offsets")), f"{UP}: row_offsets: expected a tensor beside bitmask"),
        (tensor(lambda t: t.update({f"{UP}.weight": torch.ones(1)})), f"{UP}: weight: expected no such tensor beside"),
        (tensor(lambda t: t.update({f"{UP}.weight.bitmask": torch.ones(1)})), "one such tensor, got one in both spell"),
        (replaced("bitmask", lambda x: x + 1), f"{UP}: .*bitmask: expected .* bits set in row 0"),
        (replaced("bitmask", lambda x: x[:, :-1].contiguous()), f"{UP}: .*bitmask: expected uint8"),
        (replaced("compressed", lambda x: x[:-1]), f"{UP}: .*: expected"),
        (replaced("compressed", lambda x: x.double()), f"{UP}: compressed: expected one of float32"),
        (replaced("row_offsets", lambda x: x.flip(0)), f"{UP}: .*row_offsets: expected"),
        (replaced("shape", lambda x: x.flip(0)), f"{UP}: .*bitmask: expected uint8"),
        (replaced("shape", lambda x: -x), f"{UP}: .*shape: expected two positive"),
        (tensor(lambda t: t.pop("model.norm.weight")), "model.norm.weight: expected a tensor, which no file has"),
        (tensor(lambda t: t.update(odd=torch.ones(1))), "odd: expected no such tensor"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    bitmap_formats.write(tmp_path, bitmap_formats.prune(make(num_hidden_layers=1)))
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        headstart.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_no_bitmasks_at_all(tmp_path):
    model = make(num_hidden_layers=1)
    sparsity = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}
    bitmap_formats.write_files(tmp_path, model.config, sparsity, model.state_dict())
    with pytest.raises(ValueError, match="expected bitmask tensors, as the config says 'sparse-bitmask', got none"):
        headstart.load(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_written_and_read_again(tmp_path, tied):
    model = bitmap_formats.prune(make(tie_word_embeddings=tied, attention_bias=True))
    layers = bitmap_formats.write(tmp_path / "in", model)
    save_compressed_tensors(headstart.load(tmp_path / "in"), tmp_path / "out")
    want, got = (bitmap_formats.read(tmp_path / name) for name in ("in", "out"))
    assert want.keys() == got.keys() and all(torch.equal(x, got[name]) for name, x in want.items())
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert said["targets"] == layers and 0.48 < said["global_sparsity"] < 0.52
    check(headstart.load(tmp_path / "out"), model, layers)


def test_against_the_package_compressed_tensors(tmp_path):
    """Up to 0.14.0.1 it reads what we write, and we read what it writes, norms and embedding compressed or not."""
    package = pytest.importorskip("compressed_tensors.compressors.sparse_compressors.sparse_bitmask")
    judge = package.BitmaskCompressor(config=pytest.importorskip("compressed_tensors.config").BitmaskConfig())
    model = bitmap_formats.prune(make(attention_bias=True, intermediate_size=100))
    layers, state = bitmap_formats.write(tmp_path / "in", model), model.state_dict()
    save_compressed_tensors(headstart.load(tmp_path / "in"), tmp_path / "out")
    read = dict(judge.decompress(str(tmp_path / "out")))
    assert read.keys() == state.keys() and all(torch.equal(x, state[name]) for name, x in read.items())
    for targets in (set(layers), None):
        tensors = judge.compress(dict(state), targets)
        bitmap_formats.save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
        bitmap_formats.edit(tmp_path / "out", lambda q: q["sparsity_config"].update(targets=None))
        check(headstart.load(tmp_path / "out"), model, [*layers, *([] if targets else ["lm_head"])])


def test_what_cannot_be_written(tmp_path):
    model = make(num_hidden_layers=1)
    with pytest.raises(ValueError, match="model: expected BitmapLinear layers, got a LlamaForCausalLM"):
        save_compressed_tensors(model, tmp_path / "out")
    up = model.model.layers[0].mlp
    up.up_proj = BitmapLinear.from_linear(up.up_proj, "int8")
    with pytest.raises(ValueError, match=f"{UP}: .*scales: expected None"):
        save_compressed_tensors(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- our own --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=BITMAP_VALUES)
def own(request, tmp_path_factory):
    """A folder that save_pretrained wrote, and the model that it must be."""
    model, folder = bitmap_formats.prune(make(attention_bias=True)), tmp_path_factory.mktemp("own")
    bitmap_formats.write(folder / "in", model)
    loaded = headstart.load(folder / "in")
    if request.param != "same":
        for name in bitmaps(loaded):
            linear = model.get_submodule(name)
            loaded.set_submodule(name, BitmapLinear.from_linear(linear, request.param, 16 if "down" in name else 32))
            linear.weight.data = loaded.get_submodule(name).weight_bitmap.decompress()
    from headstart.weights.config import HeadstartConfig

    loaded.config.quantization_config = HeadstartConfig.of(loaded)
    loaded.save_pretrained(folder / "out")
    return folder / "out", model, bitmaps(loaded)


def test_own(tmp_path, own):
    folder, model, layers = own
    q = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert q["quant_method"] == "headstart" and q["weights"] == "bitmap" and q["modules"].keys() == layers.keys()
    assert q["modules"][UP] == {"nnz": layers[UP].nnz} and "source" not in q
    down = q["modules"]["model.layers.1.mlp.down_proj"]
    assert down.get("group_size") == (None if q["values"] == "same" else 16)
    for again in (
        headstart.load(folder),
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
    ):
        check(again, model, layers)
        assert {name: x.options() for name, x in bitmaps(again).items()} == {n: x.options() for n, x in layers.items()}
    again.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check(headstart.load(tmp_path), model, layers)


def test_own_in_another_dtype(own):
    folder, model, layers = own
    loaded = headstart.load(folder, dtype=torch.float16)
    for name, layer in bitmaps(loaded).items():
        same = layer.scales is None
        assert layer.values.dtype == (torch.float16 if same else layers[name].values.dtype)
        got, want = layer.weight_bitmap.decompress(), model.get_submodule(name).weight
        assert torch.equal(got, want.half() if same else want)  # scales keep their dtype
    want = logits(model, tokens())
    assert (logits(loaded, tokens()) - want).norm() < 0.02 * want.norm()
    assert headstart.patch(loaded, "dense", linear="fp32").generate(tokens(1, 5), max_new_tokens=3).shape == (1, 8)


@pytest.mark.slow
def test_compile(own):
    folder, model, _ = own
    compiled = torch.compile(headstart.load(folder), backend="aot_eager")
    torch.testing.assert_close(logits(compiled, tokens(1, 9)), logits(model, tokens(1, 9)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(lambda q: q["modules"][UP].pop("nnz")), f"modules: {UP}: nnz: expected a number, got None"),
        (
            config(lambda q: q["modules"][UP].update(nnz=-1)),
            f"modules: {UP}: nnz: expected a number of weights, got -1",
        ),
        (config(lambda q: q["modules"][UP].update(nnz=7)), f"{UP}.values: expected .* got"),
        (config(lambda q: q["modules"][UP].update(symmetric=True)), f"modules: {UP}: expected only values, group_size"),
        (config(lambda q: q.update(values="int2")), "values: expected 'same', 'int8' or 'int4', got 'int2'"),
        (config(lambda q: q["modules"][UP].update(group_size=0)), "group_size: expected a positive number, or -1"),
        (config(lambda q: q.update(odd=1)), "odd: expected no such field, got 1"),
        (config(lambda q: q["modules"].pop(UP)), f"{UP}.*: expected no such tensor"),
        (config(lambda q: q["modules"].update({"model.norm": {"nnz": 1}})), "model.norm: expected an untied linear"),
        (tensor(lambda t: t.pop(f"{UP}.bitmask")), f"{UP}.bitmask: expected a tensor, which no file"),
        (replaced("bitmask", lambda x: x + 1), f"{UP}: bitmask: expected .* bits set in row"),
        (replaced("bitmask", lambda x: x[:-1].contiguous()), f"{UP}.bitmask: expected uint8"),
        (replaced("row_offsets", lambda x: x + 1), f"{UP}: row_offsets: expected 0 first"),
        (replaced("values", lambda x: x[:-1].contiguous()), f"{UP}.values: expected"),
    ],
)
def test_own_that_are_refused(tmp_path, own, change, message):
    for file in own[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path)
    for opened in (headstart.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message) as error:
            opened(tmp_path)
        assert "config.json" in str(error.value) or str(tmp_path / "model.safetensors") in str(error.value)


def test_layers_of_two_kinds_cannot_be_described():
    from headstart.weights.config import HeadstartConfig

    model = make(num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = BitmapLinear.from_linear(mlp.up_proj)
    mlp.down_proj = headstart.Int4Linear.from_weight(headstart.Int4Weight.quantize(mlp.down_proj.weight.detach(), 32))
    with pytest.raises(ValueError, match="expected packed layers of one kind, got bitmap and int4"):
        HeadstartConfig.of(model)


def test_bits_that_compressed_tensors_would_lose(tmp_path):
    """-0.0, subnormals and the smallest values survive our own folder."""
    model = bitmap_formats.prune(make(num_hidden_layers=1))
    layers = bitmap_formats.write(tmp_path / "in", model)
    loaded = headstart.load(tmp_path / "in")
    odd = torch.tensor([-0.0, 1e-42, -1e-45, 0.0]).repeat(96, 16)
    loaded.set_submodule(UP, BitmapLinear.from_weight(BitmapWeight.compress(odd)))
    loaded.config.quantization_config = type(loaded.config.quantization_config).of(loaded)
    loaded.save_pretrained(tmp_path / "out")
    again = headstart.load(tmp_path / "out")
    got = again.get_submodule(UP).weight_bitmap.decompress()
    assert torch.equal(got.view(torch.int32), odd.view(torch.int32)) and bitmaps(again).keys() == set(layers)

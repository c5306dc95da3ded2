"""`headstart.load` refuses what it would misread, by file and tensor or field, and no model is left."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import headstart  # noqa: E402
import int4_formats  # noqa: E402
from models import logits, make, tokens  # noqa: E402

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An artifact of our own."""
    return int4_formats.write_own(tmp_path_factory.mktemp("own"), make())


# --- foreign checkpoints --------------------------------------------------------------------------------------------


def group(q):
    return q["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("awq", lambda q: q.update(bits=3), "bits: expected 4, got 3"),
        (
            "awq",
            lambda q: q.update(group_size=40),
            r"group_size: expected a multiple of 32, or -1 \(a whole row\), got 40",
        ),
        ("awq", lambda q: q.update(group_size=64), "model.layers.0.*: qzeros: expected int32"),
        ("awq", lambda q: q.update(version="gemv"), "version: expected 'gemm' .*, got 'gemv'"),
        ("awq", lambda q: q.update(version="gemv_fast"), "version: expected 'gemm' .*, got 'gemv_fast'"),
        ("awq", lambda q: q.update(backend="llm-awq"), "version: expected 'gemm' .*, got 'llm-awq'"),
        ("awq", lambda q: q.pop("version"), "version: expected 'gemm' .*, got None"),
        ("awq", lambda q: q.update(zero_point=False), "zero_point: expected true, got False"),
        ("gptq", lambda q: q.update(bits=8), "bits: expected 4, got 8"),
        ("gptq", lambda q: q.pop("checkpoint_format"), '"checkpoint_format": "gptq", into config.json, got None'),
        ("gptq", lambda q: q.update(checkpoint_format="marlin"), "'gptq_v2' .*, got 'marlin'"),
        ("gptq", lambda q: q.update(group_size=0), "group_size: expected a multiple of 32"),
        ("gptq", lambda q: q.update(group_size=64), "model.layers.0.*: .*qzeros: expected int32"),
        ("gptq", lambda q: q.update(pack_dtype="int8"), "pack_dtype: expected 'int32', got 'int8'"),
        ("gptq", lambda q: q.update(dynamic={"-:.*up_proj": {}}), "dynamic: -:.*up_proj: expected a pattern of plain"),
        (
            "compressed-tensors",
            lambda q: q.update(format="int-quantized"),
            "format: expected 'pack-quantized', got 'int-q",
        ),
        (
            "compressed-tensors",
            lambda q: group(q)["weights"].update(num_bits=8),
            "group_0: weights: num_bits: expected 4",
        ),
        ("compressed-tensors", lambda q: group(q)["weights"].update(type="float"), "weights: type: expected 'int'"),
        (
            "compressed-tensors",
            lambda q: group(q)["weights"].update(strategy="tensor"),
            "strategy: expected 'group' or",
        ),
        (
            "compressed-tensors",
            lambda q: group(q)["weights"].update(actorder="best"),
            "actorder: expected .*, got 'best'",
        ),
        (
            "compressed-tensors",
            lambda q: group(q)["weights"].update(actorder="group"),
            "weight_g_idx: expected a tensor, as",
        ),
        (
            "compressed-tensors",
            lambda q: group(q)["weights"].update(group_size=16),
            "group_size: expected a multiple of 32",
        ),
        ("compressed-tensors", lambda q: group(q)["weights"].update(group_size=96), "weight_scale: expected"),
        (
            "compressed-tensors",
            lambda q: group(q).update(input_activations={"num_bits": 8}),
            "input_activations: expected none",
        ),
        (
            "compressed-tensors",
            lambda q: group(q).update(targets=["re:.*attn.*"]),
            "a group whose targets name model.layers.0.mlp",
        ),
        (
            "compressed-tensors",
            lambda q: q.update(ignore=["re:.*o_proj"]),
            "ignore: expected no name of model.layers.0.self_attn.o",
        ),
        ("compressed-tensors", lambda q: q.update(config_groups={}), "config_groups: expected at least one group"),
        ("compressed-tensors", lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme: expected none"),
        (
            "compressed-tensors",
            lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config: format",
        ),
    ],
)
def test_configs_that_are_refused(tmp_path, method, change, message):
    int4_formats.write(tmp_path, make(num_hidden_layers=1), method)
    int4_formats.edit(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        headstart.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("awq", lambda t: t.pop(f"{UP}.scales"), f"{UP}: scales: expected a tensor beside qweight, qzeros"),
        ("awq", lambda t: t.pop(f"{UP}.qweight"), f"{UP}: qweight: expected a tensor beside qzeros, scales"),
        ("gptq", lambda t: t.pop(f"{UP}.qzeros"), f"{UP}: qzeros: expected a tensor beside"),
        ("compressed-tensors", lambda t: t.pop(f"{UP}.weight_shape"), f"{UP}: weight_shape: expected a tensor beside"),
        (
            "compressed-tensors",
            lambda t: t.pop(f"{UP}.weight_zero_point"),
            f"{UP}: weight_zero_point: expected a tensor",
        ),
        ("awq", lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"].float()}), f"{UP}: .*qzeros: expected int32"),
        (
            "gptq",
            lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"][:, :2].contiguous()}),
            f"{UP}: .*qzeros: expected",
        ),
        (
            "gptq",
            lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].double()}),
            f"{UP}: .*scales: expected float32 or",
        ),
        ("gptq", lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"] + 1}), f"{UP}: .*g_idx: expected groups of 32"),
        (
            "compressed-tensors",
            lambda t: t.update({f"{UP}.weight_zero_point": torch.full((96, 2), 99, dtype=torch.int8)}),
            f"{UP}: .*weight_zero_point: expected values -8 to 7, got 99 to 99",
        ),
        (
            "gptq",
            lambda t: t.update(
                {f"{UP}.{f}": t[f"model.layers.0.mlp.down_proj.{f}"].clone() for f in int4_formats.GPTQ}
            ),
            rf"{UP}: .*expected a weight of \[96, 64\], got one of \[64, 96\]",
        ),
        ("awq", lambda t: t.pop("model.norm.weight"), "model.norm.weight: expected a tensor, which no file has"),
        ("awq", lambda t: t.update({"model.odd": torch.ones(1)}), "model.odd: expected no such tensor"),
        ("awq", lambda t: t.update({f"{UP}.weight": torch.ones(96, 64)}), f"{UP}.weight: expected no such tensor"),
        (
            "awq",
            lambda t: t.update(int4_formats.moved(t, UP, "model.layers.7.mlp.up_proj")),
            "7.mlp.up_proj: expected a lin",
        ),
        (
            "awq",
            lambda t: t.update({"model.norm.weight": torch.ones(5)}),
            r"model.norm.weight: expected \[64\], as config.json says, got \[5\]",
        ),
    ],
)
def test_tensors_that_are_refused(tmp_path, method, change, message):
    int4_formats.write(tmp_path, make(num_hidden_layers=1), method)
    tensors = int4_formats.read(tmp_path)
    change(tensors)
    int4_formats.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises((ValueError, RuntimeError), match=message):
        headstart.load(tmp_path)


def test_files_that_are_refused(tmp_path):
    folder = tmp_path / "sharded"
    int4_formats.write(folder, make(num_hidden_layers=1), "gptq", shards=3)
    second = folder / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors: not a whole safetensors file"):
        headstart.load(folder)
    second.unlink()
    with pytest.raises(
        FileNotFoundError, match="model-00002-of-00003.safetensors: expected a file, which model.*missing"
    ):
        headstart.load(folder)
    second.write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match="model-00002-of-00003.safetensors: .*: expected a tensor, as model.safetensors.index"
    ):
        headstart.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json: weight_map: expected tensors and their files"):
        headstart.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors or model.safetensors.index.json"):
        headstart.load(folder)


def test_an_int4_output_layer_that_is_tied_is_refused(tmp_path):
    model = make(vocab_size=200)
    int4_formats.write(tmp_path, model, "gptq", plain=())
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(ValueError, match='lm_head: expected a plain weight.*write "tie_word_embeddings": false'):
        headstart.load(tmp_path)


def test_other_folders_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="load: model: expected a directory with a config.json"):
        headstart.load(tmp_path)
    model = make(num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(headstart.load(tmp_path), tokens()), logits(model, tokens()))
    (tmp_path / "quantize_config.json").write_text("{}")
    with pytest.raises(ValueError, match="quantize_config.json: checkpoint_format: expected 'gptq'"):
        headstart.load(tmp_path)
    (tmp_path / "quantize_config.json").unlink()
    tensors = int4_formats.read(tmp_path)
    del tensors["model.norm.weight"]
    int4_formats.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="model.norm.weight: expected a tensor, which no file has"):
        headstart.load(tmp_path)


# --- our own --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(version=2), "version: expected 1"),
        (lambda q: q.update(weights="int3"), "weights: expected one of 'int4', .*, got 'int3'"),
        (lambda q: q.update(group_size=33), "group_size: expected a multiple of 32 .*, or -1, got 33"),
        (lambda q: q.update(group_size="32"), "group_size: expected a multiple of 32 .*, or -1, got '32'"),
        (lambda q: q.update(group_size=16), "group_size: expected a multiple of 32, or -1, got 16"),
        (lambda q: q.update(symmetric=3), "symmetric: expected true or false, got 3"),
        (lambda q: q.update(scale_dtype="int8"), "scale_dtype: expected one of float32, float16, bfloat16, got 'int8'"),
        (lambda q: q.update(scale_dtype=[]), "scale_dtype: expected one of"),
        (lambda q: q.update(modules=["a"]), "modules: expected an object"),
        (lambda q: q.update(colour="red"), "colour: expected no such field, got 'red'"),
        (
            lambda q: q["modules"].update({UP: {"group": 32}}),
            f"modules: {UP}: expected only group_size, .*, got 'group'",
        ),
        (
            lambda q: q["modules"].update({UP: {"group_size": 5}}),
            f"modules: {UP}: group_size: expected a multiple of 32",
        ),
        (lambda q: q["modules"].update({UP: 5}), f"modules: {UP}: expected an object, got 5"),
        (lambda q: q["modules"].update({"model.norm": {}}), "modules: model.norm: expected an untied linear layer"),
        (lambda q: q["modules"].update({"odd": {}}), "modules: odd: expected an untied linear layer .*, got 'None'"),
        (lambda q: q["modules"].update({UP: {"group_size": 128}}), f"{UP}.scales: expected float16"),
        (
            lambda q: q["modules"].update({UP: {"scale_dtype": "float32"}}),
            f"{UP}.scales: expected float32 .*, got float16",
        ),
        (lambda q: q["modules"].update({UP: {"symmetric": True}}), f"{UP}.zeros: expected no such tensor"),
        (lambda q: q["modules"].update({UP: {"act_order": False}}), f"{UP}.permutation: expected no such tensor"),
        (lambda q: q["modules"].pop(UP), f"{UP}.p.*: expected no such tensor"),
        (lambda q: q["modules"].update({"lm_head": {}}), "lm_head.packed: expected a tensor, which no file"),
    ],
)
def test_own_configs_that_are_refused(tmp_path, own, change, message):
    int4_formats.copy(own, tmp_path)
    int4_formats.edit(tmp_path, change)
    for opened in (headstart.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            opened(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.packed"), f"{UP}.packed: expected a tensor, which no file"),
        (lambda t: t.pop(f"{UP}.permutation"), f"{UP}.permutation: expected a tensor, which no file"),
        (
            lambda t: t.update({f"{UP}.packed": t[f"{UP}.packed"][1:].clone()}),
            rf"{UP}.packed: expected int32 \[6, 2, 4, 16\]",
        ),
        (
            lambda t: t.update({f"{UP}.packed": t[f"{UP}.packed"].float()}),
            f"{UP}.packed: expected int32 .*, got float32",
        ),
        (lambda t: t[f"{UP}.zeros"].fill_(16), f"{UP}: zeros: expected zero points 0 to 15; the data are damaged"),
        (lambda t: t[f"{UP}.scales"].fill_(torch.nan), f"{UP}: scales: expected finite scales; the data are damaged"),
        (lambda t: t[f"{UP}.permutation"].fill_(3), f"{UP}: permutation: expected every column once"),
        (lambda t: t[f"{UP}.permutation"].add_(9), f"{UP}: permutation: expected every column once"),
    ],
)
def test_own_tensors_that_are_refused(tmp_path, own, change, message):
    int4_formats.copy(own, tmp_path)
    tensors = int4_formats.read(tmp_path)
    change(tensors)
    int4_formats.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for opened in (headstart.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            opened(tmp_path)


def test_own_files_that_are_refused(tmp_path, own):
    int4_formats.copy(own, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    for opened in (headstart.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
            opened(tmp_path)
    path.unlink()
    headstart.load(own).save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    for opened in (headstart.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(FileNotFoundError, match=gone.name):
            opened(tmp_path)


def test_quantising_in_from_pretrained_points_to_the_command(tmp_path):
    from headstart.weights.config import HeadstartConfig

    make(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not quantised: `headstart quantize`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HeadstartConfig())

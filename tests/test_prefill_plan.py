"""PrefillPlan: patterns, files and the indices that they lead to."""

import json
import math

import pytest
import torch

import headstart
from headstart.attention.index import full_index, stitch
from headstart.attention.patterns import HeadPattern
from headstart.attention.plan import PrefillPlan

MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MIXED = PrefillPlan(
    HeadPattern.of("adaptive", threshold=0.9),
    (
        {0: HeadPattern.of("a_shape", sink=64, local=128), 4: HeadPattern.of("vertical_slash", vertical_size=40)},
        {1: HeadPattern.of("block_topk", top_k=3, sink=0), 2: HeadPattern.of("adaptive", threshold=0.5, score=0.25)},
    ),
    MODEL,
)


def queries_and_keys(nq, nk, batch=2):
    torch.manual_seed(0)
    return torch.randn(batch, 6, nq, 16), torch.randn(batch, 2, nk, 16)


def test_uniform_takes_defaults_and_parameters():
    assert dict(PrefillPlan.uniform("a_shape", sink=5).default.params) == {"sink": 5, "local": 1024}
    assert PrefillPlan.uniform().default.name == "adaptive"
    assert PrefillPlan.uniform("dense").is_dense and not MIXED.is_dense


@pytest.mark.parametrize(
    ("pattern", "params", "message"),
    [
        ("diagonal", {}, "pattern: expected one of dense, a_shape"),
        (None, {}, "pattern: expected one of"),
        ("dense", {"sink": 1}, "sink: expected a parameter of dense"),
        ("a_shape", {"sink": -1}, "sink: expected an integer, at least 0, got -1"),
        ("a_shape", {"sink": 1.5}, "sink: expected an integer"),
        ("a_shape", {"sink": True}, "sink: expected an integer"),
        ("block_topk", {"top_k": 0}, "top_k: expected an integer, at least 1"),
        ("adaptive", {"threshold": math.nan}, "threshold: expected a number above 0 and up to 1, got nan"),
        ("adaptive", {"threshold": 0}, "threshold: expected a number above 0"),
        ("adaptive", {"stride": 7}, "stride: expected 4, 8, 16 or 32, got 7"),
        ("adaptive", {"max_blocks": 0}, "max_blocks: expected an integer, at least 1, or none"),
    ],
)
def test_bad_patterns_are_named(pattern, params, message):
    with pytest.raises(ValueError, match=message):
        PrefillPlan.uniform(pattern, **params)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PrefillPlan.uniform("block_topk"), MIXED])
def test_a_saved_plan_loads_as_it_was(tmp_path, plan):
    plan.save(tmp_path / "plan.json")
    loaded = PrefillPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert [p.score for p in loaded.heads(1, 6)] == [p.score for p in plan.heads(1, 6)]
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    PrefillPlan.uniform("dense").save(path)
    broken = PrefillPlan(HeadPattern("a_shape", (("sink", object()),)))
    with pytest.raises(TypeError):
        broken.save(path)
    assert PrefillPlan.load(path).is_dense
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def damage(path, *keys, value):
    """Sets or, with value `...`, deletes what stands at a place of a JSON file."""
    content = json.loads(path.read_text())
    at = content
    for key in keys[:-1]:
        at = at[key]
    if value is ...:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["format"], "something", "plan.json: format: expected 'headstart.prefill_plan', got 'something'"),
        (["version"], 99, "plan.json: version: expected 1, got 99"),
        (["default"], ..., "plan.json: default: expected an object, got None"),
        (["default", "pattern"], "zigzag", "plan.json: default.pattern: expected one of .*, got 'zigzag'"),
        (["default", "pattern"], ..., "plan.json: default.pattern: expected one of"),
        (["default", "threshold"], 1.5, "plan.json: default.threshold: expected a number above 0 and up to 1, got 1.5"),
        (["default", "threshold"], math.nan, "plan.json: default.threshold: expected .*, got nan"),
        (["default", "score"], "high", "plan.json: default.score: expected a finite number, got 'high'"),
        (["layers"], {}, "plan.json: layers: expected a list over layers"),
        (["layers", 1], [], r"plan.json: layers\[1\]: expected an object"),
        (["layers", 0, "4", "slash_size"], "x", r"plan.json: layers\[0\]\[4\].slash_size: expected an integer"),
        (["layers", 0, "four"], {}, r"plan.json: layers\[0\]: expected head numbers, got 'four'"),
        (["model"], 3, "plan.json: model: expected an object or null, got 3"),
        (["model", "head_dim"], "16", "plan.json: model.head_dim: expected int, got '16'"),
        (["model", "color"], "blue", "plan.json: model: expected the fields .*, got 'color'"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_file_and_field(tmp_path, keys, value, message):
    path = tmp_path / "plan.json"
    MIXED.save(path)
    damage(path, *keys, value=value)
    with pytest.raises(ValueError, match=message):
        PrefillPlan.load(path)


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"PrefillPlan.load: path: expected a file, got .*none.json"):
        PrefillPlan.load(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"format": "headst')
    with pytest.raises(ValueError, match=r"torn.json: not a JSON file"):
        PrefillPlan.load(tmp_path / "torn.json")


def test_minference_files_are_read_and_written_without_loss(tmp_path):
    content = [
        {"0": ["vertical_and_slash", 1000, 6096, 0.336], "1": ["stream_llm", 128, 3968, 0.9]},
        {"5": ["block_sparse", 100, 1, 0.5]},
    ]
    source, copy = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps(content))
    plan = PrefillPlan.from_minference(source)
    assert plan.heads(0, 6)[1] == HeadPattern.of("a_shape", sink=128, local=3968)
    assert plan.heads(0, 6)[2] == HeadPattern.of("vertical_slash", vertical_size=1000, slash_size=6096)
    assert plan.heads(1, 6)[5] == HeadPattern.of("block_topk", top_k=100, sink=0, local=0)
    plan.to_minference(copy)
    assert json.loads(copy.read_text()) == content
    with pytest.raises(ValueError, match="read it with PrefillPlan.from_minference"):
        PrefillPlan.load(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "layers: expected a list over layers"),
        ([{"0": ["spiral", 1, 2, 3]}], r"layers\[0\]\[0\]\[0\]: expected one of vertical_and_slash"),
        ([{"0": [["x"], 1, 2, 3]}], r"layers\[0\]\[0\]\[0\]: expected one of vertical_and_slash"),
        ([{"0": ["stream_llm", 1]}], r"layers\[0\]\[0\]: expected \[type, number, number, score\]"),
        ([{"0": ["stream_llm", -1, 2, 3]}], r"layers\[0\]\[0\].sink: expected an integer, at least 0, got -1"),
    ],
)
def test_bad_minference_files_are_named(tmp_path, content, message):
    (tmp_path / "in.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"in.json: {message}"):
        PrefillPlan.from_minference(tmp_path / "in.json")


def test_what_minference_cannot_say_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected one that knows its numbers of layers and heads"):
        PrefillPlan.uniform("a_shape").to_minference(tmp_path / "out.json")
    with pytest.raises(ValueError, match=r"layers\[0\]\[1\]: expected one of .*, got 'adaptive'"):
        MIXED.to_minference(tmp_path / "out.json")
    bound = PrefillPlan(HeadPattern.of("a_shape", sink=3), model=MODEL)
    bound.to_minference(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())[1]["5"] == ["stream_llm", 3, 1024, 1.0]


# --- the model -----------------------------------------------------------------------------------------------------


def test_a_plan_for_another_model_says_what_differs():
    MIXED.check(MODEL)
    with pytest.raises(ValueError, match="head_dim: expected 16, got 64"):
        MIXED.check(MODEL | {"head_dim": 64})
    unbound = PrefillPlan(MIXED.default, MIXED.layers)
    with pytest.raises(ValueError, match="layers: expected 2, got 3"):
        unbound.check(MODEL | {"num_hidden_layers": 3})
    with pytest.raises(ValueError, match="heads: expected more than 4, got 4"):
        unbound.check(MODEL | {"num_attention_heads": 4})


# --- indices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (1, 65), (64, 64), (100, 100), (70, 300), (128, 129)])
def test_the_full_index_attends_everything(nq, nk):
    mask = full_index(nq, nk, torch.device("cpu")).to_mask(nq, nk)
    assert torch.equal(mask[0, 0], torch.ones(nq, nk, dtype=torch.bool).tril(nk - nq))


BUILDERS = {
    "a_shape": lambda p, q, k, **o: headstart.a_shape_index(q.shape[2], k.shape[2], **p, kv_start=o["kv_start"]),
    "vertical_slash": lambda p, q, k, **o: headstart.vertical_slash_index(q, k, **p, **o),
    "block_topk": lambda p, q, k, **o: headstart.block_topk_index(q, k, **p, kv_start=o["kv_start"]),
    "adaptive": lambda p, q, k, **o: headstart.adaptive_block_index(q, k, **p, **o),
}


@pytest.mark.parametrize("kv_start", [None, torch.tensor([0, 90], dtype=torch.int32)], ids=["whole", "padded"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("nq", "nk"), [(300, 300), (130, 420)])
def test_mixed_layers_attend_what_each_head_would_alone(layer, nq, nk, kv_start):
    q, k = queries_and_keys(nq, nk)
    got = MIXED.index(layer, q, k, kv_start=kv_start, scale=0.3).to_mask(nq, nk, kv_start=kv_start)
    for head, pattern in enumerate(MIXED.heads(layer, 6)):
        build = BUILDERS[pattern.name]
        alone = build(dict(pattern.params), q[:, [head]], k[:, [head // 3]], kv_start=kv_start, scale=0.3)
        want = alone.to_mask(nq, nk, kv_start=kv_start).expand(2, 1, nq, nk)
        assert torch.equal(got[:, [head]], want), (head, pattern)


def test_stitching_keeps_columns_of_every_row():
    blocks = headstart.a_shape_index(200, 200, sink=1, local=1)
    count = torch.tensor([1, 0, 2, 1], dtype=torch.int32)
    columns = torch.tensor([[3, 0], [0, 0], [5, 70], [9, 0]], dtype=torch.int32)
    rows = headstart.BlockIndex(blocks.block_count, blocks.block_index, count[None, None], columns[None, None])
    got = stitch([([1], rows), ([2, 0], blocks)], 1).to_mask(200, 200)
    want = blocks.to_mask(200, 200)
    assert torch.equal(got, torch.cat([want, rows.to_mask(200, 200), want], 1))

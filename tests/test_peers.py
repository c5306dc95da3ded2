"""bench/peers.py: what an engine's process tells, how rounds are joined, the table. No engine is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
if not BENCH.is_dir():
    pytest.skip("the benchmarks are only in a source tree", allow_module_level=True)
pytest.importorskip("transformers")
sys.path.append(str(BENCH))

import pages  # noqa: E402
import peers  # noqa: E402


def peers_results() -> dict:
    environment = {"cpu": "a CPU", "threads": 2, "date": "2026-01-02T03:04", "commit": "abc", "uncommitted": False}
    environment |= {"busy": False, "load_average": 0.1}
    settings = {"rounds": 3, "prefill": [512], "decode": [256], "new": 8, "minutes": 1}
    return {"environment": environment, "model": "a.gguf", "settings": settings, "loss_tokens": 256, "engines": {}}


def test_the_rounds_of_an_engine_are_joined():
    entry = peers.new_engine("headstart-plan")
    for line in [
        {"versions": {"torch": "2"}},
        *({"figure": "prefill 512", "value": value} for value in (3.0, 1.0, 2.0)),
        {"failure": "loss: gone"},
        {"failure": "loss: gone"},
        {"note": "reads less"},
    ]:
        peers.add(entry, line)
    assert entry["title"] == "headstart, searched plan" and entry["medians"] == {"prefill 512": 2.0}
    assert entry["samples"] == {"prefill 512": [3.0, 1.0, 2.0]} and entry["failures"] == ["loss: gone"]
    assert peers.runs_here(None) and peers.runs_here(entry) and not peers.runs_here(peers.new_engine("openvino"))


def test_the_table_of_peers():
    results = peers_results()
    for name, figures in (
        ("transformers", {"open": 5.0, "prefill 512": 4.0, "loss": 2.0, "decode 256": 10.0, "peak bytes": 5e8}),
        ("openvino", {"open": 1.0, "prefill 512": 2.0, "loss": 2.25, "decode 256": 30.0}),
        ("llama.cpp", {}),
    ):
        entry = results["engines"][name] = peers.new_engine(name)
        for figure, value in figures.items():
            peers.add(entry, {"figure": figure, "value": value})
    peers.add(results["engines"]["llama.cpp"], {"failure": "open: no | file"})
    head, _, own, other, broken, _, words = pages.peers_table(results)
    assert "reads 512, s" in head and "tokens/s at 256" in head
    assert "| 2.000 |" in own and "500" in own and "| 2.250 (+0.250) |" in other and "30.0" in other and "–" in other
    assert broken.startswith("| llama.cpp | does not run here: open: no / file |") and broken.count("|") == head.count(
        "|"
    )
    assert "medians of 3 rounds" in words and "last 256 tokens" in words


def test_an_engine_that_dies_or_stalls_is_told(tmp_path, monkeypatch):
    script = tmp_path / "engine.py"
    monkeypatch.setattr(peers.peer_engines, "__file__", str(script))
    python = Path(sys.executable)

    def lines(code: str, minutes: float = 1) -> list[dict]:
        script.write_text("import json, os, sys, time\n" + code)
        return list(peers.run("openvino", {"threads": 1}, minutes, (python, python)))

    assert lines("print(json.dumps({'figure': 'open', 'value': 1}))") == [{"figure": "open", "value": 1}]
    told = lines("print(json.dumps({'doing': 'open'}), flush=True); sys.exit('no memory')")
    assert told == [{"failure": "open: ended with status 1; no memory"}]
    assert "ended by SIGABRT" in lines("os.abort()")[0]["failure"]
    assert lines("time.sleep(60)", minutes=0.01) == [{"failure": "start: stopped after 0.01 minutes"}]
    absent = list(peers.run("openvino", {"threads": 1}, 1, (python, tmp_path / "none")))
    assert absent == [{"failure": f"import: {tmp_path / 'none'} is missing; `make peers` makes it"}]


def test_every_engine_has_an_interface():
    for name, kind in peers.peer_engines.ENGINES.items():
        engine = getattr(kind, "func", kind)
        assert all(callable(getattr(engine, call)) for call in ("open", "prefill", "decode", "loss")), name
        assert peers.peer_engines.of_this_tree(name) == name.startswith(("transformers", "headstart"))

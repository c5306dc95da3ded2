"""Progress bars of transformers are off in the call that wants none, and nowhere else."""

from __future__ import annotations

import sys
import threading

import pytest

transformers = pytest.importorskip("transformers")

from transformers import modeling_gguf_pytorch_utils  # noqa: E402
from transformers.utils import logging  # noqa: E402

from headstart._quiet import no_progress_bars  # noqa: E402
from models import make  # noqa: E402

if not hasattr(logging, "set_tqdm_hook"):
    pytest.skip("this transformers has no hook for its progress bars", allow_module_level=True)


@pytest.fixture(autouse=True)
def bars_are_on(monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    monkeypatch.setattr(logging, "_tqdm_hook", None)


def bars(capsys, make_bar=None) -> str:
    """What a bar writes to stderr."""
    for _ in (make_bar or logging.tqdm)(range(3), desc="a bar"):
        pass
    return capsys.readouterr().err


def test_loading_and_saving_are_silent_and_leave_the_process_as_it_was(tmp_path, capsys):
    stderr = sys.stderr
    with no_progress_bars():
        make().save_pretrained(tmp_path, max_shard_size="20KB")
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)
        assert sys.stderr is stderr and logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == ""
    transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert "Loading weights" in capsys.readouterr().err


@pytest.mark.parametrize("module", [logging, modeling_gguf_pytorch_utils], ids=["transformers", "GGUF"])
def test_bars_are_off_inside_only(module, capsys):
    def make_bar(*args, **kwargs):
        return module.tqdm(*args, **kwargs)

    with no_progress_bars(), no_progress_bars():
        assert bars(capsys, make_bar) == ""
    assert "a bar" in bars(capsys, make_bar)
    logging._tqdm_active = False  # the user's own choice, by the switch of transformers
    assert bars(capsys, make_bar) == ""


def test_other_threads_keep_their_bars(capsys):
    inside, done = threading.Event(), threading.Event()

    def quiet():
        with no_progress_bars():
            inside.set()
            done.wait(60)
            assert bars(capsys) == ""

    thread = threading.Thread(target=quiet)
    thread.start()
    inside.wait(60)
    assert "a bar" in bars(capsys)
    with no_progress_bars():
        assert bars(capsys) == ""
    assert "a bar" in bars(capsys)  # while the other call goes on
    done.set()
    thread.join()


def test_a_hook_of_the_users_keeps_working(capsys):
    made = []

    def hook(factory, args, kwargs):
        made.append(kwargs["desc"])
        return factory(*args, **kwargs)

    logging.set_tqdm_hook(hook)
    for calls in range(2):
        with no_progress_bars():
            assert bars(capsys) == ""
        assert len(made) == calls
        assert "a bar" in bars(capsys) and len(made) == calls + 1
    before = logging.set_tqdm_hook(lambda *given: before(*given))  # over ours
    with no_progress_bars():
        assert bars(capsys) == ""
    assert "a bar" in bars(capsys) and len(made) == 3

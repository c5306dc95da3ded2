"""Families of models, small and with random weights: patched with a plan that selects everything, each is itself.

`supported.py` lists them, and what each brings.
"""

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from headstart.attention.forward import force_path  # noqa: E402
from headstart.attention.plan import PrefillPlan  # noqa: E402
from headstart.attention.recording import record  # noqa: E402
from headstart.model.patch import patch, unpatch  # noqa: E402
from models import EVERYTHING, left_padded, logits, make, tokens  # noqa: E402
from supported import FAMILIES  # noqa: E402

PLANS = ("dense", "adaptive")
LENGTH = 200


@pytest.fixture(autouse=True)
def sparse_from_the_first_block():
    """Small prompts go the way of long ones, and no warning goes unnoticed."""
    with warnings.catch_warnings(), force_path("sparse"):
        warnings.filterwarnings("error", category=RuntimeWarning)
        yield


def family(name: str):
    return make(name, num_hidden_layers=3, initializer_range=0.1, **FAMILIES[name].sizes)


def windows_of(name: str) -> list[int | None]:
    window = FAMILIES[name].sizes.get("sliding_window")
    kinds = FAMILIES[name].sizes.get("layer_types", ["sliding_attention"] * 3)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def check_paths(entries, name: str, plan: str, forwards: int) -> None:
    """Every layer of every forward ran our kernel, in the way that its window and its length ask for."""
    assert [e.layer for e in entries] == [0, 1, 2] * forwards
    for e in entries:
        window = windows_of(name)[e.layer]
        cuts = window is not None and window < e.nk
        whole = "sparse" if plan == "adaptive" and e.nq >= 64 and e.nk >= 64 else "dense"
        assert (e.path, e.window) == (("window", window) if cuts else (whole, None)), e[:1] + e[2:]


def close(got, want, real=None):
    real = slice(None) if real is None else real.bool()
    torch.testing.assert_close(got[real], want[real], rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name):
    """One prompt, a batch with left padding, and both in chunks over a cache."""
    model, (ids, mask) = family(name), left_padded([LENGTH, 90, 3], LENGTH)
    one, batch = logits(model, tokens(1, LENGTH)), logits(model, ids, attention_mask=mask)
    for plan in PLANS:
        patch(model, EVERYTHING[plan])
        with record() as entries:
            close(logits(model, tokens(1, LENGTH)), one)
            close(logits(model, ids, attention_mask=mask), batch, mask)
        check_paths(entries, name, plan, 2)
        for given, real, want in ((tokens(1, LENGTH), None, one), (ids, mask, batch)):
            cache, end, got = transformers.DynamicCache(config=model.config), 0, []
            with record() as entries:
                for chunk in given.split([70, 65, 1, 64], 1):
                    end += chunk.shape[1]
                    seen = {} if real is None else dict(attention_mask=real[:, :end])
                    got.append(logits(model, chunk, past_key_values=cache, **seen))
            close(torch.cat(got, 1), want, real)
            check_paths(entries, name, plan, 4)
    if None in windows_of(name):
        patch(model, PrefillPlan.uniform("a_shape", sink=1, local=1))
        assert (logits(model, tokens(1, LENGTH)) - one).abs().max() > 1e-3 * one.abs().max(), "attention has no say"


@pytest.mark.parametrize(
    "options", [{}, dict(num_beams=3), dict(cache_implementation="static")], ids=["greedy", "beams", "static"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_generate(name, options):
    """A batch with left padding, whose windows are full before, or fill while tokens are generated."""
    model = family(name)
    for lengths in ([LENGTH, 90], [44, 40]):
        ids, mask = left_padded(lengths, max(lengths))
        given = dict(max_new_tokens=8, do_sample=False, attention_mask=mask) | options
        want = model.generate(ids, **given)
        with record() as entries:
            got = patch(model, EVERYTHING["adaptive"]).generate(ids, **given)
        assert torch.equal(got, want)
        check_paths(entries, name, "adaptive", 8)
        unpatch(model)

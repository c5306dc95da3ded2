"""`headstart.load`: int4 checkpoints of every format compute what their definition says, and bad ones are refused."""

import json
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

import headstart  # noqa: E402
import int4_formats  # noqa: E402
from headstart.engine.int4_linear import Int4Linear  # noqa: E402
from models import logits, make, tokens  # noqa: E402

LAYERS = 14  # of the tiny model: two of seven


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


FORMATS = [
    ("awq", dict()),
    ("awq", dict(symmetric=True)),
    ("gptq", dict()),
    ("gptq", dict(version=2)),
    ("gptq", dict(version=2, symmetric=True)),
    ("gptq", dict(act_order=True)),
    ("gptq", dict(act_order=True, symmetric=True)),
    ("compressed-tensors", dict()),
    ("compressed-tensors", dict(symmetric=True)),
    ("compressed-tensors", dict(act_order=True)),
]


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

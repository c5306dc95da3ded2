"""The public index builders: they hand all they are given to the operators; and A-shape, plain torch everywhere."""

from __future__ import annotations

import pytest
import torch

import headstart
import shapes
from backends import torch_operator
from headstart import BlockIndex
from judges import prefill_index as judge
from judges.prefill_index import by_shape, same
from shapes import Shape

# --- the public functions ---------------------------------------------------------------------------------------------

START = torch.tensor([20], dtype=torch.int32)
Q, K = torch.randn(1, 2, 100, 16), torch.randn(1, 1, 200, 16)
COMMON = dict(sink=3, local=70, kv_start=START, block_q=128, block_k=64)
ARGUMENTS = {  # what is required, and the rest
    "a_shape_index": (dict(nq=100, nk=200, sink=3, local=70), COMMON | dict(device=torch.device("cpu"))),
    "vertical_slash_index": (
        dict(q=Q, k=K, vertical_size=40, slash_size=200),
        COMMON | dict(last_q=30, scale=0.3, max_blocks=2, max_columns=17),
    ),
    "block_topk_index": (dict(q=Q, k=K, top_k=2), COMMON),
    "adaptive_block_index": (
        dict(q=Q, k=K),
        COMMON
        | dict(threshold=0.7, stride=16, scale=0.3, max_blocks=2, head_threshold=torch.tensor([0.5, 0.6]), samples=3),
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_public_functions_hand_every_argument_to_the_operator(name, monkeypatch):
    arguments, calls = torch_operator(name)._schema.arguments, []

    def recorded(*args, **options):
        calls.append(dict(zip((x.name for x in arguments), args)) | options)
        return torch_operator(name)(*args, **options)

    monkeypatch.setattr(headstart.ops.prefill_index, f"_{name}", recorded)
    required, rest = ARGUMENTS[name]
    defaults = {x.name: x.default_value for x in arguments if x.name not in required}
    for given, expected in ((required, required | defaults), (required | rest, required | rest)):
        index = getattr(headstart, name)(**given)
        assert calls[-1].keys() == expected.keys() == {x.name for x in arguments}
        assert all(calls[-1][x] is value or calls[-1][x] == value for x, value in expected.items())
        tensors = torch_operator(name)(**given)
        assert same(index, BlockIndex(*tensors, block_q=expected["block_q"], block_k=expected["block_k"]))
        assert (index.block_q, index.block_k) == (expected["block_q"], expected["block_k"])


# --- A-shape ----------------------------------------------------------------------------------------------------------

WINDOWS = ((0, 0), (0, 1), (1, 0), (1, 1), (64, 64), (65, 63), (100, 130), (10**6, 10**6))


def check_a_shape(shape: Shape, sink: int, local: int):
    sizes = dict(block_q=shape.block_q, block_k=shape.block_k)
    index = headstart.a_shape_index(shape.nq, shape.nk, sink=sink, local=local, kv_start=shape.start(), **sizes)
    expected = judge.forced_blocks(shape, sink, local)
    assert torch.equal(judge.selected_blocks(index, shape), expected if shape.kv_start else expected[:1])


@by_shape(shapes.BUILDERS)
@pytest.mark.parametrize("sink, local", WINDOWS)
def test_a_shape(shape, sink, local):
    check_a_shape(shape, sink, local)


def test_a_shape_any_size():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    small, size = st.integers(0, 300), st.sampled_from((64, 128))

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(st.integers(1, 400), small, small, small, st.none() | st.integers(0, 800), size, size)
    def run(nq, more, sink, local, start, block_q, block_k):
        nk = nq + more
        start = None if start is None else (min(start, nk),)
        shape = Shape(1, 1, 1, nq, nk, 8, block_q=block_q, block_k=block_k, kv_start=start)
        check_a_shape(shape, sink, local)

    run()


@pytest.mark.parametrize("start", (-50, 301, 2**31 - 1))
def test_a_shape_kv_start_outside_the_keys(start):
    near = torch.tensor([min(max(start, 0), 300)], dtype=torch.int32)
    a, b = (headstart.a_shape_index(200, 300, sink=70, local=5, kv_start=s) for s in (near, near * 0 + start))
    assert same(a, b)


@pytest.mark.gpu
def test_a_shape_on_a_gpu(gpu):
    want = headstart.a_shape_index(700, 900, sink=64, local=200, device="cpu")
    got = headstart.a_shape_index(700, 900, sink=64, local=200, device="cuda")
    assert got.block_index.is_cuda and torch.equal(got.to_mask(700, 900).cpu(), want.to_mask(700, 900))

"""All operators under torch.compile, in CUDA graphs and on side streams."""

from __future__ import annotations

import pytest
import torch

import headstart
from backends import expect_same_when_replayed
from judges.prefill_index import tensors
from shapes import Shape

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
BUILDERS = {
    "vertical_slash": lambda q, k: headstart.vertical_slash_index(q, k, 60, 256),
    "block_topk": lambda q, k: headstart.block_topk_index(q, k, 4),
    "adaptive": lambda q, k: headstart.adaptive_block_index(q, k, threshold=0.9, stride=8),
    "adaptive, sampled": lambda q, k: headstart.adaptive_block_index(q, k, threshold=0.9, stride=16, samples=4),
}


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS.keys())
def test_compiles_whole_with_dynamic_shapes(builder):
    def step(q, k, v):
        index = builder(q, k)
        out, lse = headstart.sparse_attention(q * 1.0, k, v, index)
        return headstart.merge_attention(out, lse, out, lse)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (512, 640):
        q, k, v = torch.randn(3, 1, 4, n, 64, dtype=torch.float16, device="cuda").unbind()
        for got, want in zip(compiled(q, k, v), step(q, k, v)):
            torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS.keys())
def test_prefill_in_a_cuda_graph(builder):
    q, k, v = (torch.randn(1, 4, 700, 64, dtype=torch.float16, device="cuda") for _ in range(3))

    def step():
        index = builder(q, k)
        return (*tensors(index), *headstart.sparse_attention(q, k, v, index))

    def change():
        for x in (q, k, v):
            x.normal_()

    expect_same_when_replayed(step, change)


def test_cuda_graph():
    q, k, v = (torch.randn(1, 4, 512, 128, dtype=torch.float16, device="cuda") for _ in range(3))
    index = Shape(1, 4, 4, 512, 512, 128, heads_index=4, columns="own").random_index().to("cuda")

    def step():
        out, lse = headstart.sparse_attention(q, k, v, index)
        return headstart.merge_attention(out, lse, out * 0.5, lse - 1)

    def change():
        for x in (q, k, v):
            x.normal_()
        index.block_count.random_(0, 3)

    expect_same_when_replayed(step, change)


def test_side_streams():
    # The work must be ordered on the current stream, not on the default one.
    stream = torch.cuda.Stream()
    q = torch.zeros(1, 4, 4096, 128, device="cuda")
    lse = torch.zeros(1, 4, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        q.fill_(3)
        out, _ = headstart.merge_attention(q, lse, q, lse)
    stream.synchronize()
    assert (out == 3).all()

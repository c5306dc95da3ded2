"""Centroid lookup on a GPU: the CUDA kernels and Triton's, by the judge of the CPU."""

from __future__ import annotations

import pytest
import torch

import centroid_judge
import headstart
from headstart import _library
from headstart.reference import centroid_lookup as centroid_reference
from on_a_gpu import DTYPES, as_mask, cuda_kernel, expect_no_wait, expect_same_when_replayed, on_the_gpu, tokens

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def lookup(request, monkeypatch):
    """The operator of the centroid judge, from the CUDA library and on Triton."""
    run = {"cuda": cuda_kernel, "triton": _library.triton_kernels.get}[request.param]("centroid_lookup")

    def call(*args, **options):
        options = {name: on_the_gpu(x) for name, x in options.items()}
        return [x.cpu() for x in run(*(on_the_gpu(x) for x in args), **options)]

    monkeypatch.setattr(centroid_judge, "OP", centroid_judge.cleaned(call))
    return run


@centroid_judge.by_case
def test_centroid_lookup(lookup, case):
    centroid_judge.check_case(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("nq, parents", [(1, None), (100, 12)])
def test_centroid_lookup_head_dims(lookup, d, dtype, nq, parents):
    centroid_judge.check_case(centroid_judge.Case(1, 2, nq, 150, d, dtype, parents=parents))


@pytest.mark.parametrize("tied", [False, True])
@centroid_judge.by_case
def test_centroid_lookup_with_too_little_room(lookup, case, tied):
    centroid_judge.check_room(case, tied)


@pytest.mark.parametrize("check", ["check_limits", "check_strides", "check_broken_offsets"])
def test_centroid_lookup_on_odd_input(lookup, check):
    getattr(centroid_judge, check)()


def context(clusters: int, heads: int = 2, d: int = 128, parents: int | None = None):
    """Clusters of 0 to 8 keys on the GPU, without the keys."""
    centroids, offsets, level = centroid_judge.random_clusters(
        torch.Generator().manual_seed(0), heads, clusters, d, parents, torch.bfloat16
    )
    order = torch.zeros(heads, int(offsets[:, -1].max()), dtype=torch.int32)
    return headstart.KeyClusters(centroids, offsets, order, *level.values()).to("cuda")


@pytest.mark.parametrize("nq", [1, 700])
@pytest.mark.parametrize("parents", [None, 300])
@pytest.mark.parametrize("room", [None, 2000])
def test_centroid_lookup_at_length(lookup, nq, parents, room):
    clusters = context(20000, parents=parents)
    n = clusters.order.shape[1]
    q = tokens(2, 8, nq, 128, torch.bfloat16)
    level = {}
    if parents is not None:
        parent_threshold = torch.tensor([3.0 / n], device="cuda")
        level = dict(parent_centroids=clusters.parent_centroids, parent_offsets=clusters.parent_offsets)
        level |= dict(parent_threshold=parent_threshold)
    options = dict(scale=128**-0.5, block_q=64, max_columns=room or n, **level)
    args = q, clusters.centroids, clusters.cluster_offsets, torch.tensor([3.0 / n], device="cuda")
    got = lookup(*args, **options)
    for _ in range(3):
        again = lookup(*args, **options)
        used = torch.arange(got[1].shape[-1], device="cuda") < got[0].unsqueeze(-1)
        assert torch.equal(again[0], got[0]) and torch.equal(again[1][used], got[1][used])
    want = centroid_reference.centroid_lookup(*args, **options)
    masks = [as_mask(count.cpu(), index.cpu(), n) for count, index in (got, want)]
    # A near tie with a threshold may fall either way, and with it a parent's children.
    assert float((masks[0] != masks[1]).sum() / masks[1].sum()) < 0.005


@pytest.mark.parametrize("parents", [None, 30])
def test_centroid_lookup_waits_for_nothing(parents):
    clusters = context(500, parents=parents)
    q = torch.randn(2, 4, 130, 128, dtype=torch.bfloat16, device="cuda")
    given = {} if parents is None else dict(parent_threshold=torch.tensor([1e-3], device="cuda"))

    def step():
        threshold = torch.full((1,), 1e-3, device="cuda")
        count, index = headstart.centroid_lookup(q, clusters, threshold, max_columns=700, **given)
        return count, index.masked_fill(torch.arange(700, device="cuda") >= count.unsqueeze(-1), 0)

    expect_no_wait(step)
    expect_same_when_replayed(step, q.normal_)


def test_centroid_lookup_compiles_whole():
    clusters = context(300)

    def step(q):
        return headstart.centroid_lookup(q * 1.0, clusters, 1e-3)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for nq in (1, 100, 170):
        q = torch.randn(1, 4, nq, 128, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(q), step(q))

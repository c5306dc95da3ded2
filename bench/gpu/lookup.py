"""centroid_lookup on a GPU: contexts of 32K and 128K keys, a twentieth as many clusters, with and without parents."""

from __future__ import annotations

import math

import torch

from attention import HEADS, KV_HEADS
from clock import Clock, Results, expect_right
from headstart.reference import centroid_lookup as reference

CASES = tuple((n, nq, parents) for n in (32768, 131072) for nq in (1, 2048) for parents in (False, True))
BLOCK = 64


def lookup(clock: Clock, results: Results, n: int, nq: int, parents: bool, d: int = 128) -> None:
    def level(count, runs):
        """`count` centroids a head, each of a run of as many of the `runs` below."""
        offsets = torch.arange(count + 1, device="cuda") * runs // count
        centroids = torch.randn(KV_HEADS, count, d, dtype=torch.bfloat16, device="cuda")
        return centroids, offsets.int().expand(KV_HEADS, -1).contiguous()

    clusters = n // 20
    centroids, offsets = level(clusters, n)
    q = torch.randn(1, HEADS, nq, d, dtype=torch.bfloat16, device="cuda")
    given = dict(scale=d**-0.5, block_q=BLOCK, max_columns=n)
    # Logits are normal with deviation 1, so a logit of x scores e^(x - 1/2) / n. A row keeps what one of its 4 or 256
    # query vectors keeps: about a twentieth of the clusters, and of parents a third to a half.
    above, parent_above = (2.25, 1.3) if nq == 1 else (3.5, 2.8)
    threshold, parent_threshold = (torch.tensor([math.exp(x - 0.5) / n], device="cuda") for x in (above, parent_above))
    if parents:
        parent_centroids, parent_offsets = level(n // 100, clusters)
        given |= dict(parent_centroids=parent_centroids, parent_offsets=parent_offsets)
        given |= dict(parent_threshold=parent_threshold)
    args = q, centroids, offsets, threshold
    case = {"keys": n, "queries": nq, "head_dim": d, "parents": parents}
    count, _ = torch.ops.headstart.centroid_lookup(*args, **given)
    want, _ = reference.centroid_lookup(*args, **given)
    error = float((count - want).abs().sum() / want.sum())
    expect_right("centroid_lookup", case, error, 0.01)
    ms = clock.cold(
        {
            "torch": lambda: reference.centroid_lookup(*args, **given),
            "headstart": lambda: torch.ops.headstart.centroid_lookup(*args, **given),
        }
    )
    figures = {"kept": float(want.sum()) / (want.numel() * n)}
    if not parents:  # with them, what is multiplied depends on the data
        figures |= {"tflops": 4 * HEADS * nq * clusters * d / ms["headstart"] / 1e9}
        figures |= {"gbps": centroids.nbytes / ms["headstart"] / 1e6}
    results.add("centroid_lookup", case, ms, **figures)

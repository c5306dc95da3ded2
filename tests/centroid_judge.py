"""What every GPU kernel of `centroid_lookup` must pass, against a float64 oracle. A test sets `OP` to the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from headstart.reference import centroid_lookup as reference
from triton_testing import surrounded

OP: Callable = torch.ops.headstart.centroid_lookup.default
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


# --- the oracle ---


def offsets_of(sizes):
    """Sizes [Hkv][C] to offsets int32 [Hkv, C + 1]."""
    sizes = torch.tensor(sizes)
    return torch.nn.functional.pad(sizes.cumsum(1), (1, 0)).to(torch.int32)


def random_clusters(generator, hkv, c, d, parents=None, dtype=torch.float32):
    sizes = torch.randint(0, 9, (hkv, c), generator=generator)
    sizes[:, 0] += 1
    level = {}
    if parents is not None:
        cuts = torch.randint(0, c + 1, (hkv, parents - 1), generator=generator).sort(-1).values
        bounds = torch.cat([torch.zeros(hkv, 1), cuts, torch.full((hkv, 1), c)], 1).to(torch.int32)
        level = {
            "parent_centroids": torch.randn(hkv, parents, d, generator=generator).to(dtype),
            "parent_offsets": bounds,
        }
    return torch.randn(hkv, c, d, generator=generator).to(dtype), offsets_of(sizes.tolist()), level


def oracle(q, centroids, offsets, threshold, *, scale, block_q, parents=None, margin=0.0):
    """Sets of kept clusters by (batch, head, row), in float64; also those within `margin` (log) of a threshold."""
    b, hq, nq, _ = q.shape
    hkv, c, _ = centroids.shape
    group = hq // hkv
    thresholds = [float(threshold[h * len(threshold) // hq]) for h in range(hq)]
    kept, doubtful = {}, {}

    def scores(vector, centres, sizes, allowed):
        logit = (centres.double() @ vector.double()) * scale
        live = [j for j in range(len(sizes)) if sizes[j] > 0 and j in allowed]
        total = torch.logsumexp(torch.stack([logit[j] + math.log(sizes[j]) for j in live]), 0) if live else 0
        return {j: float(logit[j] - total) for j in live}

    def level(row_of, centres, sizes, allowed, limits):
        chosen, close = set(), set()
        for h, vector in row_of:
            limit = math.log(limits[h]) if limits[h] > 0 else -math.inf
            for j, value in scores(vector, centres, sizes, allowed).items():
                chosen |= {j} if value > limit else set()
                close |= {j} if abs(value - limit) <= margin else set()
        return chosen, close

    for bi in range(b):
        for head in range(hkv):
            bounds = offsets[head].tolist()
            sizes = [bounds[j + 1] - bounds[j] for j in range(c)]
            for r in range(-(-nq // block_q)):
                queries = range(r * block_q, min((r + 1) * block_q, nq))
                row = [(h, q[bi, h, i]) for h in range(head * group, (head + 1) * group) for i in queries]
                allowed, close_parents = set(range(c)), set()
                if parents is not None:
                    centres, spans, limit = parents
                    spans = spans[head].tolist()
                    weights = [bounds[spans[p + 1]] - bounds[spans[p]] for p in range(len(spans) - 1)]
                    chosen, close_parents = level(
                        row, centres[head], weights, set(range(len(weights))), [float(limit)] * hq
                    )
                    allowed = {j for p in chosen for j in range(spans[p], spans[p + 1])}
                kept[bi, head, r], doubtful[bi, head, r] = level(row, centroids[head], sizes, allowed, thresholds)
                if close_parents:  # which children are scored at all, and their sum, may fall either way
                    doubtful[bi, head, r] = set(range(c))
    return kept, doubtful


def columns_of(clusters, offsets):
    bounds = offsets.tolist()
    return sorted(i for j in clusters for i in range(bounds[j], bounds[j + 1]))


def check(q, centroids, offsets, threshold, *, block_q, scale=0.3, level=None, parent_threshold=None):
    level = level or {}
    n = int(offsets[:, -1].max())
    if level:
        level = level | {"parent_threshold": torch.tensor([parent_threshold])}
    count, index = OP(q, centroids, offsets, threshold, scale=scale, block_q=block_q, max_columns=n, **level)
    parents = (level["parent_centroids"], level["parent_offsets"], parent_threshold) if level else None
    kept, doubtful = oracle(
        q, centroids, offsets, threshold, scale=scale, block_q=block_q, parents=parents, margin=1e-4
    )
    assert count.dtype == index.dtype == torch.int32
    assert count.shape == (q.shape[0], len(centroids), -(-q.shape[2] // block_q)) and index.shape == (*count.shape, n)
    for (b, h, r), clusters in kept.items():
        used = int(count[b, h, r])
        got = index[b, h, r, :used].tolist()
        unsure = set(columns_of(doubtful[b, h, r], offsets[h]))
        assert got == sorted(set(got)) and set(got) - unsure == set(columns_of(clusters, offsets[h])) - unsure
        assert not index[b, h, r, used:].any()
    return count


# --- what it judges ---


class Case(NamedTuple):
    heads_kv: int
    group: int
    nq: int
    clusters: int
    head_dim: int
    dtype: torch.dtype = FLOAT32
    block_q: int = 64
    parents: int | None = None
    batch: int = 1

    def inputs(self, seed: int = 0):
        """q and centroids between NaN, offsets, and the parents."""
        generator = torch.Generator().manual_seed(seed)
        centroids, offsets, level = random_clusters(
            generator, self.heads_kv, self.clusters, self.head_dim, self.parents, self.dtype
        )
        around = surrounded(1, self.heads_kv, self.clusters, self.head_dim, dtype=self.dtype)[0]
        q = surrounded(self.batch, self.heads_kv * self.group, self.nq, self.head_dim, dtype=self.dtype)
        q.copy_(torch.randn(q.shape, generator=generator))
        return q, around.copy_(centroids), offsets, level


CASES = {
    "decode, grouped heads": Case(2, 4, 1, 150, 64, FLOAT16),
    "decode, two sequences": Case(2, 1, 1, 70, 128, BFLOAT16, batch=2),
    "a few queries, small blocks": Case(1, 3, 5, 70, 24, FLOAT32, block_q=4),
    "blocks of 64, nothing divides": Case(1, 2, 130, 90, 72, BFLOAT16),
    "float32, several tiles of queries": Case(1, 2, 70, 65, 40, FLOAT32),
    "one block for all": Case(1, 1, 40, 33, 16, FLOAT16, block_q=10**6),
    "head dim 8": Case(1, 2, 3, 20, 8, FLOAT16, block_q=1),
    "head dim 256": Case(1, 2, 33, 70, 256, BFLOAT16, block_q=128),
    "one cluster": Case(2, 1, 2, 1, 8),
    "parents, decode": Case(2, 2, 1, 200, 32, FLOAT32, parents=19),
    "parents, blocks": Case(1, 2, 66, 150, 16, FLOAT16, parents=9, batch=2),
    "parents, small blocks": Case(1, 1, 9, 40, 72, BFLOAT16, block_q=4, parents=30),
    "one parent": Case(1, 2, 2, 30, 8, FLOAT32, parents=1),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def cleaned(run: Callable) -> Callable:
    """The operator with 0 in place of what stands past a row's count, which is nobody's business."""

    def op(*args, **options):
        count, index = run(*args, **options)
        assert ((count >= 0) & (count <= index.shape[-1])).all()
        past = torch.arange(index.shape[-1], device=index.device) >= count.unsqueeze(-1)
        return count, index.masked_fill(past, 0)

    return op


def check_case(case: Case):
    """Thresholds of one value, one a KV head and one a query head, in turns with the head dim."""
    q, centroids, offsets, level = case.inputs()
    scale = 0.8 * case.head_dim**-0.5
    sizes = sorted({1, case.heads_kv, case.heads_kv * case.group})
    for size in sizes if case.nq == 1 else sizes[-1:]:
        threshold = torch.rand(size) * 0.5 / case.clusters
        parent_threshold = 0.2 / case.clusters if level else None
        options = dict(scale=scale, block_q=case.block_q, level=level, parent_threshold=parent_threshold)
        count = check(q, centroids, offsets, threshold, **options)
        assert int(count.sum()) > 0


def check_room(case: Case, tied: bool, shares=(0.0, 0.01, 0.1, 0.35, 0.99)):
    """With room for such shares of the keys the choice is the float64 reference's, clusters that tie or not."""
    q, centroids, offsets, level = case.inputs(seed=1)
    if tied:
        centroids[:, 1::2] = centroids[:, : 2 * (case.clusters // 2) : 2]
    most = int(offsets[:, -1].max())
    for room in (int(share * most) for share in shares):
        threshold = torch.rand(1) * 0.3 / case.clusters
        options = dict(scale=0.7 * case.head_dim**-0.5, block_q=case.block_q, max_columns=room)
        if level:
            options |= level | {"parent_threshold": torch.tensor(0.2 / case.clusters)}
        wide = options | {name: x.double() for name, x in options.items() if name == "parent_centroids"}
        want = reference.centroid_lookup(q.double(), centroids.double(), offsets, threshold, **wide)
        got = OP(q, centroids, offsets, threshold, **options)
        assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])


def check_large_logits_and_empty_clusters():
    # Logits of +-150 overflow exp in float32 without the maximum; cluster 3 is empty and would win.
    centroids = torch.zeros(1, 4, 8)
    centroids[0, :, 0] = torch.tensor([150.0, -150.0, 149.0, 400.0])
    offsets = offsets_of([[2, 3, 4, 0]])
    q = torch.zeros(1, 1, 2, 8)
    q[0, 0, :, 0] = torch.tensor([1.0, -1.0])
    run = dict(scale=1.0, block_q=1, max_columns=9)
    count, index = OP(q, centroids, offsets, torch.tensor([0.05]), **run)
    assert count.tolist() == [[[6, 3]]]
    assert index[0, 0, 0, :6].tolist() == [0, 1, 5, 6, 7, 8] and index[0, 0, 1, :3].tolist() == [2, 3, 4]
    # In the linear domain exp(-300) is 0 and would not exceed 0; here every key is kept.
    assert OP(q, centroids, offsets, torch.tensor([0.0]), **run)[0].tolist() == [[[9, 9]]]
    assert OP(q, centroids, offsets, torch.tensor([1.0]), **run)[0].tolist() == [[[0, 0]]]
    empty = torch.zeros_like(offsets)
    assert OP(q, centroids, empty, torch.tensor([0.0]), **run)[0].tolist() == [[[0, 0]]]


def check_capacity_keeps_the_best_and_cuts_the_last():
    centroids = torch.zeros(1, 4, 8)
    centroids[0, :, 0] = torch.tensor([1.0, 3.0, 2.0, 0.0])
    offsets = offsets_of([[4, 3, 5, 2]])
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1
    for room, want in [(3, [4, 5, 6]), (5, [4, 5, 6, 7, 8]), (9, [0, *range(4, 12)]), (0, []), (99, list(range(14)))]:
        count, index = OP(q, centroids, offsets, torch.tensor([0.0]), scale=1.0, block_q=64, max_columns=room)
        assert index.shape[-1] == room and index[0, 0, 0, : int(count)].tolist() == want


def check_limits():
    """Logits of ±150, empty clusters, thresholds of 0, 1 and NaN, rows and clusters of NaN, room for nothing."""
    check_large_logits_and_empty_clusters()
    check_capacity_keeps_the_best_and_cuts_the_last()
    q, centroids, offsets, level = Case(1, 2, 5, 40, 16, parents=6).inputs()
    n = int(offsets[0, -1])
    options = dict(scale=0.3, block_q=2, max_columns=n)
    nan = torch.tensor([math.nan])
    assert (OP(q, centroids, offsets, nan, **options)[0] == n).all()
    both = OP(q, centroids, offsets, nan, **options, **level, parent_threshold=nan)
    assert (both[0] == n).all() and torch.equal(both[1][0, 0, 0].cpu(), torch.arange(n, dtype=torch.int32))
    none = OP(q, centroids, offsets, torch.ones(1), **options, **level, parent_threshold=torch.ones(1))
    assert not none[0].any()
    q[0, 1, 3] = math.nan  # of the second row alone
    want = OP(q, centroids, offsets, torch.ones(2), **options)[0]
    assert want.tolist() == [[[0, n, 0]]]


def check_strides():
    q, centroids, offsets, level = Case(2, 2, 9, 50, 24, FLOAT16, parents=7, batch=2).inputs()
    parent_centroids, parent_offsets = level["parent_centroids"], level["parent_offsets"]
    threshold = torch.rand(4) * 0.01
    options = dict(scale=0.2, block_q=9, max_columns=120, parent_threshold=torch.tensor(0.05))
    expected = OP(q, centroids, offsets, threshold, **options, **level)

    def odd(x):
        return torch.full((*x.shape[:-1], 25), math.nan, dtype=x.dtype)[..., 1:].copy_(x)

    turned = q.transpose(1, 2).contiguous().transpose(1, 2), centroids.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.stack([threshold, -threshold], 1)[:, 0]
    offsets, parent_offsets = (torch.stack([x, -x], 2)[..., 0] for x in (offsets, parent_offsets))
    for tensors in (turned, (odd(q), odd(centroids))):
        got = OP(
            tensors[0],
            tensors[1],
            offsets,
            wide,
            parent_centroids=odd(parent_centroids),
            parent_offsets=parent_offsets,
            **options,
        )
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def check_broken_offsets(highs=(60, 2**31 - 1)):
    """On a GPU nobody reads the offsets before the kernels do: nothing may be touched that is not there."""
    q, centroids, offsets, level = Case(2, 1, 2, 40, 8, parents=6).inputs()
    for high in highs:
        broken = torch.randint(-high, high, offsets.shape).int()
        children = torch.randint(-high, high, level["parent_offsets"].shape).int()
        for cluster_offsets, parent_offsets in ((broken, level["parent_offsets"]), (offsets, children)):
            OP(
                q,
                centroids,
                cluster_offsets,
                torch.tensor([0.0]),
                scale=0.3,
                block_q=2,
                max_columns=100,
                parent_centroids=level["parent_centroids"],
                parent_offsets=parent_offsets,
                parent_threshold=torch.tensor([0.0]),
            )

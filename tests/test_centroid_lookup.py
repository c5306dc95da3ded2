"""Centroid lookup, as the reference and as every tier computes it, against a float64 oracle; and the clustering."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart import _library
from headstart.ops.centroid_lookup import KeyClusters, centroid_lookup
from headstart.ops.sparse_attention import BlockIndex, sparse_attention
from shapes import DTYPES

OP = torch.ops.headstart.centroid_lookup.default
REFERENCE = functools.partial(OP._op_dk, torch._C.DispatchKey.CompositeExplicitAutograd)
INF, NAN = math.inf, math.nan
MARGIN = 1e-4  # of ln score: nearer to a threshold than this, a cluster may be kept or not


@pytest.fixture(params=["reference", *_library.cpu_tiers()])
def lookup(request):
    """The operator, once as the reference and once in every instruction-set tier."""
    if request.param == "reference":
        yield REFERENCE
        return
    before = _library.cpu_tier()
    _library.set_cpu_tier(request.param)
    yield OP
    _library.set_cpu_tier(before)


def offsets_of(sizes):
    """Sizes [Hkv][C] to offsets int32 [Hkv, C + 1]."""
    sizes = torch.as_tensor(sizes)
    return torch.nn.functional.pad(sizes.cumsum(1), (1, 0)).to(torch.int32)


# --- the truth -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """q [batch, heads_kv * group, nq, d] looked up in `clusters` clusters a KV head, a share of them empty."""

    batch: int
    heads_kv: int
    group: int
    nq: int
    d: int
    clusters: int
    block_q: int = 64
    parents: int = 0
    share: float = 2.0  # the threshold, in shares of an average key
    sharpness: float = 2.0  # the logits' standard deviation
    max_columns: int | None = None

    def __str__(self) -> str:
        name = f"b{self.batch}-h{self.heads_kv}x{self.group}-n{self.nq}-d{self.d}-c{self.clusters}-bl{self.block_q}"
        name += f"-p{self.parents}" if self.parents else ""
        return name + (f"-max{self.max_columns}" if self.max_columns is not None else "")

    def make(self, dtype=torch.float32, seed=0) -> dict:
        """The operator's arguments."""
        generator = torch.Generator().manual_seed(seed)
        normal = functools.partial(torch.randn, generator=generator)
        heads, c, p = self.heads_kv, self.clusters, self.parents
        sizes = torch.randint(0, 9, (heads, c), generator=generator)
        sizes[:, 0] += 1
        offsets = offsets_of(sizes)
        made = dict(
            q=normal(self.batch, heads * self.group, self.nq, self.d).to(dtype),
            centroids=normal(heads, c, self.d).to(dtype),
            cluster_offsets=offsets,
            threshold=torch.tensor([self.share]) / int(offsets[0, -1]),
            scale=self.sharpness / math.sqrt(self.d),
            block_q=self.block_q,
            max_columns=int(offsets[:, -1].max()) if self.max_columns is None else self.max_columns,
        )
        if p:
            cuts = torch.randint(0, c + 1, (heads, p - 1), generator=generator).sort(-1).values
            made["parent_offsets"] = torch.cat([torch.zeros(heads, 1), cuts, torch.full((heads, 1), c)], 1).int()
            made["parent_centroids"] = normal(heads, p, self.d).to(dtype)
            made["parent_threshold"] = made["threshold"].clone()
        return made


@dataclass(frozen=True)
class Truth:
    """Of one row of one KV head, in float64: what it keeps, how well it scores, and what may fall either way."""

    kept: torch.Tensor  # bool [C]
    best: torch.Tensor  # ln of the best score over the row's queries
    doubtful: torch.Tensor  # bool [C]


def oracle(a: dict) -> dict[tuple[int, int, int], Truth]:
    """By (batch, KV head, row of blocks)."""
    q, centroids, offsets = a["q"].double(), a["centroids"].double(), a["cluster_offsets"].long()
    b, hq, nq, _ = q.shape
    heads, c, _ = centroids.shape
    group, block = hq // heads, a["block_q"]

    def limits(threshold: torch.Tensor) -> torch.Tensor:
        each = threshold.reshape(-1).repeat_interleave(hq // threshold.numel())
        return each.double().clamp(min=0).log()

    def level(queries, centres, sizes, allowed, limit):
        """queries [group, n, D], limit [group]"""
        live = allowed & (sizes > 0)
        logits = queries @ centres.T * a["scale"]
        weighted = (logits + sizes.clamp(min=1).double().log()).masked_fill(~live, -INF)
        score = (logits - weighted.logsumexp(-1, keepdim=True)).masked_fill(~live, -INF)
        over = score - limit[:, None, None]
        kept = live & (score > limit[:, None, None])
        best = score.masked_fill(~kept, -INF).amax((0, 1))
        return Truth(kept.any(1).any(0), best, (over.abs() <= MARGIN).any(1).any(0) & live)

    found = {}
    for i in range(b):
        for head in range(heads):
            of_head = slice(head * group, (head + 1) * group)
            sizes = offsets[head].diff()
            for row in range(-(-nq // block)):
                queries = q[i, of_head, row * block : (row + 1) * block]
                allowed, parents = torch.ones(c, dtype=torch.bool), None
                if "parent_offsets" in a:
                    spans = a["parent_offsets"][head].long()
                    of_parents = limits(a["parent_threshold"])[of_head]
                    weights = offsets[head][spans].diff()
                    everyone = torch.ones(len(weights), dtype=torch.bool)
                    parents = level(queries, a["parent_centroids"][head].double(), weights, everyone, of_parents)
                    allowed = parents.kept.repeat_interleave(spans.diff())
                truth = level(queries, centroids[head], sizes, allowed, limits(a["threshold"])[of_head])
                if parents is not None and parents.doubtful.any():
                    # Which children are scored at all, and so their sum, may fall either way.
                    truth = replace(truth, doubtful=sizes > 0)
                found[i, head, row] = truth
    return found


def check(lookup, a: dict) -> torch.Tensor:
    """Runs the operator and judges every row; returns the counts."""
    count, index = lookup(**a)
    offsets, room = a["cluster_offsets"], a["max_columns"]
    b, heads = a["q"].shape[0], len(offsets)
    assert count.dtype == index.dtype == torch.int32
    assert count.shape == (b, heads, -(-a["q"].shape[2] // a["block_q"])) and index.shape == (*count.shape, room)
    for (i, head, row), truth in oracle(a).items():
        sizes = offsets[head].diff().long()
        used = int(count[i, head, row])
        assert 0 <= used <= room
        got = index[i, head, row, :used].long()
        assert (got.diff() > 0).all(), "not ascending"
        assert used == 0 or (0 <= int(got[0]) and int(got[-1]) < int(offsets[head, -1])), "outside the keys"
        of_key = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        taken = torch.bincount(of_key[got], minlength=len(sizes))
        starts = offsets[head, :-1].long()[of_key[got]]
        assert ((got - starts) < taken[of_key[got]]).all(), "not the first keys of a cluster"
        sure = ~truth.doubtful
        whole = (taken == sizes) & (sizes > 0)
        most, least = (int(sizes[truth.kept | truth.doubtful].sum()), int(sizes[truth.kept & sure].sum()))
        if most <= room:
            assert torch.equal(whole[sure], (truth.kept & (sizes > 0))[sure])
            assert torch.equal(whole, taken > 0), "a cluster was cut that had room"
            continue
        assert not taken[~truth.kept & sure].any(), "took a cluster below the threshold"
        assert used >= min(room, least) and (used == room or truth.doubtful.any())
        cut = (taken > 0) & ~whole
        assert int(cut.sum()) <= 1, "more than one cluster was cut"
        rest = truth.kept & sure & (taken < sizes)
        if rest.any() and not truth.doubtful.all():
            worst_taken = truth.best[(taken > 0) & truth.kept & sure].amin() if (taken > 0).any() else INF
            assert worst_taken >= truth.best[rest].amax() - 2 * MARGIN, "left a better cluster out"
            assert not cut.any() or (truth.best[whole & truth.kept & sure] >= truth.best[cut] - 2 * MARGIN).all()
    return count


def by_case(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


# --- every implementation --------------------------------------------------------------------------------------------

BASE = Case(1, 2, 2, 5, 64, 100)
GROUPS = [replace(BASE, group=g, nq=nq, d=16) for g in range(1, 9) for nq in (1, 3)]
HEAD_DIMS = [replace(BASE, d=d, nq=nq) for d in (8, 64, 72, 80, 128, 256) for nq in (1, 20)]
CLUSTERS = [replace(BASE, clusters=c, nq=nq, d=24) for c in (1, 3, 63, 65, 255, 256, 257, 700) for nq in (2, 40)]
ROWS = [
    replace(BASE, batch=b, group=g, nq=nq, block_q=block, d=16, clusters=300)
    for b, g, nq, block in (
        (4, 4, 1, 64), (17, 1, 1, 64), (5, 3, 1, 1), (80, 4, 1, 64), (2, 8, 130, 64), (1, 5, 200, 128), (3, 2, 33, 7),
        (2, 1, 300, 300), (1, 3, 100, 10**9), (1, 1, 257, 1), (6, 2, 50, 13),
    )
]  # fmt: skip
PARENTS = [
    replace(BASE, batch=b, group=g, nq=nq, block_q=block, clusters=c, parents=p, d=d, share=share)
    for b, g, nq, block, c, p, d, share in (
        (1, 4, 1, 64, 600, 120, 64, 6.0), (3, 2, 1, 64, 600, 1, 80, 0.9), (2, 1, 70, 64, 40, 40, 16, 9.0),
        (1, 8, 70, 64, 300, 60, 128, 20.0), (2, 3, 9, 2, 1000, 300, 8, 6.0), (1, 1, 1, 1, 7, 300, 8, 1.0),
    )
]  # fmt: skip
CAPACITIES = [
    replace(case, max_columns=room)
    for case in (BASE, replace(BASE, nq=1, clusters=600), replace(BASE, nq=70, group=5), PARENTS[0], PARENTS[2])
    for room in (0, 1, 40, 117)
]


@by_case(GROUPS + HEAD_DIMS + CLUSTERS + ROWS + PARENTS + CAPACITIES)
def test_against_oracle(lookup, case):
    check(lookup, case.make())


def test_the_cases_choose():
    """Neither everything nor nothing is kept in most of the cases above."""
    for case in (*GROUPS, *HEAD_DIMS, *PARENTS):
        kept = torch.stack([truth.kept for truth in oracle(case.make()).values()]).double().mean()
        assert 0.005 < kept < 0.95 or case.clusters < 10, f"{case}: {kept}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@by_case([BASE, HEAD_DIMS[5], HEAD_DIMS[7], HEAD_DIMS[10], ROWS[4], PARENTS[0], PARENTS[3], CAPACITIES[7]])
def test_dtypes(lookup, dtype, case):
    count = check(lookup, case.make(dtype))
    assert 0 < int(count.sum())


def test_any_case(lookup):
    sizes = dict(
        batch=st.integers(1, 2),
        heads_kv=st.integers(1, 2),
        group=st.integers(1, 3),
        nq=st.integers(1, 7),
        d=st.sampled_from([8, 24]),
        block_q=st.integers(1, 9),
        clusters=st.integers(1, 12),
        parents=st.sampled_from([0, 1, 3]),
        share=st.floats(0, 4),
        max_columns=st.none() | st.integers(0, 30),
    )

    @settings(max_examples=25, deadline=None)
    @given(st.builds(Case, **sizes), st.integers(0, 10**6))
    def run(case, seed):
        check(lookup, case.make(seed=seed))

    run()


@pytest.mark.parametrize("values", ["head", "KV head", "one", "scalar"])
def test_thresholds_of_heads(lookup, values):
    a = replace(PARENTS[0], heads_kv=3, group=4, nq=3).make()
    shape = {"head": (12,), "KV head": (3,), "one": (1,), "scalar": ()}[values]
    for name in ("threshold", "parent_threshold"):
        spread = torch.rand(shape) * 3 * a[name].reshape(())
        a[name] = spread if spread.dim() == 0 else torch.stack([spread, -spread], 1)[:, 0]  # any stride
    assert check(lookup, a).sum() > 0
    a["threshold"] = torch.full(shape, -1.0)
    assert check(lookup, a).sum() > 0


@by_case([BASE, ROWS[4], ROWS[10], PARENTS[0], PARENTS[3], CAPACITIES[7], replace(BASE, heads_kv=1, clusters=700)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_strides_and_threads_do_not_matter(lookup, case, dtype):
    a = case.make(dtype)
    expected = used_of(lookup(**a))
    q, centroids = a["q"], a["centroids"]
    permuted = q.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.full((*q.shape[:3], q.shape[3] + 1), NAN, dtype=dtype)[..., 1:].copy_(q)
    wide = torch.full((*centroids.shape[:2], 2, centroids.shape[2] + 3), NAN, dtype=dtype)[:, :, 1, 3:].copy_(centroids)
    offsets = a["cluster_offsets"].repeat_interleave(2, 1)[:, ::2]
    for change in (dict(q=permuted), dict(q=odd), dict(centroids=wide), dict(cluster_offsets=offsets)):
        assert used_of(lookup(**a | change)) == expected
    one = centroids[:1].expand_as(centroids)
    assert used_of(lookup(**a | dict(centroids=one))) == used_of(lookup(**a | dict(centroids=one.clone())))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            trash = torch.full_like(lookup(**a)[1], -7)
            del trash
            assert used_of(lookup(**a)) == expected, threads
    finally:
        torch.set_num_threads(before)


def used_of(result: tuple[torch.Tensor, torch.Tensor]) -> list[list[int]]:
    """The used entries of every row."""
    count, index = (x.flatten(0, 2) for x in result)
    return [row[:n].tolist() for n, row in zip(count.tolist(), index)]


def test_batch_shares_one_read_of_the_centroids(lookup):
    """A row's selection does not depend on its neighbours, whichever way they are scored together."""
    a = replace(BASE, batch=9, nq=1).make()
    together = used_of(lookup(**a))
    alone = [used_of(lookup(**a | dict(q=a["q"][i : i + 1]))) for i in range(9)]
    unsure = {key for key, truth in oracle(a).items() if truth.doubtful.any()}
    for i in range(9):
        for head in range(2):
            assert (i, head, 0) in unsure or together[i * 2 + head] == alone[i][head]


def test_large_logits_and_empty_clusters(lookup):
    # Logits of +-150 overflow exp in float32 without the maximum; cluster 3 is empty and would win.
    centroids = torch.zeros(1, 4, 8)
    centroids[0, :, 0] = torch.tensor([150.0, -150.0, 149.0, 400.0])
    offsets = offsets_of([[2, 3, 4, 0]])
    for copies in (1, 40):  # few rows, and many
        q = torch.zeros(1, copies, 2, 8)
        q[..., 0] = torch.tensor([1.0, -1.0])
        run = dict(scale=1.0, block_q=1, max_columns=9)
        found = used_of(lookup(q, centroids, offsets, torch.tensor([0.05]), **run))
        assert found == [[0, 1, 5, 6, 7, 8], [2, 3, 4]]
        # In the linear domain exp(-300) is 0 and would not exceed 0; here every key is kept.
        assert lookup(q, centroids, offsets, torch.tensor([0.0]), **run)[0].tolist() == [[[9, 9]]]
        assert lookup(q, centroids, offsets, torch.tensor([1.0]), **run)[0].tolist() == [[[0, 0]]]
        empty = torch.zeros_like(offsets)
        assert lookup(q, centroids, empty, torch.tensor([0.0]), **run)[0].tolist() == [[[0, 0]]]


@pytest.mark.parametrize("nq", [1, 40])
def test_sizes_of_clusters(lookup, nq):
    """One giant cluster; none but one that is not empty; heads of their own sizes."""
    a = replace(BASE, nq=nq, clusters=300).make()
    giant, lonely = torch.zeros(2, 2, 300, dtype=torch.int64)
    giant[:] = 1
    giant[:, 137] = 5_000
    lonely[0, 299] = lonely[1, 0] = 7
    mixed = torch.stack([giant[0], lonely[1]])
    for sizes in (giant, lonely, mixed):
        offsets = offsets_of(sizes)
        for threshold in (0.0, 1e-5, 0.1, 0.2, 1.0):
            change = dict(cluster_offsets=offsets, threshold=torch.tensor([threshold]))
            check(lookup, a | change | dict(max_columns=int(offsets[:, -1].max())))
            check(lookup, a | change | dict(max_columns=100))


def test_heads_that_select_nothing(lookup):
    a = PARENTS[0].make()
    nothing = torch.tensor([2.0])
    assert not lookup(**a | dict(threshold=nothing))[0].any()
    assert not lookup(**a | dict(parent_threshold=nothing))[0].any()
    one_head = torch.tensor([2.0, float(a["threshold"])])
    count = check(lookup, a | dict(parent_threshold=one_head))
    assert not count[:, 0].any() and count[:, 1].all()


def test_no_queries_and_no_room_given(lookup):
    a = BASE.make()
    del a["max_columns"]
    n = int(a["cluster_offsets"][:, -1].max())
    assert lookup(**a)[1].shape == (1, 2, 1, n)
    count, index = lookup(**a | dict(q=a["q"][:, :, :0]))
    assert count.shape == (1, 2, 0) and index.shape == (1, 2, 0, n)


def test_a_query_that_is_not_finite(lookup):
    """NaN scores keep everything rather than nothing, in their own row alone; infinite ones keep the infinite."""
    for nq in (3, 40):
        a = replace(BASE, nq=nq, block_q=1, clusters=300, group=1).make()
        plain = used_of(lookup(**a))
        for value in (NAN, INF, -INF):
            a["q"][0, 1, 2, 3] = value
            found, expected = used_of(lookup(**a)), used_of(REFERENCE(**a))
            assert found[: nq + 2] == plain[: nq + 2] and found[nq + 3 :] == plain[nq + 3 :]
            assert found[nq + 2] == expected[nq + 2]
            if value != value:
                assert len(found[nq + 2]) == int(a["cluster_offsets"][1, -1])


def test_capacity_keeps_the_best_and_cuts_the_last(lookup):
    centroids = torch.zeros(1, 4, 8)
    centroids[0, :, 0] = torch.tensor([1.0, 3.0, 2.0, 0.0])
    offsets = offsets_of([[4, 3, 5, 2]])
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1
    for room, want in [(3, [4, 5, 6]), (5, [4, 5, 6, 7, 8]), (9, [0, *range(4, 12)]), (0, []), (99, list(range(14)))]:
        count, index = lookup(q, centroids, offsets, torch.tensor([0.0]), scale=1.0, block_q=64, max_columns=room)
        assert index.shape[-1] == room and index[0, 0, 0, : int(count)].tolist() == want


@pytest.mark.parametrize("nq", [1, 40])
def test_of_equals_the_first_is_kept(lookup, nq):
    centroids = torch.randint(-2, 3, (1, 5, 16)).repeat(1, 130, 1).float()  # whole numbers: ties are exact
    offsets = offsets_of(torch.full((1, 650), 2))
    q = torch.randint(-2, 3, (1, 1, nq, 16)).float()
    a = dict(q=q, centroids=centroids, cluster_offsets=offsets, threshold=torch.tensor([0.0]), scale=0.25, block_q=64)
    best = (q[0, 0] @ centroids[0, :5].T * 0.25).double()
    best = (best - best.logsumexp(-1, keepdim=True)).amax(0)
    order = sorted(range(650), key=lambda j: (-float(best[j % 5]), j))
    assert best.unique().numel() == 5
    for room in (1, 100, 261, 799):
        want = sorted(2 * j + i for j in order for i in range(2))
        ranked = [2 * j + i for j in order for i in range(2)]
        want = sorted(ranked[:room])
        assert used_of(lookup(**a, max_columns=room)) == [want]


def test_selection_feeds_sparse_attention():
    """Keeping everything is dense attention over the context; a decode step and a block agree in form."""
    torch.manual_seed(0)
    k, v, q = torch.randn(2, 130, 16), torch.randn(2, 130, 16), torch.randn(2, 4, 70, 16)
    clusters = KeyClusters.build(k, 12)
    count, index = centroid_lookup(q, clusters, 0.0)
    assert count.eq(130).all() and index.shape == (2, 2, 2, 130)
    none = torch.zeros(2, 2, 2, dtype=torch.int32), torch.zeros(2, 2, 2, 0, dtype=torch.int32)
    pk, pv = (clusters.permute(x).expand(2, -1, -1, -1) for x in (k, v))
    out, _ = sparse_attention(q, pk, pv, BlockIndex(*none, count, index), causal=False)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 0).expand(2, -1, -1, -1), v.repeat_interleave(2, 0).expand(2, -1, -1, -1)
    )
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)


def test_single_query_of_a_context_finds_its_neighbours():
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(6, 32), dim=-1)
    labels = torch.arange(120) % 6
    k = (directions[labels] * (4 + torch.rand(120, 1)) + 0.02 * torch.randn(120, 32)).unsqueeze(0)
    clusters = KeyClusters.build(k, 6, parents=2)
    q = (directions[2] * 40).expand(1, 1, 1, -1)
    count, index = centroid_lookup(q, clusters, 0.01, parent_threshold=0.001)
    found = clusters.order[0, index[0, 0, 0, : int(count)].long()]
    assert sorted(found.tolist()) == [i for i in range(120) if labels[i] == 2]


@settings(max_examples=25, deadline=None)
@given(hkv=st.integers(1, 3), n=st.integers(1, 60), c=st.integers(1, 12), p=st.integers(0, 4), seed=st.integers(0, 99))
def test_build_invariants(hkv, n, c, p, seed):
    c = min(c, n)
    parents = min(p, c) or None
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(hkv, n, 8, generator=generator).round()  # duplicates and zero keys
    clusters = KeyClusters.build(k, c, seed=seed, parents=parents).validate()
    ordered = clusters.permute(k)
    for h in range(hkv):
        bounds = clusters.cluster_offsets[h].tolist()
        for j in range(c):
            mean = ordered[h, bounds[j] : bounds[j + 1]].sum(0) / max(1, bounds[j + 1] - bounds[j])
            torch.testing.assert_close(clusters.centroids[h, j], mean, rtol=1e-4, atol=1e-5)
            run = clusters.order[h, bounds[j] : bounds[j + 1]]
            assert (run.diff() > 0).all()
        for child in range(parents or 0):
            first, last = (bounds[i] for i in clusters.parent_offsets[h, child : child + 2].tolist())
            mean = ordered[h, first:last].sum(0) / max(1, last - first)
            torch.testing.assert_close(clusters.parent_centroids[h, child], mean, rtol=1e-4, atol=1e-5)
    again = KeyClusters.build(k, c, seed=seed, parents=parents)
    assert torch.equal(clusters.order, again.order) and torch.equal(clusters.centroids, again.centroids)


def test_clustering_finds_planted_directions():
    torch.manual_seed(1)
    planted = torch.nn.functional.normalize(torch.randn(2, 40, 64), dim=-1)
    labels = torch.arange(2000) % 40
    x = torch.nn.functional.normalize(planted[:, labels] + 0.05 * torch.randn(2, 2000, 64), dim=-1)
    clusters = KeyClusters.build(x * (1 + torch.rand(2, 2000, 1)), 40)
    of_key = torch.repeat_interleave(torch.arange(40).repeat(2), clusters.cluster_offsets.diff().flatten())
    centres = torch.nn.functional.normalize(clusters.centroids, dim=-1)
    fit = (clusters.permute(x) * centres.gather(1, of_key.view(2, -1, 1).expand(-1, -1, 64))).sum(-1)
    # Exact k-means++ with one draw a round reaches 0.885 to 0.901 by seed, a uniform start 0.865 to 0.883.
    assert fit.mean() > 0.885


# --- the contract ----------------------------------------------------------------------------------------------------


def sample(dtype=torch.float32, nq=5) -> dict:
    """Everything is kept, so that no entry is unspecified and results can be compared as a whole."""
    a = Case(1, 2, 2, nq, 16, 20, block_q=3, parents=3, max_columns=7).make(dtype)
    return a | dict(threshold=torch.tensor([0.0]), parent_threshold=torch.tensor(0.0))


def without_parents(a: dict) -> dict:
    return {name: value for name, value in a.items() if not name.startswith("parent")}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(dtype, permuted):
    a = sample(dtype)
    if permuted:
        a["q"] = a["q"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(OP, (), a)
    torch.library.opcheck(OP, (), without_parents(a))


def test_compile_dynamic():
    a = without_parents(sample())
    del a["max_columns"], a["q"]

    def run(q, offsets):
        return OP(**a | dict(q=q, cluster_offsets=offsets), max_columns=offsets.shape[1] * 2)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for nq in (5, 11):
        q = torch.randn(1, 4, nq, 16)
        for got, want in zip(compiled(q, a["cluster_offsets"]), run(q, a["cluster_offsets"]), strict=True):
            assert torch.equal(got, want)
    clusters = KeyClusters.build(torch.randn(2, 30, 16), 6)
    torch.compile(lambda q: centroid_lookup(q, clusters, 0.1), fullgraph=True, backend="aot_eager")(q)


BAD = [
    (lambda a: a.update(q=a["q"].double()), "q"),
    (lambda a: a.update(q=a["q"][0]), "q"),
    (lambda a: a.update(q=a["q"][..., :12]), "q"),
    (lambda a: a.update(q=a["q"].mT.contiguous().mT), "q"),
    (lambda a: a.update(q=a["q"][:, :3]), "centroids"),
    (lambda a: a.update(centroids=a["centroids"].half()), "centroids"),
    (lambda a: a.update(centroids=a["centroids"][:, :0]), "centroids"),
    (lambda a: a.update(centroids=a["centroids"].mT.contiguous().mT), "centroids"),
    (lambda a: a.update(centroids=a["centroids"].to("meta")), "centroids"),
    (lambda a: a.update(cluster_offsets=a["cluster_offsets"].long()), "cluster_offsets"),
    (lambda a: a.update(cluster_offsets=a["cluster_offsets"][:, :-1]), "cluster_offsets"),
    (lambda a: a.update(cluster_offsets=a["cluster_offsets"].flip(1)), "cluster_offsets"),
    (lambda a: a.update(threshold=torch.tensor([NAN])), "threshold"),
    (lambda a: a.update(threshold=torch.zeros(3)), "threshold"),
    (lambda a: a.update(threshold=torch.zeros(1, 1)), "threshold"),
    (lambda a: a.update(threshold=torch.tensor(0)), "threshold"),
    (lambda a: a.update(threshold=torch.zeros(1, device="meta")), "threshold"),
    (lambda a: a.update(parent_offsets=None), "parent_offsets"),
    (lambda a: a.update(parent_centroids=None), "parent_centroids"),
    (lambda a: a.update(parent_centroids=a["parent_centroids"][0]), "parent_centroids"),
    (lambda a: a.update(parent_centroids=a["parent_centroids"][:, :0]), "parent_centroids"),
    (lambda a: a.update(parent_offsets=a["parent_offsets"] + 1), "parent_offsets"),
    (lambda a: a.update(parent_offsets=a["parent_offsets"] // 2), "parent_offsets"),
    (lambda a: a.update(parent_threshold=None), "parent_threshold"),
    (lambda a: a.update(parent_threshold=torch.tensor(NAN)), "parent_threshold"),
    (lambda a: a.update(parent_centroids=None, parent_offsets=None), "parent_threshold"),
    (lambda a: a.update(scale=INF), "scale"),
    (lambda a: a.update(block_q=0), "block_q"),
    (lambda a: a.update(max_columns=-1), "max_columns"),
]


@pytest.mark.parametrize(("change", "argument"), BAD)
def test_bad_input_names_the_argument(change, argument):
    """In the same words, whether the kernel or the reference finds it."""
    a = sample()
    change(a)
    words = []
    for lookup in (OP, REFERENCE):
        with pytest.raises(
            (ValueError, RuntimeError), match=f"centroid_lookup: {argument}: expected .*, got "
        ) as caught:
            lookup(**a)
        words.append(str(caught.value).splitlines()[0])
    assert words[0] == words[1]


def test_bad_clusters_name_the_field():
    k = torch.randn(1, 20, 8)
    for n, parents, argument in [(0, None, "num_clusters"), (21, None, "num_clusters"), (4, 5, "parents")]:
        with pytest.raises(ValueError, match=f"KeyClusters.build: {argument}: expected"):
            KeyClusters.build(k, n, parents=parents)
    good = KeyClusters.build(k, 4)
    with pytest.raises(ValueError, match="KeyClusters.validate: order: expected"):
        KeyClusters(good.centroids, good.cluster_offsets, good.order.clamp(max=5)).validate()
    with pytest.raises(ValueError, match="KeyClusters.validate: cluster_offsets: expected"):
        KeyClusters(good.centroids, good.cluster_offsets.flip(1), good.order).validate()
    with pytest.raises((ValueError, RuntimeError), match="centroid_lookup: parent_threshold: expected None"):
        centroid_lookup(torch.randn(1, 1, 1, 8), good, 0.1, parent_threshold=0.1)

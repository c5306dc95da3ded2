"""How centroid_lookup is judged: row by row against float64, and against the reference where rows have too little room.

`op` is the operator under test, with the signature of `torch.ops.headstart.centroid_lookup`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch

from headstart.reference import centroid_lookup as reference

FLOAT32, FLOAT16, BFLOAT16 = DTYPES = torch.float32, torch.float16, torch.bfloat16
MARGIN = 1e-4  # of ln score: nearer to a threshold than this, a cluster may be kept or not
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def by_case(cases: Iterable[Case]):
    return pytest.mark.parametrize("case", list(cases), ids=str)


# --- cases -----------------------------------------------------------------------------------------------------------


def offsets_of(sizes) -> torch.Tensor:
    """Sizes [Hkv][C] to offsets int32 [Hkv, C + 1]."""
    return torch.nn.functional.pad(torch.as_tensor(sizes).cumsum(1), (1, 0)).to(torch.int32)


def surrounded(x: torch.Tensor) -> torch.Tensor:
    """The same rows [..., N, D] between rows of NaN, so that a read outside them shows."""
    n = x.shape[-2]
    whole = x.new_full((*x.shape[:-2], n + 192, x.shape[-1]), math.nan)
    return whole[..., 64 : 64 + n, :].copy_(x)


@dataclass(frozen=True)
class Case:
    """q [batch, heads_kv * group, nq, d] looked up in `clusters` clusters of 0 to 8 keys a KV head."""

    heads_kv: int
    group: int
    nq: int
    clusters: int
    d: int
    dtype: torch.dtype = FLOAT32
    block_q: int = 64
    parents: int = 0
    batch: int = 1
    share: float = 2.0  # the threshold, in shares of an average key
    parent_share: float = 0.8
    sharpness: float = 2.0  # the logits' standard deviation
    max_columns: int | None = None

    def __str__(self) -> str:
        name = f"b{self.batch}-h{self.heads_kv}x{self.group}-n{self.nq}-d{self.d}-c{self.clusters}-bl{self.block_q}"
        name += f"-p{self.parents}" if self.parents else ""
        name += f"-{self.dtype}".replace("torch.", "") if self.dtype != FLOAT32 else ""
        return name + (f"-max{self.max_columns}" if self.max_columns is not None else "")

    def make(self, seed: int = 0) -> dict:
        """The operator's arguments."""
        generator = torch.Generator().manual_seed(seed)
        heads, c, p = self.heads_kv, self.clusters, self.parents

        def rows(*shape: int) -> torch.Tensor:
            return surrounded(torch.randn(*shape, self.d, generator=generator).to(self.dtype))

        sizes = torch.randint(0, 9, (heads, c), generator=generator)
        sizes[:, 0] += 1
        offsets = offsets_of(sizes)
        keys = int(offsets[0, -1])
        made = dict(
            q=rows(self.batch, heads * self.group, self.nq),
            centroids=rows(heads, c),
            cluster_offsets=offsets,
            threshold=torch.tensor([self.share]) / keys,
            scale=self.sharpness / math.sqrt(self.d),
            block_q=self.block_q,
            max_columns=int(offsets[:, -1].max()) if self.max_columns is None else self.max_columns,
        )
        if p:
            cuts = torch.randint(0, c + 1, (heads, p - 1), generator=generator).sort(-1).values
            made["parent_offsets"] = torch.cat([torch.zeros(heads, 1), cuts, torch.full((heads, 1), c)], 1).int()
            made["parent_centroids"] = rows(heads, p)
            made["parent_threshold"] = torch.tensor([self.parent_share]) / keys
        return made


# --- the truth -------------------------------------------------------------------------------------------------------


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
        weighted = (logits + sizes.clamp(min=1).double().log()).masked_fill(~live, -math.inf)
        score = (logits - weighted.logsumexp(-1, keepdim=True)).masked_fill(~live, -math.inf)
        over = score - limit[:, None, None]
        kept = live & (score > limit[:, None, None])
        best = score.masked_fill(~kept, -math.inf).amax((0, 1))
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


# --- checks ----------------------------------------------------------------------------------------------------------


def used_of(result: tuple[torch.Tensor, torch.Tensor]) -> list[list[int]]:
    """The used entries of every row: what stands past a row's count is nobody's business."""
    count, index = (x.flatten(0, 2) for x in result)
    assert ((count >= 0) & (count <= index.shape[-1])).all()
    return [row[:n].tolist() for n, row in zip(count.tolist(), index)]


def check(op: Callable, a: dict) -> torch.Tensor:
    """Runs the operator and judges every row; returns the counts."""
    count, index = op(**a)
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
            worst_taken = truth.best[(taken > 0) & truth.kept & sure].amin() if (taken > 0).any() else math.inf
            assert worst_taken >= truth.best[rest].amax() - 2 * MARGIN, "left a better cluster out"
            assert not cut.any() or (truth.best[whole & truth.kept & sure] >= truth.best[cut] - 2 * MARGIN).all()
    return count


def check_case(op: Callable, case: Case) -> None:
    """Thresholds of one value, one a KV head and one a query head; for several queries of one a query head alone."""
    a = case.make()
    sizes = sorted({1, case.heads_kv, case.heads_kv * case.group})
    for size in sizes if case.nq == 1 else sizes[-1:]:
        assert check(op, a | dict(threshold=torch.rand(size) * a["threshold"])).sum() > 0


def check_room(op: Callable, case: Case, tied: bool, shares=(0.0, 0.01, 0.1, 0.35, 0.99)) -> None:
    """With room for such shares of the keys the choice is the float64 reference's, clusters that tie or not."""
    a = case.make(seed=1)
    if tied:
        a["centroids"][:, 1::2] = a["centroids"][:, : 2 * (case.clusters // 2) : 2]
    for room in (int(share * a["max_columns"]) for share in shares):
        given = a | dict(threshold=0.6 * torch.rand(1) * a["threshold"], max_columns=room)
        wide = {name: x.double() for name, x in given.items() if name in ("q", "centroids", "parent_centroids")}
        want, got = reference.centroid_lookup(**given | wide), op(**given)
        assert got[0].shape == want[0].shape and got[1].shape == want[1].shape and used_of(got) == used_of(want)


def check_strides(op: Callable, case: Case) -> None:
    """The same columns, in every bit, from the same numbers, however they lie in memory."""
    a = case.make()
    want = used_of(op(**a))

    def odd(x: torch.Tensor) -> torch.Tensor:
        return torch.full((*x.shape[:-1], x.shape[-1] + 1), math.nan, dtype=x.dtype)[..., 1:].copy_(x)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)

    def wide(x: torch.Tensor) -> torch.Tensor:
        return torch.full((*x.shape[:-1], 2, x.shape[-1] + 3), math.nan, dtype=x.dtype)[..., 1, 3:].copy_(x)

    apart = {
        name: torch.stack([x, -x], -1)[..., 0]
        for name, x in a.items()
        if name in ("cluster_offsets", "parent_offsets", "threshold", "parent_threshold")
    }
    for of_q, of_centroids, of_parents in ((turned, turned, odd), (odd, odd, wide), (wide, wide, turned)):
        moved = apart | dict(q=of_q(a["q"]), centroids=of_centroids(a["centroids"]))
        if case.parents:
            moved["parent_centroids"] = of_parents(a["parent_centroids"])
        assert used_of(op(**a | moved)) == want
    one = a["centroids"][:1].expand_as(a["centroids"])
    assert used_of(op(**a | dict(centroids=one))) == used_of(op(**a | dict(centroids=one.clone())))


def check_large_logits_and_empty_clusters(op: Callable) -> None:
    # Logits of +-150 overflow exp in float32 without the maximum; cluster 3 is empty and would win.
    centroids = torch.zeros(1, 4, 8)
    centroids[0, :, 0] = torch.tensor([150.0, -150.0, 149.0, 400.0])
    offsets = offsets_of([[2, 3, 4, 0]])
    for copies in (1, 40):  # few rows, and many
        q = torch.zeros(1, copies, 2, 8)
        q[..., 0] = torch.tensor([1.0, -1.0])
        run = dict(scale=1.0, block_q=1, max_columns=9)
        found = used_of(op(q, centroids, offsets, torch.tensor([0.05]), **run))
        assert found == [[0, 1, 5, 6, 7, 8], [2, 3, 4]]
        # In the linear domain exp(-300) is 0 and would not exceed 0; here every key is kept.
        assert op(q, centroids, offsets, torch.tensor([0.0]), **run)[0].tolist() == [[[9, 9]]]
        assert op(q, centroids, offsets, torch.tensor([1.0]), **run)[0].tolist() == [[[0, 0]]]
        empty = torch.zeros_like(offsets)
        assert op(q, centroids, empty, torch.tensor([0.0]), **run)[0].tolist() == [[[0, 0]]]


def check_capacity_keeps_the_best_and_cuts_the_last(op: Callable) -> None:
    centroids = torch.zeros(1, 4, 8)
    centroids[0, :, 0] = torch.tensor([1.0, 3.0, 2.0, 0.0])
    offsets = offsets_of([[4, 3, 5, 2]])
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1
    for room, want in [(3, [4, 5, 6]), (5, [4, 5, 6, 7, 8]), (9, [0, *range(4, 12)]), (0, []), (99, list(range(14)))]:
        result = op(q, centroids, offsets, torch.tensor([0.0]), scale=1.0, block_q=64, max_columns=room)
        assert result[1].shape[-1] == room and used_of(result) == [want]


def check_of_equals_the_first_is_kept(op: Callable, nq: int) -> None:
    centroids = torch.randint(-2, 3, (1, 5, 16)).repeat(1, 130, 1).float()  # whole numbers: ties are exact
    offsets = offsets_of(torch.full((1, 650), 2))
    q = torch.randint(-2, 3, (1, 1, nq, 16)).float()
    a = dict(q=q, centroids=centroids, cluster_offsets=offsets, threshold=torch.tensor([0.0]), scale=0.25, block_q=64)
    best = (q[0, 0] @ centroids[0, :5].T * 0.25).double()
    best = (best - best.logsumexp(-1, keepdim=True)).amax(0)
    order = sorted(range(650), key=lambda j: (-float(best[j % 5]), j))
    assert best.unique().numel() == 5
    ranked = [2 * j + i for j in order for i in range(2)]
    for room in (1, 100, 261, 799):
        assert used_of(op(**a, max_columns=room)) == [sorted(ranked[:room])]


def check_nan_query(op: Callable, case: Case) -> None:
    """NaN scores keep everything rather than nothing, in their own row alone; `case` has a row for every query."""
    a = case.make()
    plain, row = used_of(op(**a)), case.nq + 2
    a["q"][0, 1, 2, 3] = math.nan
    found = used_of(op(**a))
    assert found[:row] == plain[:row] and found[row + 1 :] == plain[row + 1 :]
    assert len(found[row]) == int(a["cluster_offsets"][1, -1])
    alone = used_of(op(**a | dict(threshold=torch.ones(1))))
    assert alone == [used if i == row else [] for i, used in enumerate(found)]


def check_nan_thresholds(op: Callable) -> None:
    """They keep everything rather than nothing, where nobody looked at them before: not on the CPU."""
    a = Case(1, 2, 5, 40, 16, block_q=2, parents=6).make()
    n, nan = a["max_columns"], torch.tensor([math.nan])
    alone = {name: x for name, x in a.items() if not name.startswith("parent")}
    for given in (alone, a | dict(parent_threshold=nan)):
        assert used_of(op(**given | dict(threshold=nan))) == [list(range(n))] * 3


def check_broken_offsets(op: Callable, highs=(60, 2**31 - 1)) -> None:
    """On a GPU nobody reads the offsets before the kernels do: nothing may be touched that is not there."""
    a = Case(2, 1, 2, 40, 8, block_q=2, parents=6).make()
    a |= dict(threshold=torch.tensor([0.0]), parent_threshold=torch.tensor([0.0]), max_columns=100)
    for high in highs:
        for name in ("cluster_offsets", "parent_offsets"):
            count, index = op(**a | {name: torch.randint(-high, high, a[name].shape).int()})
            assert ((count >= 0) & (count <= index.shape[-1])).all()

"""All cases, by family: `run.py`, the pytest suites and the tests use this one list.

A `Spec` names a group of cases and costs nothing; `build` makes its tensors and its works. The works of a group take
turns, so every ratio within a group comes from one run. Attention's works are built here, those of linear layers in
`linear_cases.py`; the targets are in `targets.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import baselines
import headstart
import machine
from baselines import BLOCK, COPY, FLEX, INT4, LINEAR, SDPA
from headstart import _library
from headstart.reference import centroid_lookup as lookup_reference
from headstart.reference import prefill_index as index_reference
from headstart.reference import sparse_attention as reference
from linear_cases import bitmap, bitmap_gemm, int4_gemm
from machine import DTYPES
from measure import Rotation
from work import (
    BITMAP,
    BITMAP_GEMM,
    BITMAP_VALUES,
    COMPRESS,
    ERROR_BAR,
    GROUP,
    INT4_GEMM,
    INT8_ACTIVATIONS,
    INT8_SMALL_GROUPS,
    SMALL_GROUP_ROWS,
    ZEROS,
    Matrix,
    Shape,
    Work,
)

EVERY = "every block"
DENSITIES = (0.25, 0.10, 0.05)
LONG_DECODE = 16  # the longer decode case and the lookup's context have 16 times the tokens: 131,072 for 8,192
DISAGREEMENT_BAR = 0.02  # bf16 rounds block scores differently from the reference, so two near ties may change places


SHAPES = (Shape(9, 3, 64), Shape(8, 2, 128))
WIDE = Shape(32, 8, 128)  # the heads of an 8B model; only for decode steps over a fixed context


MATRICES = (Matrix(4096, 4096), Matrix(11008, 4096))
INT4_ROWS = (1, 16, 256)  # rows of activations: one decoded token, a batch of them, a prefill
BITMAP_ROWS = (1, 16, 64, 256)
CHOICE = "choice of unit"
CHOICE_TOKENS = 2048  # at most: the generic tier runs too


@dataclasses.dataclass(frozen=True)
class Spec:
    family: str
    dtype: str
    shape: Shape | Matrix
    tokens: int  # or rows of activations
    flex: bool = False
    tier: str | None = None  # a lower tier, measured in a process of its own
    kernel: str | None = None  # of the family CHOICE: the family whose kernel runs in every tier

    def __str__(self) -> str:
        return "-".join(filter(None, (self.family, self.kernel, self.dtype, str(self.shape), str(self.tokens))))

    @property
    def title(self) -> str:
        kernel = self.kernel or self.family
        what = {"decode": "keys", "centroid_lookup": "keys", INT4_GEMM: "rows", BITMAP_GEMM: "rows"}
        shape = self.shape.words
        if isinstance(self.shape, Matrix):
            shape += f", group {GROUP}" if kernel == INT4_GEMM else f", {100 * ZEROS:.0f} % zeros"
        count = "" if kernel == BITMAP else f", {self.tokens:,} {what.get(kernel, 'tokens')}"
        tier = f", {self.tier} tier" if self.tier else ""
        choice = f"{CHOICE}, " if self.kernel else ""
        return f"{choice}{kernel}, {self.dtype}, {shape}{count}{tier}"

    @property
    def names(self) -> list[str]:
        """The works' names, without building anything."""
        if self.kernel:
            return [f"{name}, {tier} tier" for name in CHOICES[self.kernel] for tier in forced_tiers()]
        small_groups = [INT8_SMALL_GROUPS] if self.tokens == SMALL_GROUP_ROWS else []
        sparse = [EVERY, *(f"density {d:.2f}" for d in DENSITIES)]
        return {
            "sparse_attention": [SDPA, *sparse, *(f"{FLEX}, {name}" for name in sparse if self.flex)],
            "prefill_index": [EVERY, *INDEX_NAMES],
            "merge_attention": ["merge"],
            "decode": [SDPA, EVERY],
            "centroid_lookup": [
                *(name for lookup in LOOKUPS for name in (lookup, f"{REFERENCE}, {lookup}")),
                *(name for step in STEPS for name in (step, f"{SDPA}, {step}")),
            ],
            "tier": [SDPA, EVERY],
            INT4_GEMM: [INT4, LINEAR, INT4_GEMM, INT8_ACTIVATIONS, *small_groups],
            BITMAP: [COPY, *BITMAP_VALUES.values(), COMPRESS],
            BITMAP_GEMM: [LINEAR, *BITMAP_VALUES.values()],
        }[self.family]

    def build(self) -> list[Work]:
        torch.manual_seed(0)
        works = BUILDERS[self.family](self)
        assert [work.name for work in works] == self.names
        return works


def specs(family: str, tokens: int, *, dtypes=tuple(DTYPES), flex: bool = False, tier=None) -> Iterator[Spec]:
    if family == CHOICE:
        yield from choice_specs(tokens, dtypes)
        return
    rows_of = {INT4_GEMM: INT4_ROWS, BITMAP_GEMM: BITMAP_ROWS, BITMAP: (1,)}
    if family in rows_of:  # these have rows of their own, and baselines that take bf16
        matrices, rows = (MATRICES, rows_of[family]) if tier is None else (MATRICES[:1], rows_of[family][:1])
        for matrix in matrices if "bf16" in dtypes else ():
            for m in rows:
                yield Spec(family, "bf16", matrix, m, tier=tier)
        return
    lengths = {"decode": (tokens, LONG_DECODE * tokens), "centroid_lookup": (LONG_DECODE * tokens,)}.get(
        family, (tokens,)
    )
    for dtype in dtypes:
        wide = (WIDE,) if family == "centroid_lookup" and dtype == "bf16" else ()
        for shape in (*SHAPES, *wide):
            for length in lengths:
                yield Spec(family, dtype, shape, length, flex, tier)


def choice_specs(tokens: int, dtypes) -> Iterator[Spec]:
    """The cases that run in every tier; none where there is only one."""
    if len(forced_tiers()) < 2:
        return
    tokens = min(tokens, CHOICE_TOKENS)
    for dtype in dtypes:
        yield Spec(CHOICE, dtype, SHAPES[0], tokens, kernel="sparse_attention")
    if "bf16" in dtypes:
        yield Spec(CHOICE, "bf16", SHAPES[0], tokens, kernel="prefill_index")
        for rows in INT4_ROWS:
            yield Spec(CHOICE, "bf16", MATRICES[0], rows, kernel=INT4_GEMM)
        yield Spec(CHOICE, "bf16", MATRICES[0], 1, kernel=BITMAP_GEMM)


def forced_tiers() -> list[str]:
    """The tiers of this CPU that a user may force. One that emulates instructions is for tests alone."""
    return [tier for tier in _library.cpu_tiers() if "emulated" not in tier]


# --- inputs ----------------------------------------------------------------------------------------------------------


def text_like(spec: Spec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v whose attention has a sink and a topic that changes slowly, so that an index builder finds something."""
    hq, hkv, d = spec.shape.hq, spec.shape.hkv, spec.shape.d
    topics = torch.randn(1, hkv * d, spec.tokens // 256 + 2)
    topics = F.interpolate(topics, size=spec.tokens, mode="linear").view(1, hkv, d, spec.tokens).mT
    strength = 11**0.5 / d**0.25  # q · k / sqrt(d) is up to 11 higher within a topic: 0.95 of the mass in 23 % of 8K
    k = 0.7 * torch.randn(1, hkv, spec.tokens, d) + strength * topics
    q = 0.7 * torch.randn(1, hq, spec.tokens, d) + strength * topics.repeat_interleave(hq // hkv, 1)
    sink = torch.randn(d)
    q += sink / d**0.5
    k[:, :, 0] = 6 * sink
    v = torch.randn(1, hkv, spec.tokens, d)
    dtype = DTYPES[spec.dtype]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def random_blocks(heads: int, tokens: int, density: float) -> torch.Tensor:
    """bool [1, heads, R, R]: the diagonal and random blocks below it, about `density` of the pairs."""
    rows = -(-tokens // BLOCK)
    diagonal = torch.eye(rows, dtype=torch.bool)
    least = (BLOCK + 1) / (tokens + 1)  # the diagonal's own share
    chosen = torch.rand(1, heads, rows, rows) < (density - least) / (1 - least)
    return chosen.tril(-1) | diagonal


def block_index(selected: torch.Tensor) -> headstart.BlockIndex:
    count, ids = reference.compact(selected)
    return headstart.BlockIndex(count, ids[..., : int(count.max())].contiguous(), block_q=BLOCK, block_k=BLOCK)


# --- families --------------------------------------------------------------------------------------------------------


def attention_work(spec: Spec, q, k, v, name: str, selected: torch.Tensor) -> Work:
    index = block_index(selected)
    density = index.density(spec.tokens, spec.tokens)
    pairs = density * spec.shape.hq * spec.tokens * (spec.tokens + 1) / 2
    return Work(
        name,
        lambda: headstart.sparse_attention(q, k, v, index),
        flops=4 * spec.shape.d * pairs,
        limit="multiply",
        density=density,
        check=lambda result: baselines.attention_error(q, k, v, result[0], selected),
        error_bar=ERROR_BAR[spec.dtype],
    )


def every_block(spec: Spec, q, k, v) -> Work:
    rows = -(-spec.tokens // BLOCK)
    return attention_work(spec, q, k, v, EVERY, torch.ones(1, 1, rows, rows, dtype=torch.bool).tril())


def dense_baseline(spec: Spec, q, k, v) -> Work:
    pairs = spec.shape.hq * spec.tokens * (spec.tokens + 1) / 2
    flops = 4 * spec.shape.d * pairs
    return Work(SDPA, lambda: baselines.sdpa(q, k, v), baseline=SDPA, flops=flops, limit="multiply", density=1.0)


def sparse_attention(spec: Spec) -> list[Work]:
    q, k, v = text_like(spec)
    works = [dense_baseline(spec, q, k, v), every_block(spec, q, k, v)]
    masks = [torch.ones(1, spec.shape.hq, *[-(-spec.tokens // BLOCK)] * 2, dtype=torch.bool).tril()]
    for density in DENSITIES:
        masks.append(random_blocks(spec.shape.hq, spec.tokens, density))
        works.append(attention_work(spec, q, k, v, f"density {density:.2f}", masks[-1]))
    if spec.flex:
        works += [flex_work(spec, q, k, v, work, selected) for work, selected in zip(works[1:], masks, strict=True)]
    return works


def flex_work(spec: Spec, q, k, v, work: Work, selected: torch.Tensor) -> Work:
    """FlexAttention over the same blocks as `work`."""
    mask = baselines.flex_mask(selected, spec.tokens)
    return dataclasses.replace(
        work,
        name=f"{FLEX}, {work.name}",
        call=lambda: baselines.flex(q, k, v, mask),
        check=lambda out: baselines.attention_error(q, k, v, out, selected),
        baseline=FLEX,
        of=work.name,
    )


ADAPTIVE = {  # the engine's default comes last
    "adaptive stride 8": dict(threshold=0.95, stride=8, samples=0),
    "adaptive stride 16": dict(threshold=0.95, stride=16, samples=0),
    "adaptive stride 16, 4 samples": dict(threshold=0.93, stride=16, samples=4),
}
INDEX_NAMES = ("a_shape", "vertical_slash", "block_topk", *ADAPTIVE)


def prefill_index(spec: Spec) -> list[Work]:
    q, k, v = text_like(spec)
    n = spec.tokens
    common = dict(kv_start=None, block_q=BLOCK, block_k=BLOCK)
    slash = dict(last_q=64, sink=30, local=100, scale=None, max_blocks=None, max_columns=None, **common)
    window = dict(sink=1, local=1, **common)
    adaptive = dict(scale=None, max_blocks=None, head_threshold=None, **window)
    # Pairs of a call and the reference's call. The A-shape index has no kernel, so it is its own reference.
    calls = (
        (lambda: headstart.a_shape_index(n, n, sink=128, local=1024), None),
        (
            lambda: headstart.vertical_slash_index(q, k, 1000, 1024),
            lambda: index_reference.vertical_slash_index(q, k, 1000, 1024, **slash),
        ),
        (
            lambda: headstart.block_topk_index(q, k, 24),
            lambda: index_reference.block_topk_index(q, k, 24, **window),
        ),
        *(
            (
                lambda options=options: headstart.adaptive_block_index(q, k, **options),
                lambda options=options: index_reference.adaptive_block_index(q, k, **options, **adaptive),
            )
            for options in ADAPTIVE.values()
        ),
    )
    works = [every_block(spec, q, k, v)]
    for name, (call, expected) in zip(INDEX_NAMES, calls, strict=True):
        work = Work(name, call, density=call().density(n, n), error_bar=DISAGREEMENT_BAR)
        if expected is not None:
            work.check = lambda index, expected=expected: index_disagreement(index, expected(), n)
        works.append(work)
    return works


def index_disagreement(index: headstart.BlockIndex, expected: tuple[torch.Tensor, ...], tokens: int) -> float:
    """The larger of the disagreements over blocks and over columns."""
    blocks = -(-tokens // BLOCK)
    got = [(index.block_count, index.block_index, blocks), (index.column_count, index.column_index, tokens)]
    worst = 0.0
    for (count, ids, size), want in zip(got, (expected[:2], expected[2:])):
        if want:
            listed = (reference.scatter_blocks(count, ids, size), reference.scatter_blocks(*want, size))
            worst = max(worst, baselines.disagreement(*listed))
    return worst


def merge_attention(spec: Spec) -> list[Work]:
    shape = (1, spec.shape.hq, spec.tokens, spec.shape.d)
    out_a, out_b = (torch.randn(shape).to(DTYPES[spec.dtype]) for _ in range(2))
    lse_a, lse_b = (torch.randn(shape[:3]) for _ in range(2))
    rotation = Rotation((out_a, lse_a, out_b, lse_b), machine.cold_bytes())
    exact = reference.merge_attention(out_a.float(), lse_a, out_b.float(), lse_b)[0]
    work = Work(
        "merge",
        lambda: headstart.merge_attention(*rotation.next()),
        bytes=3 * (out_a.nbytes + lse_a.nbytes),
        cycle_bytes=rotation.bytes,
        limit="copy",
        check=lambda result: baselines.relative_error(result[0], exact),
        error_bar=ERROR_BAR[spec.dtype],
    )
    return [work]


def decode(spec: Spec) -> list[Work]:
    shape, dtype = spec.shape, DTYPES[spec.dtype]
    q = torch.randn(1, shape.hq, 1, shape.d).to(dtype)
    k, v = (torch.randn(1, shape.hkv, spec.tokens, shape.d).to(dtype) for _ in range(2))
    rotation = Rotation((k, v), machine.cold_bytes())
    index = block_index(torch.ones(1, 1, 1, -(-spec.tokens // BLOCK), dtype=torch.bool))
    numbers = dict(flops=4 * shape.d * shape.hq * spec.tokens, bytes=k.nbytes + v.nbytes, limit="read", density=1.0)
    numbers["cycle_bytes"] = rotation.bytes
    ours = Work(
        EVERY,
        lambda: headstart.sparse_attention(q, *rotation.next(), index),
        check=lambda result: baselines.attention_error(q, k, v, result[0]),
        error_bar=ERROR_BAR[spec.dtype],
        **numbers,
    )
    return [Work(SDPA, lambda: baselines.sdpa(q, *rotation.next()), baseline=SDPA, **numbers), ours]


REFERENCE = "reference"
LOOKUPS = {  # the number of queries, and whether the lookup starts with the parents
    "one query": (1, False),
    "one query, with parents": (1, True),
    "64 queries": (64, False),
    "64 queries, with parents": (64, True),
}
KEPT_CLUSTERS, KEPT_PARENTS = 0.1, 0.2
STEPS = {"decode step, 10 % of the keys": False, "decode step, 10 % of the keys, with parents": True}


def drawn_clusters(spec: Spec) -> headstart.KeyClusters:
    """A parent for each 100 keys, and five clusters for each parent, whose centroids are near the parent's."""
    heads, n, d, dtype = spec.shape.hkv, spec.tokens, spec.shape.d, DTYPES[spec.dtype]
    parents = max(1, n // 100)
    of_parents = torch.randn(heads, parents, d)
    centroids = of_parents.repeat_interleave(5, 1) + 0.7 * torch.randn(heads, 5 * parents, d)

    def spread(whole: int, parts: int) -> torch.Tensor:
        return (torch.arange(parts + 1) * whole // parts).to(torch.int32).repeat(heads, 1)

    order = torch.arange(n, dtype=torch.int32).repeat(heads, 1)
    level = (of_parents.to(dtype), spread(5 * parents, parents))
    return headstart.KeyClusters(centroids.to(dtype), spread(n, 5 * parents), order, *level)


def best_scores(q, centroids, sizes) -> torch.Tensor:
    """[Hkv, C]: for each cluster, the logarithm of the best score that a query of q [1, Hq, Nq, D] gives it."""
    heads, d = len(centroids), q.shape[-1]
    logits = q.float().view(heads, -1, d) @ centroids.float().mT / d**0.5
    return lookup_reference.log_scores(logits, sizes[:, None], torch.ones(()).bool()).amax(1)


def threshold_that_keeps(share: float, q, centroids, sizes) -> torch.Tensor:
    """[Hkv]: the thresholds above which `share` of the clusters score."""
    return best_scores(q, centroids, sizes).quantile(1 - share, -1).exp()


def thresholds_that_keep(
    share: float, of_parents: float, q, clusters: headstart.KeyClusters
) -> tuple[torch.Tensor, ...]:
    """Thresholds for children and parents, for one query. Only the children of parents that are kept have scores."""
    sizes = clusters.cluster_offsets.diff(dim=-1)
    parent_sizes = clusters.cluster_offsets.gather(1, clusters.parent_offsets.long()).diff(dim=-1)
    parents = threshold_that_keeps(of_parents, q, clusters.parent_centroids, parent_sizes)
    kept = best_scores(q, clusters.parent_centroids, parent_sizes) > parents[:, None].log()
    children = clusters.parent_offsets.diff(dim=-1)
    seen = torch.stack([k.repeat_interleave(n) for k, n in zip(kept, children, strict=True)])
    return threshold_that_keeps(share, q, clusters.centroids, sizes * seen), parents


def centroid_lookup(spec: Spec) -> list[Work]:
    clusters, works = drawn_clusters(spec), []
    rotation = Rotation((clusters.centroids, clusters.parent_centroids), machine.cold_bytes())
    copies = [dataclasses.replace(clusters, centroids=c, parent_centroids=p) for c, p in rotation.items]
    flat_copies = [dataclasses.replace(c, parent_centroids=None, parent_offsets=None) for c in copies]
    sizes = clusters.cluster_offsets.diff(dim=-1)
    parent_sizes = clusters.cluster_offsets.gather(1, clusters.parent_offsets.long()).diff(dim=-1)
    for name, (queries, with_parents) in LOOKUPS.items():
        q = torch.randn(1, spec.shape.hq, queries, spec.shape.d).to(DTYPES[spec.dtype])
        threshold = threshold_that_keeps(KEPT_CLUSTERS, q, clusters.centroids, sizes)
        parents = threshold_that_keeps(KEPT_PARENTS, q, clusters.parent_centroids, parent_sizes)
        parents = parents if with_parents else None
        cold = itertools.cycle(copies if with_parents else flat_copies)

        def ours(q=q, cold=cold, threshold=threshold, parents=parents):
            return headstart.centroid_lookup(q, next(cold), threshold, parent_threshold=parents)

        def by_reference(q=q, threshold=threshold, parents=parents):
            level = (
                (clusters.parent_centroids, clusters.parent_offsets, parents) if parents is not None else (None,) * 3
            )
            level = dict(zip(("parent_centroids", "parent_offsets", "parent_threshold"), level, strict=True))
            sizes = dict(scale=spec.shape.d**-0.5, block_q=BLOCK, max_columns=spec.tokens)
            return lookup_reference.centroid_lookup(
                q, clusters.centroids, clusters.cluster_offsets, threshold, **sizes, **level
            )

        read = clusters.centroids.nbytes
        if with_parents:
            read = clusters.parent_centroids.nbytes + int(KEPT_PARENTS * read)
        numbers = dict(bytes=read, cycle_bytes=read * len(copies), limit="read") if queries == 1 else {}
        numbers["flops"] = 2 * queries * spec.shape.hq // spec.shape.hkv * read / clusters.centroids.element_size()
        if queries > 1:
            numbers["limit"] = "gemm"
        work = Work(name, ours, error_bar=DISAGREEMENT_BAR, **numbers)
        work.check = lambda got, expected=by_reference: lookup_disagreement(got, expected(), spec.tokens)
        works += [work, Work(f"{REFERENCE}, {name}", by_reference, baseline=REFERENCE, of=name)]
    return works + decode_steps(spec, clusters)


def decode_steps(spec: Spec, clusters: headstart.KeyClusters) -> list[Work]:
    """One query: lookup and attention to the keys of the clusters that it finds, beside attention to all keys."""
    shape, dtype, works = spec.shape, DTYPES[spec.dtype], []
    flat = dataclasses.replace(clusters, parent_centroids=None, parent_offsets=None)
    sizes = clusters.cluster_offsets.diff(dim=-1)
    near = [c.repeat_interleave(n, 0, output_size=spec.tokens) for c, n in zip(clusters.centroids, sizes)]
    k = (torch.stack(near)[None] + 0.5 * torch.randn(1, shape.hkv, spec.tokens, shape.d)).to(dtype)
    v = torch.randn(1, shape.hkv, spec.tokens, shape.d).to(dtype)
    rotation = Rotation((k, v), machine.cold_bytes())
    q = torch.randn(1, shape.hq, 1, shape.d).to(dtype)
    of_all = threshold_that_keeps(KEPT_CLUSTERS, q, clusters.centroids, sizes)
    restricted, of_parents = thresholds_that_keep(KEPT_CLUSTERS, KEPT_PARENTS, q, clusters)
    no_blocks = torch.zeros(1, shape.hkv, 1, dtype=torch.int32), torch.zeros(1, shape.hkv, 1, 0, dtype=torch.int32)
    numbers = dict(flops=4 * shape.d * shape.hq * spec.tokens, bytes=k.nbytes + v.nbytes, limit="read", density=1.0)
    numbers["cycle_bytes"] = rotation.bytes
    for name, with_parents in STEPS.items():

        def look_up(with_parents=with_parents):
            if with_parents:
                return headstart.centroid_lookup(q, clusters, restricted, parent_threshold=of_parents)
            return headstart.centroid_lookup(q, flat, of_all)

        def step(look_up=look_up):
            index = headstart.BlockIndex(*no_blocks, *look_up())
            return headstart.sparse_attention(q, *rotation.next(), index, causal=False)

        work = Work(name, step, error_bar=ERROR_BAR[spec.dtype], density=KEPT_CLUSTERS)
        work.check = lambda got, look_up=look_up: chosen_keys_error(q, k, v, look_up(), got[0])
        sdpa = Work(f"{SDPA}, {name}", lambda: baselines.sdpa(q, *rotation.next()), baseline=SDPA, of=name, **numbers)
        works += [work, sdpa]
    return works


def chosen_keys_error(q, k, v, columns: tuple[torch.Tensor, ...], out: torch.Tensor) -> float:
    mask = reference.scatter_blocks(*columns, k.shape[2]).repeat_interleave(q.shape[1] // k.shape[1], 1)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, enable_gqa=True)
    return baselines.relative_error(out, exact)


def lookup_disagreement(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], keys: int) -> float:
    return baselines.disagreement(*(reference.scatter_blocks(*columns, keys) for columns in (got, expected)))


def tier(spec: Spec) -> list[Work]:
    """headstart and torch with the same instruction set. `HEADSTART_ISA` holds headstart to it. torch's own kernels,
    MKL and oneDNN have a variable each (run.py): SDPA multiplies with MKL, which ignores `ATEN_CPU_CAPABILITY`."""
    q, k, v = text_like(spec)
    return [dense_baseline(spec, q, k, v), every_block(spec, q, k, v)]


CHOICES = {  # the works that run in every tier
    "sparse_attention": (EVERY,),
    "prefill_index": ("adaptive stride 16, 4 samples",),
    INT4_GEMM: (INT4_GEMM, INT8_ACTIVATIONS),
    BITMAP_GEMM: (BITMAP_VALUES["same"],),
}


def choice(spec: Spec) -> list[Work]:
    """Some works of another family, each in every tier. Each call forces its tier; `report.run_group` undoes it."""
    works = {work.name: work for work in BUILDERS[spec.kernel](spec)}
    return [in_tier(works[name], tier) for name in CHOICES[spec.kernel] for tier in forced_tiers()]


def in_tier(work: Work, tier: str) -> Work:
    def call():
        _library.set_cpu_tier(tier)
        return work.call()

    return dataclasses.replace(work, name=f"{work.name}, {tier} tier", call=call, of=work.name, tier=tier)


BUILDERS = {
    "sparse_attention": sparse_attention,
    "prefill_index": prefill_index,
    "merge_attention": merge_attention,
    "decode": decode,
    "centroid_lookup": centroid_lookup,
    "tier": tier,
    CHOICE: choice,
    INT4_GEMM: int4_gemm,
    BITMAP: bitmap,
    BITMAP_GEMM: bitmap_gemm,
}
FAMILIES = tuple(name for name in BUILDERS if name != "tier")  # "tier" runs in processes of its own

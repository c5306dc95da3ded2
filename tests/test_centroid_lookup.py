"""centroid_lookup: the chosen clusters wherever it runs, and the contract. KeyClusters: test_key_clusters.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import headstart
from backends import STEMS, expect_no_wait, expect_same_when_replayed, gpu_kernel, places
from headstart.ops.centroid_lookup import KeyClusters, centroid_lookup
from headstart.reference import centroid_lookup as reference
from judges import centroid_lookup as judge
from judges.centroid_lookup import BFLOAT16, FLOAT16, Case, by_case, by_dtype, check, offsets_of, used_of

STEM = STEMS["centroid_lookup"]
OP = torch.ops.headstart.centroid_lookup.default

# Decode and blocks of queries that no tile divides, one block for all, every head dim, one cluster and one parent.
CASES = (
    Case(2, 4, 1, 150, 64, FLOAT16),
    Case(2, 1, 1, 70, 128, BFLOAT16, batch=2),
    Case(1, 3, 5, 70, 24, block_q=4),
    Case(1, 2, 130, 90, 72, BFLOAT16),
    Case(1, 2, 70, 65, 40),
    Case(1, 1, 40, 33, 16, FLOAT16, block_q=10**6),
    Case(1, 2, 3, 20, 8, FLOAT16, block_q=1),
    Case(1, 2, 33, 70, 256, BFLOAT16, block_q=128),
    Case(2, 1, 2, 1, 8, share=1.0),
    Case(2, 2, 1, 200, 32, parents=19),
    Case(1, 2, 66, 150, 16, FLOAT16, parents=9, batch=2),
    Case(1, 1, 9, 40, 72, BFLOAT16, block_q=4, parents=30),
    Case(1, 2, 2, 30, 8, parents=1),
)
FEW_CASES = CASES[0], CASES[2], CASES[10]
BASE = Case(2, 2, 5, 100, 64)
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
    replace(
        BASE, batch=b, group=g, nq=nq, block_q=block, clusters=c, parents=p, d=d, share=share, parent_share=share
    )
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


def fewer(ops, case: Case) -> Case:
    """A tenth of the clusters, where each takes long."""
    slow = ops.kind in ("interpreter", "lanes")
    return replace(case, clusters=case.clusters // 10, parents=case.parents // 10) if slow else case


# --- the choice, wherever it runs ------------------------------------------------------------------------------------


@by_case(CASES)
def test_against_float64(ops, case):
    judge.check_case(ops.centroid_lookup, case)


@places("reference", "cpu", "cuda")
@by_case(GROUPS + HEAD_DIMS + CLUSTERS + ROWS + PARENTS + CAPACITIES)
def test_many_sizes(ops, case):
    check(ops.centroid_lookup, case.make())


def test_the_cases_choose():
    """Neither everything nor nothing is kept in most of the cases above."""
    for case in (*CASES, *GROUPS, *HEAD_DIMS, *PARENTS):
        kept = torch.stack([truth.kept for truth in judge.oracle(case.make()).values()]).double().mean()
        assert 0.005 < kept < 0.95 or case.clusters < 10, f"{case}: {kept}"


@places("reference", "cpu", "cuda")
@by_dtype
@by_case([BASE, HEAD_DIMS[5], HEAD_DIMS[7], HEAD_DIMS[10], ROWS[4], PARENTS[0], PARENTS[3], CAPACITIES[7]])
def test_dtypes(ops, dtype, case):
    assert 0 < int(check(ops.centroid_lookup, replace(case, dtype=dtype).make()).sum())


@places("cpu", "cuda", "triton")
@by_dtype
@pytest.mark.parametrize("d", [8, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("nq, parents", [(1, 0), (100, 12)])
def test_head_dims(ops, d, dtype, nq, parents):
    judge.check_case(ops.centroid_lookup, Case(1, 2, nq, 150, d, dtype, parents=parents))


@places("reference", "cpu")
def test_any_case(ops):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    sizes = dict(
        heads_kv=st.integers(1, 2),
        group=st.integers(1, 3),
        nq=st.integers(1, 7),
        clusters=st.integers(1, 12),
        d=st.sampled_from([8, 24]),
        block_q=st.integers(1, 9),
        parents=st.sampled_from([0, 1, 3]),
        batch=st.integers(1, 2),
        share=st.floats(0, 4),
        parent_share=st.floats(0, 4),
        max_columns=st.none() | st.integers(0, 30),
    )

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(st.builds(Case, **sizes), st.integers(0, 10**6))
    def run(case, seed):
        check(ops.centroid_lookup, case.make(seed))

    run()


@pytest.mark.parametrize("values", ["head", "KV head", "one", "scalar"])
def test_thresholds_of_heads(ops, values):
    a = fewer(ops, replace(PARENTS[0], heads_kv=3, group=4, nq=3)).make()
    shape = {"head": (12,), "KV head": (3,), "one": (1,), "scalar": ()}[values]
    for name in ("threshold", "parent_threshold"):
        spread = torch.rand(shape) * 3 * a[name].reshape(())
        a[name] = spread if spread.dim() == 0 else torch.stack([spread, -spread], 1)[:, 0]  # any stride
    assert check(ops.centroid_lookup, a).sum() > 0
    a["threshold"] = torch.full(shape, -1.0)
    assert check(ops.centroid_lookup, a).sum() > 0


@pytest.mark.parametrize("tied", [False, True])
@by_case(FEW_CASES)
def test_too_little_room(ops, case, tied):
    judge.check_room(ops.centroid_lookup, case, tied)


@places("cpu", "cuda", "triton")
@pytest.mark.parametrize("tied", [False, True])
@by_case(case for case in CASES if case not in FEW_CASES)
def test_too_little_room_in_more_cases(ops, case, tied):
    judge.check_room(ops.centroid_lookup, case, tied)


def test_capacity_keeps_the_best_and_cuts_the_last(ops):
    judge.check_capacity_keeps_the_best_and_cuts_the_last(ops.centroid_lookup)


@places("reference", "cpu", "lanes", "cuda", "triton")
@pytest.mark.parametrize("nq", [1, 40])
def test_of_equals_the_first_is_kept(ops, nq):
    judge.check_of_equals_the_first_is_kept(ops.centroid_lookup, nq)


@places("reference", "cpu", "lanes", "cuda", "triton")
def test_more_clusters_than_a_scan_takes_at_once(ops):
    judge.check_room(ops.centroid_lookup, Case(1, 2, 1, 1500, 8, BFLOAT16), True)


def test_large_logits_and_empty_clusters(ops):
    judge.check_large_logits_and_empty_clusters(ops.centroid_lookup)


@places("reference", "cpu", "cuda", "triton")
@pytest.mark.parametrize("nq", [1, 40])
def test_sizes_of_clusters(ops, nq):
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
            check(ops.centroid_lookup, a | change | dict(max_columns=int(offsets[:, -1].max())))
            check(ops.centroid_lookup, a | change | dict(max_columns=100))


def test_heads_that_select_nothing(ops):
    a = fewer(ops, PARENTS[0]).make()
    nothing = torch.tensor([2.0])
    assert not ops.centroid_lookup(**a | dict(threshold=nothing))[0].any()
    assert not ops.centroid_lookup(**a | dict(parent_threshold=nothing))[0].any()
    one_head = torch.tensor([2.0, float(a["threshold"])])
    count = check(ops.centroid_lookup, a | dict(parent_threshold=one_head))
    assert not count[:, 0].any() and count[:, 1].all()
    both = dict(threshold=torch.ones(1), parent_threshold=torch.ones(1))
    assert not ops.centroid_lookup(**a | both)[0].any()


@places("reference", "cpu", "interpreter", "cuda", "triton")
def test_no_queries_and_no_room_given(ops):
    a = BASE.make()
    del a["max_columns"]
    n = int(a["cluster_offsets"][:, -1].max())
    count, index = ops.centroid_lookup(**a | dict(threshold=torch.zeros(1)))
    assert index.shape == (1, 2, 1, n) and torch.equal(count[0, :, 0], a["cluster_offsets"][:, -1])
    count, index = ops.centroid_lookup(**a | dict(q=a["q"][:, :, :0]))
    assert count.shape == (1, 2, 0) and index.shape == (1, 2, 0, n)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_query_of_nan_keeps_everything_in_its_row(ops):
    judge.check_nan_query(ops.centroid_lookup, Case(2, 1, 3, 40, 16, block_q=1))


@places("reference", "cpu", "cuda", "triton")
@pytest.mark.parametrize("nq", [3, 40])
def test_a_query_of_nan_among_many_clusters(ops, nq):
    judge.check_nan_query(ops.centroid_lookup, replace(BASE, nq=nq, block_q=1, clusters=300, group=1))


@places("reference", "cpu")
def test_an_infinite_query_keeps_the_infinite(ops):
    for nq in (3, 40):
        a = replace(BASE, nq=nq, block_q=1, clusters=300, group=1).make()
        plain, row = used_of(ops.centroid_lookup(**a)), nq + 2
        for value in (torch.inf, -torch.inf):
            a["q"][0, 1, 2, 3] = value
            found, expected = used_of(ops.centroid_lookup(**a)), used_of(reference.centroid_lookup(**a))
            assert found[:row] == plain[:row] and found[row + 1 :] == plain[row + 1 :]
            assert found[row] == expected[row]


@places("interpreter", "lanes", "cuda", "triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_thresholds(ops):
    judge.check_nan_thresholds(ops.centroid_lookup)


@places("interpreter", "lanes", "cuda", "triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_broken_offsets(ops):
    # The interpreter has no sums that wrap.
    judge.check_broken_offsets(ops.centroid_lookup, (60,) if ops.kind == "interpreter" else (60, 2**31 - 1))


@places("cpu", "interpreter", "lanes", "cuda", "triton")
def test_strides_do_not_matter(ops):
    judge.check_strides(ops.centroid_lookup, Case(2, 2, 9, 50, 24, FLOAT16, block_q=9, parents=7, batch=2))


@places("cpu", "cuda")
@by_dtype
@by_case([BASE, ROWS[4], ROWS[10], PARENTS[0], PARENTS[3], CAPACITIES[7], replace(BASE, heads_kv=1, clusters=700)])
def test_strides_do_not_matter_in_more_cases(ops, case, dtype):
    judge.check_strides(ops.centroid_lookup, replace(case, dtype=dtype))


@places("cpu")
@by_dtype
@by_case([BASE, ROWS[4], ROWS[10], PARENTS[0], PARENTS[3], CAPACITIES[7], replace(BASE, heads_kv=1, clusters=700)])
def test_threads_do_not_matter(ops, case, dtype):
    a = replace(case, dtype=dtype).make()
    want, before = used_of(ops.centroid_lookup(**a)), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert used_of(ops.centroid_lookup(**a)) == want, threads
    finally:
        torch.set_num_threads(before)


@places("reference", "cpu", "lanes", "cuda", "triton")
def test_batch_shares_one_read_of_the_centroids(ops):
    """A row's selection does not depend on its neighbours, whichever way they are scored together."""
    a = replace(BASE, batch=9, nq=1).make()
    together = used_of(ops.centroid_lookup(**a))
    alone = [used_of(ops.centroid_lookup(**a | dict(q=a["q"][i : i + 1]))) for i in range(9)]
    unsure = {key for key, truth in judge.oracle(a).items() if truth.doubtful.any()}
    for i in range(9):
        for head in range(2):
            assert (i, head, 0) in unsure or together[i * 2 + head] == alone[i][head]


# --- what belongs to one place ---------------------------------------------------------------------------------------


@places("interpreter")
def test_more_clusters_than_registers_hold(ops, monkeypatch):
    from headstart.triton import centroid_lookup as module

    monkeypatch.setattr(module, "MAX_SPLITS", 5)
    judge.check_room(ops.centroid_lookup, Case(1, 1, 1, 8300, 8, FLOAT16), True, (0.1,))


@places("interpreter")
def test_rows_taken_in_turns_by_a_small_workspace(ops, monkeypatch):
    from headstart.triton import centroid_lookup as module

    monkeypatch.setattr(module, "WORKSPACE", 5000)
    monkeypatch.setattr(module, "SLOTS", 32)
    judge.check_case(ops.centroid_lookup, CASES[11])
    judge.check_room(ops.centroid_lookup, CASES[11], True, (0.3,))


def clusters_on_the_gpu(clusters: int, parents: int = 0) -> KeyClusters:
    """Without the keys."""
    a = Case(2, 1, 1, clusters, 128, BFLOAT16, parents=parents).make()
    order = torch.zeros(2, a["max_columns"], dtype=torch.int32)
    level = a.get("parent_centroids"), a.get("parent_offsets")
    return KeyClusters(a["centroids"], a["cluster_offsets"], order, *level).to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cuda", "triton"])
@pytest.mark.parametrize("nq", [1, 700])
@pytest.mark.parametrize("parents", [0, 300])
@pytest.mark.parametrize("room", [None, 2000])
def test_a_long_context(gpu, kind, nq, parents, room):
    clusters, lookup = clusters_on_the_gpu(20000, parents), gpu_kernel("centroid_lookup", kind)
    n = clusters.order.shape[1]
    threshold = torch.tensor([3.0 / n], device="cuda")
    args = judge.surrounded(torch.randn(2, 8, nq, 128).bfloat16().cuda()), clusters.centroids, clusters.cluster_offsets
    options = dict(scale=128**-0.5, block_q=64, max_columns=room or n)
    if parents:
        options |= dict(parent_centroids=clusters.parent_centroids, parent_offsets=clusters.parent_offsets)
        options |= dict(parent_threshold=threshold)
    got = lookup(*args, threshold, **options)
    used = torch.arange(got[1].shape[-1], device="cuda") < got[0].unsqueeze(-1)
    for _ in range(3):
        again = lookup(*args, threshold, **options)
        assert torch.equal(again[0], got[0]) and torch.equal(again[1][used], got[1][used])
    want = reference.centroid_lookup(*args, threshold, **options)
    masks = [as_mask(count, index, n) for count, index in (got, want)]
    # A near tie with a threshold may fall either way, and with it a parent's children.
    assert float((masks[0] != masks[1]).sum() / masks[1].sum()) < 0.005


def as_mask(count: torch.Tensor, index: torch.Tensor, n: int) -> torch.Tensor:
    used = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    mask = torch.zeros(*count.shape, n + 1, dtype=torch.bool, device=index.device)
    return mask.scatter_(-1, torch.where(used, index, n).long(), True)[..., :n]


@pytest.mark.gpu
@pytest.mark.parametrize("parents", [0, 30])
def test_in_a_cuda_graph(gpu, parents):
    clusters = clusters_on_the_gpu(500, parents)
    q = torch.randn(2, 4, 130, 128, dtype=torch.bfloat16, device="cuda")
    given = dict(parent_threshold=torch.tensor([1e-3], device="cuda")) if parents else {}

    def step():
        threshold = torch.full((1,), 1e-3, device="cuda")
        count, index = headstart.centroid_lookup(q, clusters, threshold, max_columns=700, **given)
        return count, index.masked_fill(torch.arange(700, device="cuda") >= count.unsqueeze(-1), 0)

    expect_no_wait(step)
    expect_same_when_replayed(step, q.normal_)


@pytest.mark.gpu
def test_compiles_whole_on_a_gpu(gpu):
    clusters = clusters_on_the_gpu(300)

    def step(q):
        return headstart.centroid_lookup(q * 1.0, clusters, 1e-3)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for nq in (1, 100, 170):
        q = torch.randn(1, 4, nq, 128, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(q), step(q))


# --- the contract ----------------------------------------------------------------------------------------------------


def sample(dtype=torch.float32, nq=5) -> dict:
    """Everything is kept, so that no entry is unspecified and results can be compared as a whole."""
    a = Case(2, 2, nq, 20, 16, dtype, block_q=3, parents=3, max_columns=7).make()
    return a | dict(threshold=torch.tensor([0.0]), parent_threshold=torch.tensor(0.0))


def without_parents(a: dict) -> dict:
    return {name: value for name, value in a.items() if not name.startswith("parent")}


@by_dtype
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
    (lambda a: a.update(threshold=torch.tensor([torch.nan])), "threshold"),
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
    (lambda a: a.update(parent_threshold=torch.tensor(torch.nan)), "parent_threshold"),
    (lambda a: a.update(parent_centroids=None, parent_offsets=None), "parent_threshold"),
    (lambda a: a.update(scale=torch.inf), "scale"),
    (lambda a: a.update(block_q=0), "block_q"),
    (lambda a: a.update(max_columns=-1), "max_columns"),
]


@pytest.mark.parametrize(("change", "argument"), BAD)
def test_bad_input_names_the_argument(change, argument):
    """In the same words, whether the kernel or the reference finds it."""
    a = sample()
    change(a)
    said = f"centroid_lookup: {argument}: expected .*, got "
    with pytest.raises((ValueError, RuntimeError), match=said) as compiled:
        OP(**a)
    with pytest.raises(ValueError, match=said) as by_reference:
        OP._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, **a)
    assert str(compiled.value).splitlines()[0] == str(by_reference.value)

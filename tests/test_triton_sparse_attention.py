"""The Triton kernels of sparse and merged attention, without a GPU.

Two ways, in two processes: their numbers through Triton's interpreter, which must be chosen before triton is
imported, so this file runs itself again with TRITON_INTERPRET=1; and their machine code, compiled for sm_80 and
sm_90. To see the interpreted cases one by one: ``TRITON_INTERPRET=1 pytest tests/test_triton_sparse_attention.py``.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tolerances import assert_close
from triton_testing import (
    INTERPRETED,
    SHARED_MEMORY,
    compile_launch,
    compiled,
    interpreted,
    record,
    resources,
    run_in_the_interpreter,
    surrounded,
)

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def kernels():
    from headstart.triton import sparse_attention

    return sparse_attention


@compiled
@pytest.mark.slow
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


# --- numbers ---------------------------------------------------------------------------------------------------------


def random_index(shape: tuple[int, int, int], blocks: int, share: float, nk: int, columns: int, column_rows: int):
    from headstart.reference import sparse_attention as reference

    b, hi, r = shape
    lists = reference.compact(torch.rand(b, hi, r, blocks) < share)
    if columns == 0:
        return [*lists, None, None]
    return [*lists, *reference.compact(torch.rand(b, hi, column_rows, nk) < columns / nk)]


def compare(kernels, q, k, v, index, kv_start=None, **options):
    from headstart.reference import sparse_attention as reference

    out, lse = kernels.sparse_attention(q, k, v, *index, kv_start, **options)
    wide = [x.double() for x in (q, k, v)]
    exact, exact_lse = reference.sparse_attention(*wide, *index, kv_start, **options)
    plain, plain_lse = reference.sparse_attention(q, k, v, *index, kv_start, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert_close(out, exact, plain, "out")
    assert_close(lse, exact_lse.double(), plain_lse, "lse")
    return out, lse


CASES = {
    "blocks": dict(nq=130, nk=130),
    "columns": dict(nq=100, nk=100, share=0.0, columns=40),
    "both, overlapping": dict(nq=130, nk=130, share=0.6, columns=90),
    "columns shared by the rows": dict(nq=130, nk=130, columns=50, column_rows=1),
    "grouped heads, one index": dict(hq=4, hkv=2, nq=60, nk=70, columns=30),
    "grouped heads, index per key head": dict(hq=4, hkv=2, hi=2, nq=60, nk=70, columns=30),
    "left padding": dict(b=2, nq=100, nk=130, kv_start=[0, 75], columns=50),
    "left padding, index of one sequence": dict(b=2, bi=1, nq=60, nk=150, kv_start=[3, 149], columns=50),
    "chunk": dict(nq=70, nk=301, columns=60),
    "decode": dict(nq=1, nk=300, columns=60, dtype=torch.float16),
    "not causal": dict(nq=100, nk=70, causal=False, columns=30),
    "large blocks": dict(nq=200, nk=300, block_q=128, block_k=128, columns=40, dtype=torch.float16),
    "wide key blocks": dict(nq=130, nk=300, block_k=128, columns=40),
    "tall query blocks": dict(nq=130, nk=200, block_q=128, columns=40, dtype=torch.float16),
    "head dim 80, bfloat16": dict(nq=70, nk=130, d=80, columns=40, dtype=torch.bfloat16),
    "head dim 96, float16": dict(nq=70, nk=130, d=96, columns=40, dtype=torch.float16),
    "head dim 72, padded": dict(nq=70, nk=130, d=72, columns=40, dtype=torch.float16),
    "head dim 8": dict(nq=70, nk=130, d=8, columns=40, dtype=torch.float16),
    "head dim 128, bfloat16": dict(nq=70, nk=130, d=128, columns=40, dtype=torch.bfloat16),
    "head dim 256, bfloat16": dict(nq=70, nk=130, d=256, columns=40, dtype=torch.bfloat16),
}


@interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sparse_attention_agrees_with_the_reference(case, kernels, interpreter, poisoned):
    c = dict(b=1, bi=None, hq=2, hkv=1, hi=1, d=64, dtype=torch.float32, share=0.5, columns=0, column_rows=None)
    c |= dict(kv_start=None, causal=True, block_q=64, block_k=64) | case
    rows = -(-c["nq"] // c["block_q"])
    q = surrounded(c["b"], c["hq"], c["nq"], c["d"], dtype=c["dtype"])
    k, v = (surrounded(c["b"], c["hkv"], c["nk"], c["d"], dtype=c["dtype"]) for _ in range(2))
    index = random_index(
        (c["bi"] or c["b"], c["hi"], rows),
        -(-c["nk"] // c["block_k"]),
        c["share"],
        c["nk"],
        c["columns"],
        c["column_rows"] or rows,
    )
    kv_start = None if c["kv_start"] is None else torch.tensor(c["kv_start"], dtype=torch.int32)
    compare(kernels, q, k, v, index, kv_start, causal=c["causal"], block_q=c["block_q"], block_k=c["block_k"])


@interpreted
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_any_scale(scale, kernels, interpreter, poisoned):
    q, k, v = (surrounded(1, 1, 70, 64, dtype=torch.float16) for _ in range(3))
    compare(kernels, q, k, v, random_index((1, 1, 2), 2, 0.9, 70, 20, 1), scale=scale)


@interpreted
def test_strides(kernels, interpreter, poisoned):
    # Tokens before heads, an odd storage offset, an expanded index, lists whose last dim is not contiguous.
    flat = torch.randn(1 + 70 * 4 * 65)[1:].view(1, 70, 4, 65)[..., :64]
    q, k, v = flat.transpose(1, 2), flat[:, :, :2].transpose(1, 2), flat[:, :, 2:].transpose(1, 2)
    count, ids, column_count, columns = random_index((1, 1, 2), 2, 0.9, 70, 20, 2)
    ids = ids.transpose(-1, -2).contiguous().transpose(-1, -2)
    columns = columns.transpose(-1, -2).contiguous().transpose(-1, -2)
    index = [x.expand(-1, 4, *[-1] * (x.dim() - 2)) for x in (count, ids, column_count, columns)]
    compare(kernels, q, k, v, index)


@interpreted
def test_rows_that_see_nothing(kernels, interpreter, poisoned):
    q, k, v = (surrounded(2, 1, 130, 64, dtype=torch.float32) for _ in range(3))
    count = torch.tensor([0, 1, 0], dtype=torch.int32).expand(2, 1, 3)
    ids = torch.tensor([[0, 0], [2, 0], [1, 1]], dtype=torch.int32).expand(2, 1, 3, 2)  # row 1 lists its future only
    out, lse = compare(kernels, q, k, v, [count, ids, None, None], torch.tensor([0, 130], dtype=torch.int32))
    assert (out == 0).all() and (lse == -math.inf).all()


@interpreted
@pytest.mark.parametrize("causal", [True, False])
def test_ids_outside_the_keys_are_skipped(causal, kernels, interpreter, poisoned):
    q, k, v = (surrounded(1, 1, 130, 64, dtype=torch.float16) for _ in range(3))
    top = 2**31 - 1
    count = torch.tensor([[[4, 5, 9]]], dtype=torch.int32)  # one count past the capacity
    ids = torch.tensor([[[-9, 0, 3, top, 0], [-2, -1, 0, 1, 4], [-1, 0, 2, 7, top]]], dtype=torch.int32)[None]
    column_count = torch.full((1, 1, 1), 7, dtype=torch.int32)
    columns = torch.tensor([-top, -1, 5, 70, 129, 130, top], dtype=torch.int32).view(1, 1, 1, 7)
    capped = count.clamp(max=5)
    index = [capped, ids, column_count, columns]
    compare(kernels, q, k, v, index, causal=causal)
    got = kernels.sparse_attention(q, k, v, count, *index[1:], causal=causal)
    want = kernels.sparse_attention(q, k, v, *index, causal=causal)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@interpreted
def test_disordered_lists_read_no_memory_outside_the_keys(kernels, interpreter, poisoned):
    q, k, v = (surrounded(1, 1, 130, 64, dtype=torch.float16) for _ in range(3))
    count = torch.full((1, 1, 3), 6, dtype=torch.int32)
    ids = torch.tensor([0, 2**30, -5, 1, 77, 0], dtype=torch.int32).expand(1, 1, 3, 6)
    out, lse = kernels.sparse_attention(q, k, v, count, ids)
    assert not out.isnan().any() and not lse.isnan().any()


@interpreted
def test_no_queries_and_no_keys(kernels, interpreter, poisoned):
    none = torch.zeros(1, 1, 0, dtype=torch.int32), torch.zeros(1, 1, 0, 0, dtype=torch.int32)
    empty, some = torch.zeros(1, 1, 0, 64), torch.randn(1, 1, 5, 64)
    out, lse = kernels.sparse_attention(empty, some, some, *none)
    assert out.shape == (1, 1, 0, 64) and lse.shape == (1, 1, 0)
    index = torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 0, dtype=torch.int32)
    out, lse = kernels.sparse_attention(some, empty, empty, *index, causal=False)
    assert (out == 0).all() and (lse == -math.inf).all()


@interpreted
def test_bad_input_is_named():
    from headstart._library import triton_kernels

    q = torch.randn(1, 1, 70, 64)
    index = torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"sparse_attention: block_count: expected 2 query blocks .* got 1"):
        triton_kernels["sparse_attention"](q, q, q, *index)
    with pytest.raises(ValueError, match=r"merge_attention: lse_a: expected float32 \[1, 1, 70\], got float64"):
        triton_kernels["merge_attention"](q, q[..., 0].double(), q, q[..., 0])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 80, 7])
def test_merge_attention_agrees_with_the_reference(d, dtype, kernels, interpreter, poisoned):
    from headstart.reference import sparse_attention as reference

    out_a, out_b = surrounded(2, 3, 33, d, dtype=dtype), torch.randn(2, 33, 3, d).to(dtype).transpose(1, 2)
    lse_a, lse_b = torch.randn(2, 3, 33) * 20, torch.randn(3, 33, 2).permute(2, 0, 1) * 20
    lse_a[0, 0, :5] = lse_b[0, 0, 3:8] = -math.inf
    out_a[0, 0, :5] = out_b[0, 0, 3:8] = 0
    out, lse = kernels.merge_attention(out_a, lse_a, out_b, lse_b)
    exact, exact_lse = reference.merge_attention(out_a.double(), lse_a.double(), out_b.double(), lse_b.double())
    plain, plain_lse = reference.merge_attention(out_a, lse_a, out_b, lse_b)
    assert_close(out, exact, plain, "out")
    assert_close(lse, exact_lse, plain_lse, "lse")
    assert (out[0, 0, 3:5] == 0).all() and (lse[0, 0, 3:5] == -math.inf).all()


# --- windows, uneven rows, few queries -------------------------------------------------------------------------------


def dense(q, k, v, index, kv_start, window, *, causal=True, scale=None, block_q=64, block_k=64):
    """Attention through a dense mask, in q's dtype."""
    from headstart.reference import sparse_attention as reference

    nq, nk, heads = q.shape[2], k.shape[2], q.shape[1]
    sizes = dict(nq=nq, nk=nk, causal=causal, block_q=block_q, block_k=block_k)
    mask = reference.index_to_mask(*index, kv_start, **sizes)
    mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    if window is not None:
        mask = mask & (torch.arange(nk) > torch.arange(nk - nq, nk)[:, None] - window)
    k, v = (x.nan_to_num(0.0).repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT).mul(q.shape[-1] ** -0.5 if scale is None else scale).masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def compare_dense(kernels, c, window=None):
    c = dict(b=1, bi=None, hq=2, hkv=1, hi=1, d=64, dtype=torch.float16, share=0.6, columns=0, column_rows=1) | c
    c = dict(kv_start=None, causal=True, scale=None, block_q=64, block_k=64) | c
    rows, blocks = -(-c["nq"] // c["block_q"]), -(-c["nk"] // c["block_k"])
    q = surrounded(c["b"], c["hq"], c["nq"], c["d"], dtype=c["dtype"])
    k, v = (surrounded(c["b"], c["hkv"], c["nk"], c["d"], dtype=c["dtype"]) for _ in range(2))
    if window is not None:  # what lies before the first query's window is never read
        k[:, :, : max(0, c["nk"] - c["nq"] - window + 1)] = math.nan
        v[:, :, : max(0, c["nk"] - c["nq"] - window + 1)] = math.nan
    index = random_index((c["b"], c["hi"], rows), blocks, c["share"], c["nk"], c["columns"], c["column_rows"] or rows)
    kv_start = None if c["kv_start"] is None else torch.tensor(c["kv_start"], dtype=torch.int32)
    options = {name: c[name] for name in ("causal", "scale", "block_q", "block_k")}
    out, lse = kernels.sparse_attention(q, k, v, *index, kv_start, **options, **({"window": window} if window else {}))
    exact, exact_lse = dense(*(x.double() for x in (q, k, v)), index, kv_start, window, **options)
    plain, plain_lse = dense(q, k, v, index, kv_start, window, **options)
    assert_close(out, exact, plain, "out")
    assert_close(lse, exact_lse, plain_lse.float(), "lse")
    return q, k, v, index, out, lse


WINDOWS = {
    "blocks": dict(nq=200, nk=200),
    "tall query blocks": dict(nq=200, nk=330, block_q=128, share=1.0),
    "large blocks, columns": dict(nq=140, nk=400, block_q=128, block_k=128, columns=90),
    "left padding": dict(b=2, nq=130, nk=200, kv_start=(90, 0), columns=60),
    "not causal": dict(nq=100, nk=150, causal=False, columns=60, dtype=torch.float32),
}


@interpreted
@pytest.mark.parametrize("case", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("window", [1, 50, 64, 129, 10**9])
def test_window(window, case, kernels, interpreter, poisoned):
    compare_dense(kernels, case, window)


def test_a_window_as_long_as_the_keys_is_none(kernels, monkeypatch):
    if INTERPRETED:
        pytest.skip("about the launch alone")
    q, index = torch.empty(1, 1, 70, 64), random_index((1, 1, 2), 2, 0.5, 70, 0, 1)
    launches = record(monkeypatch, *modules(kernels))
    for window, expected in ((None, False), (69, True), (70, False), (2**40, False)):
        kernels.sparse_attention(q, q, q, *index, window=window)
        assert launches["sparse_attention_kernel"].options["HAS_WINDOW"] is expected


FEW = {
    "grouped heads share a tile": dict(hq=4, hkv=2, nq=1, nk=700, hi=2),
    "one list for all heads": dict(b=2, hq=4, hkv=2, nq=1, nk=500, columns=90),
    "a list for each head": dict(hq=4, hkv=2, hi=4, nq=1, nk=500, columns=90),
    "columns alone": dict(nq=1, nk=900, share=0.0, columns=300),
    "drafted tokens": dict(hq=6, hkv=2, nq=5, nk=600, columns=50, scale=-0.3),
    "left padding, bfloat16": dict(b=2, nq=3, nk=600, kv_start=(599, 130), columns=50, dtype=torch.bfloat16),
    "large blocks, head dim 80": dict(nq=2, nk=900, d=80, block_q=128, block_k=128, columns=50),
    "not causal, float32": dict(nq=4, nk=600, d=24, causal=False, columns=50, dtype=torch.float32),
    "nothing listed": dict(nq=2, nk=600, share=0.0),
}


@interpreted
@pytest.mark.parametrize("case", FEW.values(), ids=FEW.keys())
@pytest.mark.parametrize("window", [None, 300])
def test_few_queries_split_a_long_list(window, case, kernels, interpreter, poisoned, monkeypatch):
    monkeypatch.setattr(kernels.decode, "SPLIT_KEYS", 100)
    splits = []
    split_attention = kernels.decode.split_attention

    def counted(*args, **options):
        splits.append(options["splits"])
        split_attention(*args, **options)

    monkeypatch.setattr(kernels.decode, "split_attention", counted)
    *_, out, lse = compare_dense(kernels, case, window)
    assert splits and splits[0] > 1
    if case == FEW["nothing listed"]:
        assert (out == 0).all() and (lse == -math.inf).all()


SHARED = {
    "one list for all heads": dict(hq=8, hkv=2, nq=1),
    "a list for each key head": dict(hq=8, hkv=2, hi=2, nq=2, columns=60),
    "a list for two heads of a key head's four": dict(hq=8, hkv=2, hi=4, nq=3),
    "a list for three heads, two to a key head": dict(hq=12, hkv=6, hi=4, nq=1),
    "a list for each head": dict(hq=4, hkv=1, hi=4, nq=1, dtype=torch.bfloat16),
    "more heads than a tile has rows": dict(hq=8, hkv=1, nq=7, dtype=torch.float32, columns=60),
}


@interpreted
@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED.keys())
def test_few_queries_of_many_sequences_are_not_split(case, kernels, interpreter, poisoned, monkeypatch):
    limits = kernels.device_limits(torch.device("cpu"))._replace(processors=1)
    monkeypatch.setattr(kernels, "device_limits", lambda device: limits)
    splits = []
    split_attention = kernels.decode.split_attention
    monkeypatch.setattr(
        kernels.decode, "split_attention", lambda *a, **o: splits.append(o["splits"]) or split_attention(*a, **o)
    )
    compare_dense(kernels, dict(b=2, nk=300, kv_start=(0, 130)) | case)
    assert splits == [1]


@pytest.mark.parametrize(
    "hq, hkv, hi, nq, times",
    [(8, 2, 1, 1, 1), (8, 2, 2, 4, 1), (8, 2, 4, 1, 2), (8, 2, 8, 1, 4), (12, 6, 4, 1, 2), (8, 1, 1, 7, 2)],
)
@pytest.mark.parametrize("processors", [1, 10**6])
def test_keys_and_values_are_read_once_for_all_heads_that_may_share_them(
    processors, hq, hkv, hi, nq, times, kernels, monkeypatch
):
    """Each program of the grid's first dimension walks one list once: `times` of them for a KV head, however many
    programs share a walk. 8 heads of 7 queries are 56 rows, two tiles; heads of different lists cannot share."""
    if INTERPRETED:
        pytest.skip("about the launch alone")
    launches = record(monkeypatch, *modules(kernels))
    limits = kernels.device_limits(torch.device("cpu"))._replace(processors=processors)
    monkeypatch.setattr(kernels, "device_limits", lambda device: limits)
    batch, nk = 3, 2048
    q, k = (torch.empty(batch, heads, n, 64, dtype=torch.float16) for heads, n in ((hq, nq), (hkv, nk)))
    lists = torch.zeros(batch, hi, 1, dtype=torch.int32), torch.zeros(batch, hi, 1, nk // 64, dtype=torch.int32)
    kernels.sparse_attention(q, k, k, *lists)
    walks, splits = launches["split_attention_kernel"].grid
    assert walks == batch * hkv * times and (splits == 1) == (processors == 1)
    assert hasattr(launches["merge_splits_kernel"], "grid") == (splits > 1)
    assert not hasattr(launches["sparse_attention_kernel"], "grid")


def test_splits_fill_the_device_and_no_more(kernels):
    choose = kernels.decode.choose_splits
    assert choose(8, 131072, 132) == 33 and choose(32, 131072, 132) == 9  # 264 and 288 programs for 132 SMs
    assert choose(8, 1000, 132) == 3 and choose(8, 100, 132) == 1  # none shorter than 256 keys
    assert choose(512, 131072, 132) == 1 and choose(1, 10**6, 132) == kernels.decode.MAX_SPLITS


@interpreted
@pytest.mark.parametrize("section", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_programs_start_longest_first(causal, section, kernels, interpreter, monkeypatch):
    from headstart.triton import block_lists

    monkeypatch.setattr(block_lists, "LONG_ROW", 1)
    kv_heads, group, tiles, nq, nk = 3, 2, 5, 300, 900
    count, ids, column_count, columns = random_index((1, 6, tiles), 15, 0.5, nk, 300, tiles)
    lists = block_lists.Lists((count, ids, column_count, columns, count), (), (15, 900), True, False)
    lists = lists._replace(strides=(0, *count.stride()[1:], *[0] * 4, 0, *column_count.stride()[1:]))
    shape = dict(nq=nq, nk=nk, tiles=tiles, streams=3, section=section, kv_heads=3, group=group, index_group=1)
    order = block_lists.longest_first(lists, **shape, block_q=64, block_k=64, block_m=64, causal=causal)
    seen = (torch.arange(1, tiles + 1) * 64).clamp(max=nq) + nk - nq
    length = count[0].minimum((seen + 63) // 64) if causal else count[0]
    length = length + column_count[0] // 64
    places = []  # of each program: its section, and its length, by counting through the grid
    for first in range(0, kv_heads, section):
        heads = range(first * group, min(first + section, kv_heads) * group)
        places += [(first, int(length[head, tile])) for tile in reversed(range(tiles)) for head in heads]
    started = [places[i] for i in order.tolist()]
    assert sorted(order.tolist()) == list(range(len(places)))
    assert started == sorted(places, key=lambda x: (x[0], -x[1]))
    ties = [[i for i in order.tolist() if places[i] == place] for place in set(places)]
    assert all(same == sorted(same) for same in ties), "equal rows keep the plain order"


@interpreted
def test_the_order_of_programs_changes_no_result(kernels, interpreter, poisoned, monkeypatch):
    from headstart.triton import block_lists

    case = dict(b=2, hq=4, hkv=2, hi=4, nq=150, nk=300, columns=70, column_rows=None)
    q, k, v, index, out, lse = compare_dense(kernels, case)
    monkeypatch.setattr(block_lists, "LONG_ROW", 1)
    order = []
    longest_first = block_lists.longest_first
    monkeypatch.setattr(kernels, "longest_first", lambda *a, **o: order.append(longest_first(*a, **o)) or order[0])
    sorted_out, sorted_lse = kernels.sparse_attention(q, k, v, *index)
    assert order[0].tolist() != sorted(order[0].tolist())
    assert torch.equal(sorted_out, out) and torch.equal(sorted_lse, lse)


def test_only_long_rows_are_sorted(kernels, monkeypatch):
    if INTERPRETED:
        pytest.skip("about the launch alone")
    launches = record(monkeypatch, *modules(kernels))
    for nq, nk, causal, expected in ((512, 512, True, False), (512, 8192, True, True), (512, 8192, False, True),
                                     (64, 8192, True, False), (512, 2048, True, False)):  # fmt: skip
        q, k = torch.empty(1, 1, nq, 64, dtype=torch.float16), torch.empty(1, 1, nk, 64, dtype=torch.float16)
        lists = torch.zeros(1, 1, nq // 64, dtype=torch.int32), torch.zeros(1, 1, nq // 64, 128, dtype=torch.int32)
        kernels.sparse_attention(q, k, k, *lists, causal=causal)
        assert launches["sparse_attention_kernel"].options["HAS_ORDER"] is expected, (nq, nk, causal)


# --- choice of configuration -----------------------------------------------------------------------------------------


def test_head_dims_are_cut_where_that_wastes_less(kernels):
    for d in range(8, 257, 8):
        d0, d1 = kernels.split_head_dim(d)
        assert d0 + d1 >= d and (d0 & (d0 - 1)) == (d1 & (d1 - 1)) == 0
        assert d0 + d1 <= max(16, 1 << (d - 1).bit_length()) and d0 >= 16 and (d1 == 0 or d1 >= 16)
    assert [kernels.split_head_dim(d) for d in (80, 96, 128, 192)] == [(64, 16), (64, 32), (128, 0), (128, 64)]


def test_every_configuration_fits_its_device(kernels):
    for limits in (kernels.Limits(99 * 1024, 1, False), kernels.Limits(227 * 1024, 1, True)):
        for d in range(8, 257, 8):
            for size in (2, 4):
                for block, masked in itertools.product((64, 128), (True, False)):
                    c = kernels.choose_config(d, 4096, block, block, size, limits, masked)
                    assert block % c.block_m == 0 and block % c.block_n == 0
                    assert c.num_stages >= 1 and min(c.block_m, c.block_n) >= 16
                    assert 2 * c.block_n * (c.d0 + c.d1) * size * c.num_stages <= limits.shared_memory


# --- machine code ----------------------------------------------------------------------------------------------------


def modules(kernels):
    from headstart.triton import block_lists

    return kernels, block_lists, kernels.decode


@compiled
@pytest.mark.parametrize(
    "capability, d, block, columns, window",
    [(80, 64, 64, True, None), (80, 128, 64, False, None), (80, 256, 64, False, None), (80, 128, 128, True, 99)]
    + [(90, 64, 64, False, None), (90, 128, 128, True, None), (90, 256, 64, False, None), (90, 128, 128, True, 99)],
)
def test_sparse_attention_compiles(
    capability, d, block, columns, window, kernels, monkeypatch, tmp_path, record_property, capsys
):
    def call():
        nk, capacity = (512, 8) if window is None else (16384, 128)  # rows long enough to be sorted
        q, k = (torch.empty(1, heads, n, d, dtype=torch.bfloat16) for heads, n in ((4, 512), (2, nk)))
        rows = 512 // block
        index = [torch.zeros(shape, dtype=torch.int32) for shape in ((1, 1, rows), (1, 1, rows, capacity))]
        index += [torch.zeros(shape, dtype=torch.int32) for shape in ((1, 1, 1), (1, 1, 1, 100)) if columns]
        kernels.sparse_attention(q, k, k, *index, block_q=block, block_k=block, window=window)

    binary = compile_launch(modules(kernels), monkeypatch, "sparse_attention_kernel", capability, call)
    assert len(binary.asm["cubin"]) > 0
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in binary.asm["ptx"], "no tensor cores in it"
    used = resources(binary, tmp_path)
    if used is not None:
        record_property("resources", str(used))
        with capsys.disabled():
            print(f"\nsm_{capability} D={d} block={block} columns={columns} window={window}: {used}", end=" ")
        assert used["stack"] == 0, f"spills: {used}"


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_split_attention_compiles(d, capability, kernels, monkeypatch, tmp_path, capsys):
    def call():
        q, k = torch.empty(1, 8, 1, d, dtype=torch.bfloat16), torch.empty(1, 2, 8192, d, dtype=torch.bfloat16)
        shapes = (1, 2, 1), (1, 2, 1, 64), (1, 2, 1), (1, 2, 1, 1000)
        kernels.sparse_attention(q, k, k, *(torch.zeros(shape, dtype=torch.int32) for shape in shapes))

    for name in ("split_attention_kernel", "merge_splits_kernel"):
        binary = compile_launch(modules(kernels), monkeypatch, name, capability, call)
        used = resources(binary, tmp_path)
        assert binary.metadata.shared <= SHARED_MEMORY[capability]
        assert name.startswith("merge") or "mma.sync" in binary.asm["ptx"], "no tensor cores in it"
        assert used is None or used["stack"] == 0, used
        with capsys.disabled():
            print(f"\nsm_{capability} {name} D={d}: {used}", end=" ")


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rest", [False, True], ids=["blocks alone", "columns, window, kv_start"])
@pytest.mark.parametrize(
    "d, dtype, nq, block",
    [(64, torch.bfloat16, 512, 128), (96, torch.bfloat16, 512, 64), (128, torch.bfloat16, 512, 64)]
    + [(128, torch.bfloat16, 512, 128), (192, torch.bfloat16, 512, 64), (256, torch.bfloat16, 512, 64)]
    + [(128, torch.float32, 512, 64), (256, torch.float32, 512, 64)]
    + [(d, dtype, nq, 64) for d in (128, 256) for dtype in (torch.bfloat16, torch.float32) for nq in (1, 8)],
)
def test_no_configuration_spills(capability, d, dtype, nq, block, rest, kernels, monkeypatch, tmp_path):
    def call():
        nk = 16384
        q, k = (torch.empty(1, heads, n, d, dtype=dtype) for heads, n in ((8, nq), (2, nk)))
        shapes = ((1, 1, -(-nq // block)), (1, 1, -(-nq // block), nk // block), (1, 1, 1), (1, 1, 1, 100))
        index = [torch.zeros(shape, dtype=torch.int32) for shape in shapes[: 4 if rest else 2]]
        given = dict(kv_start=torch.zeros(1, dtype=torch.int32), window=99) if rest else {}
        kernels.sparse_attention(q, k, k, *index, block_q=block, block_k=block, **given)

    name = "sparse_attention_kernel" if nq > kernels.decode.MAX_ROWS else "split_attention_kernel"
    binary = compile_launch(modules(kernels), monkeypatch, name, capability, call)
    used = resources(binary, tmp_path)
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    # Of many float32 queries, ptxas spills a few words at 80 registers, with 255 allowed: it wants room for more warps.
    limit = 16 if dtype == torch.float32 and nq > kernels.decode.MAX_ROWS else 0
    assert used is None or used["stack"] <= limit, f"spills: {used}"


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["covered_columns_kernel", "row_work_kernel", "merge_attention_kernel"])
def test_small_kernels_compile(name, capability, kernels, monkeypatch, tmp_path):
    def call():
        x, k = (torch.empty(1, 4, n, 128, dtype=torch.bfloat16) for n in (512, 8192))
        if name == "merge_attention_kernel":
            kernels.merge_attention(x, x[..., 0].float(), x, x[..., 0].float())
        else:
            shapes = (1, 1, 8), (1, 1, 8, 128), (1, 1, 1), (1, 1, 1, 100)
            kernels.sparse_attention(x, k, k, *(torch.zeros(shape, dtype=torch.int32) for shape in shapes))

    binary = compile_launch(modules(kernels), monkeypatch, name, capability, call)
    used = resources(binary, tmp_path)
    assert len(binary.asm["cubin"]) > 0 and (used is None or used["stack"] == 0), used

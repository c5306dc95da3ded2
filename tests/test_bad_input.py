"""Bad input to attention and its index builders: an error that names operator and argument, what was expected and got.

Every case goes three ways, and all must say the same: the compiled kernel, the reference behind it, and the fake kernel
(on tensors without data).
"""

from __future__ import annotations

import math

import pytest
import torch

import headstart
from headstart import BlockIndex
from shapes import Shape

ops = torch.ops.headstart
NAN, INF = math.nan, math.inf
INDEX = ("block_count", "block_index", "column_count", "column_index")


def message(function, *args, **kwargs) -> str:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        function(*args, **kwargs)
    return str(caught.value).splitlines()[0]


def without_data(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x


def expect_three_times(op: str, words: str, kwargs: dict) -> None:
    operator = getattr(ops, op).default
    reference = torch._C.DispatchKey.CompositeExplicitAutograd
    assert message(operator._op_dk, reference, **kwargs) == words, "the reference"
    assert message(operator, **{name: without_data(x) for name, x in kwargs.items()}) == words, "the fake kernel"
    assert message(operator, **kwargs) == words, "the compiled kernel"


def names_of(cases):
    return [f"{case[0]}-{case[2]}".replace(" ", "_") for case in cases]


def strided(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def each(names, change):
    return lambda a: {name: change(a[name]) for name in names}


def to(name, value):
    return lambda a: {name: value(a[name]) if callable(value) else value}


# --- sparse_attention ------------------------------------------------------------------------------------------------

ANY = "float32 or float16 or bfloat16 [B, Hq, Nq, D]"
HEAD_DIM = "a head dim that is a multiple of 8 up to 256"
DENSE = "a contiguous last dimension (stride 1)"
HEADS = "a number of heads that divides q's 4"
WINDOW = "a number of keys, at least 1"
PARTNER = "a tensor, since its partner is given"

BAD = [  # argument, expected, got, what to change
    ("q", ANY, "float64 [2, 4, 150, 16]", to("q", torch.Tensor.double)),
    ("q", ANY, "int8 [2, 4, 150, 16]", to("q", lambda x: x.to(torch.int8))),
    ("q", ANY, "float32 [4, 150, 16]", to("q", lambda x: x[0])),
    ("q", HEAD_DIM, 12, each("qkv", lambda x: x[..., :12])),
    ("q", HEAD_DIM, 264, each("qkv", lambda x: x.repeat(1, 1, 1, 17)[..., :264])),
    ("q", HEAD_DIM, 0, each("qkv", lambda x: x[..., :0])),
    ("q", DENSE, "stride 2", to("q", strided)),
    ("q", "no more queries than the 90 keys (causal)", 150, each("kv", lambda x: x[:, :, :90])),
    ("k", "float32 [2, Hkv, Nk, 16]", "bfloat16 [2, 2, 170, 16]", to("k", torch.Tensor.bfloat16)),
    ("k", "float32 [2, Hkv, Nk, 16]", "float32 [1, 2, 170, 16]", to("k", lambda x: x[:1])),
    ("k", HEADS, 3, each("kv", lambda x: x[:, [0, 0, 1]])),
    ("k", HEADS, 0, each("kv", lambda x: x[:, :0])),
    ("k", DENSE, "stride 170", to("k", lambda x: x.mT.contiguous().mT)),
    ("v", "float32 [2, 2, 170, 16]", "float32 [2, 2, 169, 16]", to("v", lambda x: x[:, :, 1:])),
    ("v", "float32 [2, 2, 170, 16]", "float32 [2, 2, 170, 8]", to("v", lambda x: x[..., :8])),
    ("v", DENSE, "stride 170", to("v", lambda x: x.mT.contiguous().mT)),
    ("block_q", "64 or 128", 32, to("block_q", 32)),
    ("block_k", "64 or 128", 0, to("block_k", 0)),
    ("block_count", "int32 [B, Hi, R]", "int64 [2, 2, 3]", to("block_count", torch.Tensor.long)),
    ("block_count", "int32 [B, Hi, R]", "int16 [2, 2, 3]", to("block_count", torch.Tensor.short)),
    ("block_count", "a batch of 2 or 1", 3, each(INDEX, lambda x: x[[0, 0, 1]])),
    ("block_count", HEADS, 3, each(INDEX, lambda x: x[:, [0, 0, 1]])),
    ("block_count", HEADS, 0, each(INDEX, lambda x: x[:, :0])),
    ("block_count", "3 query blocks (150 queries, block_q 64)", 2, each(INDEX, lambda x: x[:, :, 1:])),
    ("block_count", "2 query blocks (150 queries, block_q 128)", 3, to("block_q", 128)),
    ("block_index", "int32 [2, 2, 3, T]", "float32 [2, 2, 3, 5]", to("block_index", torch.zeros(2, 2, 3, 5))),
    ("block_index", "int32 [2, 2, 3, T]", "int32 [2, 2, 3]", to("block_index", lambda x: x[..., 0])),
    ("column_index", PARTNER, None, to("column_index", None)),
    ("column_count", PARTNER, None, to("column_count", None)),
    ("column_count", "1 or 3 rows", 2, each(INDEX[2:], lambda x: x[:, :, 1:])),
    ("column_count", "int32 [2, 2, R or 1]", "int32 [1, 2, 3]", each(INDEX[2:], lambda x: x[:1])),
    ("column_index", "int32 [2, 2, 3, C]", "int32 [2, 2, 1, 4]", to("column_index", lambda x: x[:, :, :1])),
    ("kv_start", "int32 [2]", "int64 [2]", to("kv_start", torch.Tensor.long)),
    ("kv_start", "int32 [2]", "int32 [1]", to("kv_start", lambda x: x[:1])),
    ("scale", "a finite number", "nan", to("scale", NAN)),
    ("scale", "a finite number", "-inf", to("scale", -INF)),
    ("window", WINDOW, 0, to("window", 0)),
    ("window", WINDOW, -64, to("window", -64)),
]


def good(nq: int = 150) -> dict:
    """Valid arguments; entries past the counts are garbage."""
    q, k, v = Shape(2, 4, 2, nq, 170, 16).qkv(torch.float32)
    rows = -(-nq // 64)
    return dict(
        q=q,
        k=k,
        v=v,
        block_count=torch.full((2, 2, rows), 2, dtype=torch.int32),
        block_index=torch.tensor([0, 1, 0, 99, -1], dtype=torch.int32).repeat(2, 2, rows, 1),
        column_count=torch.full((2, 2, rows), 3, dtype=torch.int32),
        column_index=torch.tensor([3, 8, 150, -9], dtype=torch.int32).repeat(2, 2, rows, 1),
        kv_start=torch.tensor([0, 40], dtype=torch.int32),
        block_q=64,
        block_k=64,
    )


@pytest.mark.parametrize("argument, expected, got, change", BAD, ids=names_of(BAD))
def test_sparse_attention(argument, expected, got, change):
    kwargs = good()
    kwargs |= change(kwargs)
    expect_three_times("sparse_attention", f"sparse_attention: {argument}: expected {expected}, got {got}", kwargs)


@pytest.mark.parametrize("name", ("k", "v", *INDEX, "kv_start"))
def test_a_tensor_on_another_device(name):
    kwargs = good()
    kwargs[name] = kwargs[name].to("meta")
    said = message(ops.sparse_attention, **kwargs)
    assert said.startswith(f"sparse_attention: {name}: expected a tensor on ") and "meta" in said


def put(name: str, *at_and_value: int):
    """One wrong number in an otherwise good list, in the last row."""

    def change(a):
        x = a[name].clone()
        batch, head, *entry, value = at_and_value
        x[(batch, head, -1, *entry)] = value
        return {name: x}

    return change


def blocks_shared(change, dim: int):
    """The lists of blocks are shared by all heads or batches (stride 0); those of columns, where the error is, not."""

    def share(a):
        return {name: a[name].narrow(dim, 0, 1).expand_as(a[name]) for name in INDEX[:2]} | change(a)

    return share


BLOCKS, KEYS = "block ids in [0, 3)", "key positions in [0, 170)"
BAD_IDS = [  # ids are data, which only a kernel on the CPU can look at
    ("block_count", "counts from 0 to 5", 6, put("block_count", 1, 1, 6)),
    ("block_count", "counts from 0 to 5", -1, put("block_count", 0, 1, -1)),
    ("block_index", BLOCKS, 3, put("block_index", 1, 1, 1, 3)),
    ("block_index", BLOCKS, -1, put("block_index", 1, 0, 0, -1)),
    ("block_index", BLOCKS, 2**31 - 1, put("block_index", 0, 0, 1, 2**31 - 1)),
    ("block_index", f"strictly ascending {BLOCKS[:9]}", "1 after 2", put("block_index", 1, 0, 0, 2)),
    ("block_index", f"strictly ascending {BLOCKS[:9]}", "0 after 0", put("block_index", 0, 1, 1, 0)),
    ("column_count", "counts from 0 to 4", 5, put("column_count", 1, 1, 5)),
    ("column_index", KEYS, 170, put("column_index", 1, 1, 2, 170)),
    ("column_index", KEYS, -5, put("column_index", 1, 1, 0, -5)),
    ("column_index", f"strictly ascending {KEYS[:13]}", "8 after 8", put("column_index", 0, 1, 0, 8)),
    ("column_index", KEYS, 171, blocks_shared(put("column_index", 1, 1, 2, 171), dim=1)),
    ("column_index", KEYS, -2, blocks_shared(put("column_index", 1, 0, 0, -2), dim=0)),
    ("column_count", "counts from 0 to 4", 7, blocks_shared(put("column_count", 0, 1, 7), dim=1)),
]


@pytest.mark.parametrize("argument, expected, got, change", BAD_IDS, ids=names_of(BAD_IDS))
@pytest.mark.parametrize("nq", (1, 150), ids=("decode", "prefill"))
def test_ids(cpu_tier, argument, expected, got, change, nq):
    kwargs = good(nq)
    ops.sparse_attention(**kwargs)
    kwargs |= change(kwargs)
    assert message(ops.sparse_attention, **kwargs) == f"sparse_attention: {argument}: expected {expected}, got {got}"


# --- merge_attention and BlockIndex ----------------------------------------------------------------------------------

OUT = "float32 or float16 or bfloat16 [B, H, N, D]"
BAD_MERGE = [
    ("out_a", OUT, "float64 [1, 2, 5, 8]", to("out_a", torch.Tensor.double)),
    ("out_a", OUT, "float32 [2, 5, 8]", to("out_a", lambda x: x[0])),
    ("out_a", DENSE, "stride 5", to("out_a", lambda x: x.mT.contiguous().mT)),
    ("lse_a", "float32 [1, 2, 5]", "float16 [1, 2, 5]", to("lse_a", torch.Tensor.half)),
    ("lse_a", "float32 [1, 2, 5]", "float32 [1, 2, 4]", to("lse_a", lambda x: x[..., 1:])),
    ("out_b", "float32 [1, 2, 5, 8]", "bfloat16 [1, 2, 5, 8]", to("out_b", torch.Tensor.bfloat16)),
    ("out_b", "float32 [1, 2, 5, 8]", "float32 [1, 1, 5, 8]", to("out_b", lambda x: x[:, :1])),
    ("out_b", DENSE, "stride 2", to("out_b", strided)),
    ("lse_b", "float32 [1, 2, 5]", "float32 [1, 2, 5, 1]", to("lse_b", lambda x: x[..., None])),
]


@pytest.mark.parametrize("argument, expected, got, change", BAD_MERGE, ids=names_of(BAD_MERGE))
def test_merge_attention(argument, expected, got, change):
    out, lse = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5)
    kwargs = dict(out_a=out, lse_a=lse, out_b=out, lse_b=lse)
    kwargs |= change(kwargs)
    expect_three_times("merge_attention", f"merge_attention: {argument}: expected {expected}, got {got}", kwargs)


def test_block_index():
    q, k, v = Shape(1, 2, 2, 70, 70, 8).qkv(torch.float32)
    count, ids = torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 3, dtype=torch.int32)
    for make, words in (
        (
            lambda: headstart.sparse_attention(q, k, v, (count, ids)),
            "sparse_attention: index: expected a BlockIndex, got tuple",
        ),
        (lambda: BlockIndex(count, ids, block_q=32), "BlockIndex: block_q: expected 64 or 128, got 32"),
        (lambda: BlockIndex(count, ids, block_k=96), "BlockIndex: block_k: expected 64 or 128, got 96"),
        (
            lambda: BlockIndex(count, ids[:, :, :1]),
            "BlockIndex: block_index: expected int32 [1, 1, 2, T], got int32 [1, 1, 1, 3]",
        ),
        (
            lambda: BlockIndex(count.long(), ids),
            "BlockIndex: block_count: expected int32 [B, Hi, R], got int64 [1, 1, 2]",
        ),
        (
            lambda: BlockIndex(count, ids, count),
            "BlockIndex: column_index: expected a tensor, since its partner is given, got None",
        ),
        (lambda: BlockIndex(count, [0]), "BlockIndex: block_index: expected a tensor, got list"),
        (
            lambda: BlockIndex(count, ids).to_mask(70, 70, window=0),
            "BlockIndex.to_mask: window: expected a number of keys, at least 1, got 0",
        ),
        (
            lambda: BlockIndex.from_mask(q),
            "BlockIndex.from_mask: mask: expected bool [B, H, Nq, Nk], got float32 [1, 2, 70, 8]",
        ),
    ):
        assert message(make) == words


# --- index builders --------------------------------------------------------------------------------------------------

REQUIRED = {
    "vertical_slash_index": dict(vertical_size=10, slash_size=10),
    "block_topk_index": dict(top_k=2),
    "adaptive_block_index": {},
}
TOKENS, SHARE, POSITIVE = "a number of tokens, at least 0", "a share of the mass, above 0 and up to 1", "at least 1"
BAD_FOR_ALL = [
    ("q", ANY, "float64 [2, 4, 100, 16]", to("q", torch.Tensor.double)),
    ("q", ANY, "float32 [2, 4, 100, 16, 1]", to("q", lambda x: x[..., None])),
    ("q", HEAD_DIM, 4, each("qk", lambda x: x[..., :4])),
    ("q", DENSE, "stride 2", to("q", strided)),
    ("q", "no more queries than the 99 keys (causal)", 100, to("k", lambda x: x[:, :, :99])),
    ("q", "at least one query", 0, to("q", lambda x: x[:, :, :0])),
    ("k", "float32 [2, Hkv, Nk, 16]", "float16 [2, 2, 130, 16]", to("k", torch.Tensor.half)),
    ("k", HEADS, 3, to("k", lambda x: x[:, [0, 0, 1]])),
    ("k", DENSE, "stride 2", to("k", strided)),
    ("sink", TOKENS, -1, to("sink", -1)),
    ("local", TOKENS, -64, to("local", -64)),
    ("block_q", "64 or 128", 256, to("block_q", 256)),
    ("block_k", "64 or 128", 1, to("block_k", 1)),
    ("kv_start", "int32 [2]", "float32 [2]", to("kv_start", torch.Tensor.float)),
    ("kv_start", "int32 [2]", "int32 [3]", to("kv_start", lambda x: x[[0, 1, 1]])),
]
BAD_FOR_ONE = {
    "vertical_slash_index": [
        ("vertical_size", POSITIVE, 0, to("vertical_size", 0)),
        ("slash_size", POSITIVE, -5, to("slash_size", -5)),
        ("last_q", POSITIVE, 0, to("last_q", 0)),
        ("max_blocks", POSITIVE, 0, to("max_blocks", 0)),
        ("max_columns", POSITIVE, -1, to("max_columns", -1)),
        ("scale", "a finite number", "inf", to("scale", INF)),
    ],
    "block_topk_index": [("top_k", POSITIVE, 0, to("top_k", 0))],
    "adaptive_block_index": [
        ("threshold", SHARE, "nan", to("threshold", NAN)),
        ("threshold", SHARE, "1.5", to("threshold", 1.5)),
        ("threshold", SHARE, "0.0", to("threshold", 0.0)),
        ("threshold", SHARE, "-0.5", to("threshold", -0.5)),
        ("stride", "4, 8, 16 or 32", 5, to("stride", 5)),
        ("stride", "4, 8, 16 or 32", 64, to("stride", 64)),
        ("samples", "a number of queries from 0 to 64", -1, to("samples", -1)),
        ("samples", "a number of queries from 0 to 64", 65, to("samples", 65)),
        ("max_blocks", POSITIVE, 0, to("max_blocks", 0)),
        ("scale", "a finite number", "nan", to("scale", NAN)),
        ("head_threshold", "float32 [4]", "float32 [2]", to("head_threshold", torch.ones(2))),
        ("head_threshold", "float32 [4]", "float64 [4]", to("head_threshold", torch.ones(4).double())),
    ],
}
BAD_BUILDER = [(op, *case) for op in REQUIRED for case in BAD_FOR_ALL + BAD_FOR_ONE[op]]


def good_builder(op: str) -> dict:
    q, k, _ = Shape(2, 4, 2, 100, 130, 16).qkv(torch.float32)
    return dict(q=q, k=k, kv_start=torch.tensor([0, 40], dtype=torch.int32)) | REQUIRED[op]


@pytest.mark.parametrize(
    "op, argument, expected, got, change",
    BAD_BUILDER,
    ids=[f"{case[0]}-{name}" for case, name in zip(BAD_BUILDER, names_of([case[1:] for case in BAD_BUILDER]))],
)
def test_index_builders(op, argument, expected, got, change):
    kwargs = good_builder(op)
    kwargs |= change(kwargs)
    expect_three_times(op, f"{op}: {argument}: expected {expected}, got {got}", kwargs)


@pytest.mark.parametrize("name", ("k", "kv_start", "head_threshold"))
def test_a_builder_with_a_tensor_on_another_device(name):
    kwargs = good_builder("adaptive_block_index") | dict(head_threshold=torch.ones(4))
    kwargs[name] = kwargs[name].to("meta")
    said = message(ops.adaptive_block_index, **kwargs)
    assert said.startswith(f"adaptive_block_index: {name}: expected a tensor on ") and "meta" in said


@pytest.mark.parametrize("value", (NAN, 0.0, -1.0, 1.5))
def test_head_thresholds(value):
    """They are data: a kernel on the CPU looks at them."""
    kwargs = good_builder("adaptive_block_index") | dict(head_threshold=torch.tensor([0.5, 1.0, value, 0.1]))
    said = message(ops.adaptive_block_index, **kwargs)
    assert said.startswith(
        "adaptive_block_index: head_threshold: expected shares of the mass, above 0 and up to 1, got "
    )


A_SHAPE = [
    ("nq", "at least one query", 0, dict(nq=0)),
    ("nk", "at least as many keys as the 100 queries", 99, dict(nk=99)),
    ("sink", TOKENS, -1, dict(sink=-1)),
    ("local", TOKENS, -1, dict(local=-1)),
    ("block_q", "64 or 128", 63, dict(block_q=63)),
    ("block_k", "64 or 128", 16, dict(block_k=16)),
    ("kv_start", "int32 [B]", "int64 [2]", dict(kv_start=torch.zeros(2, dtype=torch.int64))),
    ("kv_start", "int32 [B]", "int32 []", dict(kv_start=torch.tensor(0, dtype=torch.int32))),
]


@pytest.mark.parametrize("argument, expected, got, change", A_SHAPE, ids=names_of(A_SHAPE))
def test_a_shape_index(argument, expected, got, change):
    kwargs = dict(nq=100, nk=130, sink=4, local=64) | change
    assert message(headstart.a_shape_index, **kwargs) == f"a_shape_index: {argument}: expected {expected}, got {got}"
    assert message(ops.a_shape_index, **kwargs) == f"a_shape_index: {argument}: expected {expected}, got {got}"
    on_meta = kwargs | dict(device=torch.device("meta"), kv_start=without_data(kwargs.get("kv_start")))
    assert message(ops.a_shape_index, **on_meta) == f"a_shape_index: {argument}: expected {expected}, got {got}"

"""The contract of the attention operators: `opcheck`, fake kernels that give the real shapes, whole graphs.

An operator here passes torch's own checks, runs on tensors without data, and compiles once for all sizes.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo import testing

import headstart
import shapes
from headstart import BlockIndex
from shapes import DTYPES, Shape

ops = torch.ops.headstart
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def by_shape(cases):
    return pytest.mark.parametrize("shape", cases, ids=str)


# --- sparse_attention, merge_attention -------------------------------------------------------------------------------


def arguments(shape: Shape, dtype=torch.float32) -> dict:
    index = shape.random_index()
    names = ("q", "k", "v", "block_count", "block_index", "column_count", "column_index", "kv_start")
    values = (*shape.qkv(dtype), index.block_count, index.block_index, index.column_count, index.column_index)
    return dict(zip(names, (*values, shape.start()))) | dict(
        block_q=shape.block_q, block_k=shape.block_k, window=shape.window
    )


CONTRACT = [
    Shape(2, 4, 2, 100, 130, 16, heads_index=2, columns="own", kv_start=(0, 40)),
    Shape(1, 3, 1, 1, 70, 8, columns="shared"),
    Shape(1, 2, 2, 130, 130, 24, block_q=128),
    Shape(1, 2, 1, 130, 200, 16, columns="own", window=70),
]


@by_dtype
@by_shape(CONTRACT)
@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
def test_opcheck(dtype, shape, permuted):
    kwargs = arguments(shape, dtype)
    if permuted:
        kwargs |= {name: kwargs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    torch.library.opcheck(ops.sparse_attention.default, (), kwargs)
    out, lse = ops.sparse_attention(**kwargs)
    if permuted:
        out, lse = out.transpose(1, 2).contiguous().transpose(1, 2), lse.mT.contiguous().mT
    torch.library.opcheck(ops.merge_attention.default, (out, lse, out, lse))


@by_shape(CONTRACT)
def test_meta_tensors_have_the_same_shapes(shape):
    kwargs = arguments(shape)
    real = ops.sparse_attention(**kwargs)
    meta = ops.sparse_attention(**{n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()})
    pairs = [*zip(real, meta), *zip(ops.merge_attention(*real, *real), ops.merge_attention(*meta, *meta))]
    for a, b in pairs:
        assert (a.shape, a.dtype, a.stride(), b.device.type) == (b.shape, b.dtype, b.stride(), "meta")


def test_compiles_whole_and_dynamic():
    def attend(q, k, v, count, ids, columns, keys, start, window):
        index = BlockIndex(count, ids, columns, keys)
        out, lse = headstart.sparse_attention(q, k, v, index, kv_start=start, window=window)
        return headstart.merge_attention(out, lse, out, lse)

    counter = testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for shape in (CONTRACT[0], CONTRACT[0].with_(nq=200, nk=333), CONTRACT[0].with_(nq=70, nk=150)):
        inputs = [*list(arguments(shape).values())[:8], shape.nq // 2]
        for got, want in zip(compiled(*inputs), attend(*inputs)):
            assert torch.equal(got, want)
    assert counter.frame_count <= 2, "recompiled for every size"


# --- index builders --------------------------------------------------------------------------------------------------

BUILDERS = {
    "vertical_slash": lambda q, k: headstart.vertical_slash_index(q, k, 40, 200),
    "block_topk": lambda q, k: headstart.block_topk_index(q, k, 3),
    "adaptive": lambda q, k: headstart.adaptive_block_index(q, k, 0.8),
    "adaptive, sampled": lambda q, k: headstart.adaptive_block_index(q, k, 0.8, samples=4),
}
by_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
REQUIRED = {
    "vertical_slash_index": dict(vertical_size=40, slash_size=200),
    "block_topk_index": dict(top_k=2),
    "adaptive_block_index": dict(threshold=0.8),
}
by_op = pytest.mark.parametrize("op", REQUIRED)


@by_op
@by_dtype
@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
def test_opcheck_index_builders(op, dtype, permuted):
    for shape in (Shape(2, 4, 2, 100, 130, 16, kv_start=(0, 40)), Shape(1, 3, 1, 200, 300, 24, block_q=128)):
        q, k, _ = shape.qkv(dtype)
        if permuted:
            q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        options = REQUIRED[op] | dict(kv_start=shape.start(), block_q=shape.block_q)
        torch.library.opcheck(getattr(ops, op).default, (q, k), options)


def test_opcheck_a_shape():
    for start in (None, torch.tensor([0, 70], dtype=torch.int32)):
        torch.library.opcheck(ops.a_shape_index.default, (100, 130), dict(sink=4, local=64, kv_start=start))


@by_op
@pytest.mark.parametrize("options", ({}, dict(max_blocks=1), dict(block_q=128, block_k=128)), ids=str)
def test_meta_tensors_of_index_builders(op, options):
    if op == "block_topk_index" and "max_blocks" in options:
        pytest.skip("top_k is its cap")
    for shape in (s for s in shapes.BUILDERS if not s.kv_start):
        q, k, _ = shape.qkv(torch.bfloat16)
        real = getattr(ops, op)(q, k, **REQUIRED[op], **options)
        meta = getattr(ops, op)(q.to("meta"), k.to("meta"), **REQUIRED[op], **options)
        for a, b in zip(real, meta):
            assert (a.shape, a.dtype, a.stride(), b.device.type) == (b.shape, b.dtype, b.stride(), "meta")


@by_builder
def test_index_builders_compile_whole_and_dynamic(build):
    def attend(q, k):
        return headstart.sparse_attention(q, k, k, build(q, k))

    counter = testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for nq, nk in ((100, 130), (200, 333), (300, 301)):
        q, k, _ = Shape(1, 4, 2, nq, nk, 16).qkv(torch.float32)
        for got, want in zip(compiled(q, k), attend(q, k)):
            assert torch.equal(got, want)
    assert counter.frame_count <= 2, "recompiled for every size"


def test_a_shape_compiles():
    def attend(q, k):
        index = headstart.a_shape_index(q.shape[2], k.shape[2], sink=4, local=70)
        return headstart.sparse_attention(q, k, k, index)[0]

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for nq, nk in ((100, 130), (200, 333)):
        q, k, _ = Shape(1, 4, 2, nq, nk, 16).qkv(torch.float32)
        assert torch.equal(compiled(q, k), attend(q, k))

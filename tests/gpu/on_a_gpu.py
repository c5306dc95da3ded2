"""What the GPU tests share: inputs between NaN tokens, the comparison with the reference, graphs and waiting."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import headstart
from headstart import BlockIndex, _library
from headstart.reference import sparse_attention as reference
from tolerances import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BUILDERS = {
    "vertical_slash": lambda q, k: headstart.vertical_slash_index(q, k, 60, 256),
    "block_topk": lambda q, k: headstart.block_topk_index(q, k, 4),
    "adaptive": lambda q, k: headstart.adaptive_block_index(q, k, threshold=0.9, stride=8),
    "adaptive, sampled": lambda q, k: headstart.adaptive_block_index(q, k, threshold=0.9, stride=16, samples=4),
}


def tokens(b: int, h: int, n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """Random [B, H, N, D] between NaN tokens, so that a read outside them shows."""
    x = torch.full((b, h, n + 192, d), math.nan, dtype=dtype, device="cuda")
    x[:, :, 64 : 64 + n] = torch.randn(b, h, n, d).to(dtype)
    return x[:, :, 64 : 64 + n]


def random_index(b, hi, nq, nk, share=0.3, columns=0, column_rows=None, block_q=64, block_k=64) -> BlockIndex:
    rows = -(-nq // block_q)
    lists = list(reference.compact(torch.rand(b, hi, rows, -(-nk // block_k)) < share))
    if columns:
        lists += reference.compact(torch.rand(b, hi, column_rows or rows, nk) < columns / nk)
    return BlockIndex(*lists, block_q=block_q, block_k=block_k).to("cuda")


def compare(q, k, v, index: BlockIndex, *, causal=True, scale=None, kv_start=None):
    out, lse = headstart.sparse_attention(q, k, v, index, causal=causal, scale=scale, kv_start=kv_start)
    moved = index.to("cpu")
    lists = moved.block_count, moved.block_index, moved.column_count, moved.column_index
    start = None if kv_start is None else kv_start.cpu()
    options = dict(causal=causal, scale=scale, block_q=index.block_q, block_k=index.block_k)
    exact, exact_lse = reference.sparse_attention(*(x.cpu().double() for x in (q, k, v)), *lists, start, **options)
    plain, plain_lse = reference.sparse_attention(*(x.cpu() for x in (q, k, v)), *lists, start, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert_close(out.cpu(), exact, plain, "out")
    assert_close(lse.cpu(), exact_lse.double(), plain_lse, "lse")
    return out, lse


def on_the_gpu(x):
    """The same tensor there: its strides, its offset, and what surrounds it."""
    if not isinstance(x, torch.Tensor):
        return x
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return whole.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def as_mask(count: torch.Tensor, ids: torch.Tensor, limit: int) -> torch.Tensor:
    used = torch.arange(ids.shape[-1]) < count.unsqueeze(-1)
    mask = torch.zeros(*count.shape, limit + 1, dtype=torch.bool)
    return mask.scatter_(-1, torch.where(used, ids, limit).long(), True)[..., :limit]


def cuda_kernel(name: str):
    """An operator, which must run from `_cuda.so` here."""
    server = _library.served_by(name, "CUDA")
    assert server == "_cuda.so", f"{name} runs on {server}, not from _cuda.so"
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.headstart, packet), overload or "default")


def expect_no_wait(step: Callable) -> None:
    """Runs a step in which nothing may wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def expect_same_when_replayed(step: Callable, change: Callable) -> None:
    """Captures a step as a CUDA graph; replayed after changes of its inputs, it must give what the step gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        change()
        graph.replay()
        fresh = step()
        pairs = [(captured, fresh)] if isinstance(captured, torch.Tensor) else zip(captured, fresh)
        assert all(torch.equal(got, want) for got, want in pairs)

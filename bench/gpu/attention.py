"""Sparse attention on a GPU: prompts, decoding in batches, and merging; 32 query heads on 8 KV heads, bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import headstart
from clock import Clock, Results, expect_right
from headstart import BlockIndex
from headstart.reference import sparse_attention as reference

HEADS, KV_HEADS = 32, 8
# Tokens, head dim, size of blocks: what decides most comes first.
PROMPTS = ((8192, 128, 64), (8192, 128, 128), (32768, 128, 64), (32768, 128, 128), (8192, 64, 64), (32768, 64, 64),
           (131072, 128, 64), (131072, 64, 64))  # fmt: skip
DENSITIES = (1.0, 0.25, 0.1, 0.05)
# Sequences, keys of each, the share of their blocks that are listed.
DECODE = ((1, 8192, 1.0), (1, 131072, 1.0), (1, 131072, 0.1), (16, 8192, 1.0), (17, 8192, 1.0), (16, 8192, 0.2),
          (64, 8192, 1.0), (64, 8192, 0.2))  # fmt: skip
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def causal_index(n: int, density: float, block: int) -> tuple[BlockIndex, torch.Tensor]:
    """An index of random blocks, the first and the diagonal among them, with this share of the causal pairs."""
    blocks = n // block
    rows = torch.arange(blocks, device="cuda")
    causal = rows[None, :] <= rows[:, None]
    if density >= 1:
        selected = causal.expand(1, 1, -1, -1)
    else:
        scores = torch.rand(1, HEADS, blocks, blocks, device="cuda").masked_fill_(~causal, -1)
        scores[..., 0] = 2
        scores.diagonal(dim1=-2, dim2=-1).fill_(2)
        wanted = (density * (rows + 1)).ceil().long().clamp(min=1)
        ordered = scores.sort(-1, descending=True).values
        limit = ordered.gather(-1, (wanted - 1).expand(1, HEADS, -1).unsqueeze(-1))
        selected = causal & (scores >= limit)
    count, ids = reference.compact(selected)
    return BlockIndex(count, ids[..., : int(count.max())].contiguous(), block_q=block, block_k=block), count


def largest_error(q, k, v, index: BlockIndex, out: torch.Tensor) -> float:
    """Over a few query blocks of a few heads, against float32 attention over the listed keys."""
    worst = 0.0
    n, block = q.shape[2], index.block_q
    for head in (0, HEADS - 1):
        listed = head * index.block_count.shape[1] // HEADS
        for row in {0, n // block // 2, n // block - 1}:
            ids = index.block_index[0, listed, row, : int(index.block_count[0, listed, row])].long()
            keys = (ids[:, None] * block + torch.arange(block, device="cuda")).flatten()
            queries = row * block + torch.arange(block, device="cuda")
            kv_head = head * KV_HEADS // HEADS
            scores = q[0, head, queries].float() @ k[0, kv_head, keys].float().T / math.sqrt(q.shape[-1])
            scores.masked_fill_(keys[None, :] > queries[:, None], -math.inf)
            exact = scores.softmax(-1) @ v[0, kv_head, keys].float()
            worst = max(worst, float((out[0, head, queries].float() - exact).abs().max()))
    return worst


def dense_calls(q, k, v, causal: bool = True) -> dict[str, Callable]:
    """torch's own attention, each backend that this build and GPU have."""
    calls = {}
    for name, backend in BACKENDS.items():

        def call(backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        try:
            call()
        except RuntimeError:
            continue
        calls[name] = call
    return calls


def prompt(clock: Clock, results: Results, n: int, d: int, block: int) -> None:
    q = torch.randn(1, HEADS, n, d, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(1, KV_HEADS, n, d, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    dense = dense_calls(q, k, v)
    for density in DENSITIES:
        index, count = causal_index(n, density, block)
        # Pairs as the definition counts them: half of each diagonal block, every other listed block whole.
        rows = n // block
        listed = int(count.sum()) * (HEADS // count.shape[1])
        pairs = (listed - HEADS * rows) * block**2 + HEADS * rows * block * (block + 1) // 2
        dense_pairs = HEADS * n * (n + 1) // 2
        case = {"tokens": n, "head_dim": d, "block": block, "density": round(pairs / dense_pairs, 4)}
        error = largest_error(q, k, v, index, headstart.sparse_attention(q, k, v, index)[0])
        expect_right("sparse_attention", case, error, 0.03)
        ms = clock.cold({**dense, "headstart": lambda index=index: headstart.sparse_attention(q, k, v, index)})
        tflops = 4 * pairs * d / ms["headstart"] / 1e9
        figures = {"tflops": tflops, "of_matmul": tflops / results.limits["bf16_matmul_tflops"], "error": error}
        if dense:
            best = min(ms[name] for name in dense)
            figures |= {"speedup": best / ms["headstart"], "dense_tflops": 4 * dense_pairs * d / best / 1e9}
        results.add("sparse_attention", case, ms, **figures)


def decode(clock: Clock, results: Results, batch: int, n: int, density: float, d: int = 128, block: int = 64) -> None:
    """One query of every sequence, an index for each KV head."""
    read = int(2 * batch * KV_HEADS * n * d * 2 * density)
    sets = []
    for _ in range(min(clock.copies(read), max(2, 2**33 // (2 * batch * KV_HEADS * n * d * 2)))):
        q = torch.randn(batch, HEADS, 1, d, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.randn(batch, KV_HEADS, n, d, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        blocks = n // block
        chosen = torch.rand(batch, KV_HEADS, 1, blocks, device="cuda").argsort(-1) < max(1, round(density * blocks))
        sets.append((q, k, v, BlockIndex(*reference.compact(chosen), block_q=block, block_k=block)))
    q, k, v, index = sets[0]
    case = {"sequences": batch, "keys": n, "head_dim": d, "density": density}
    keys = index.to_mask(1, n).repeat_interleave(HEADS // KV_HEADS, 1)
    scores = (q.float() @ k.float().repeat_interleave(HEADS // KV_HEADS, 1).mT / math.sqrt(d)).masked_fill(
        ~keys, -math.inf
    )
    exact = scores.softmax(-1) @ v.float().repeat_interleave(HEADS // KV_HEADS, 1)
    error = float((headstart.sparse_attention(q, k, v, index)[0].float() - exact).abs().max())
    expect_right("sparse_attention", case, error, 0.03)
    calls = {"headstart": [lambda s=s: headstart.sparse_attention(*s) for s in sets]}
    for name in dense_calls(q, k, v, causal=False):
        calls[name] = [dense_calls(*s[:3], causal=False)[name] for s in sets]
    ms = clock.rotated(calls)
    gbps = read / ms["headstart"] / 1e6
    results.add("sparse_attention", case, ms, gbps=gbps, of_read=gbps / results.limits["read_gbps"], error=error)


def merge(clock: Clock, results: Results, n: int, d: int = 128) -> None:
    out_a, out_b = (torch.randn(1, HEADS, n, d, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    lse_a, lse_b = (torch.randn(1, HEADS, n, device="cuda") for _ in range(2))
    parts = out_a, lse_a, out_b, lse_b
    case = {"tokens": n, "head_dim": d}
    error = float((headstart.merge_attention(*parts)[0] - reference.merge_attention(*parts)[0]).abs().max())
    expect_right("merge_attention", case, error, 0.05)
    ms = clock.cold(
        {"torch": lambda: reference.merge_attention(*parts), "headstart": lambda: headstart.merge_attention(*parts)}
    )
    gbps = (3 * out_a.nbytes + 3 * lse_a.nbytes) / ms["headstart"] / 1e6
    results.add("merge_attention", case, ms, gbps=gbps, of_copy=gbps / results.limits["copy_gbps"], error=error)

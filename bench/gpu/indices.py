"""Every index builder on a GPU, beside the sparse attention that its index saves; 32 query heads on 8, D 128."""

from __future__ import annotations

import torch

import headstart
from attention import HEADS, KV_HEADS, causal_index
from clock import Clock, Results, expect_right

LENGTHS = (8192, 32768, 131072)
DENSITY = 0.1  # of the sparse attention beside which a builder's time is held
BUILDERS = {
    "a_shape_index": ("", lambda q, k: headstart.a_shape_index(q.shape[2], k.shape[2], sink=128, local=1024,
                                                               device="cuda")),
    "vertical_slash_index": ("", lambda q, k: headstart.vertical_slash_index(q, k, 1000, 6096)),
    "block_topk_index": ("", lambda q, k: headstart.block_topk_index(q, k, 100)),
    "adaptive_block_index": ("stride 8", lambda q, k: headstart.adaptive_block_index(q, k, 0.95, stride=8)),
    "adaptive_block_index, sampled": (
        "stride 16, 4 samples", lambda q, k: headstart.adaptive_block_index(q, k, 0.93, stride=16, samples=4)
    ),
}  # fmt: skip


def builders(clock: Clock, results: Results, n: int, d: int = 128) -> None:
    q = torch.randn(1, HEADS, n, d, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(1, KV_HEADS, n, d, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    sparse, _ = causal_index(n, DENSITY, 64)
    attention = clock.cold({"sparse": lambda: headstart.sparse_attention(q, k, v, sparse)})["sparse"]
    for name, (options, build) in BUILDERS.items():
        op, case = name.partition(",")[0], {"tokens": n, "head_dim": d} | ({"options": options} if options else {})
        index = build(q, k)
        ids, used = index.block_index, index.block_count.unsqueeze(-1)
        listed = torch.arange(ids.shape[-1], device="cuda") < used
        wrong = float((listed & ((ids < 0) | (ids >= -(-n // index.block_k)))).sum())
        expect_right(op, case, wrong, 1)
        ms = clock.cold({"headstart": lambda build=build: build(q, k)})
        results.add(op, case, ms, of_sparse_attention=ms["headstart"] / attention)

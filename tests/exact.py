"""Sparse attention by its definition, for the tests: loops and plain torch, sharing no code with the package."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from headstart import BlockIndex
from shapes import Shape

INF = math.inf


def dense_mask(index: BlockIndex, shape: Shape) -> torch.Tensor:
    """bool [B, Hq, Nq, Nk], by the definition: union of blocks and columns, cut by causality, padding, window."""
    s, (batch, heads, rows) = shape, index.block_count.shape
    mask = torch.zeros(batch, heads, s.nq, s.nk, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                seen = mask[b, h, r * index.block_q : (r + 1) * index.block_q]
                for block in index.block_index[b, h, r, : int(index.block_count[b, h, r])].tolist():
                    seen[:, block * index.block_k : (block + 1) * index.block_k] = True
                if index.column_count is not None:
                    c = min(r, index.column_count.shape[2] - 1)
                    seen[:, index.column_index[b, h, c, : int(index.column_count[b, h, c])].long()] = True
    mask = mask.expand(s.batch, -1, -1, -1).repeat_interleave(s.heads_q // heads, 1)
    if s.causal:
        mask &= torch.ones(s.nq, s.nk, dtype=torch.bool).tril(s.nk - s.nq)
    if s.window is not None:
        mask &= torch.ones(s.nq, s.nk, dtype=torch.bool).triu(s.nk - s.nq - s.window + 1)
    for b, start in enumerate(s.kv_start or ()):
        mask[b, :, :, :start] = False
    return mask


def by_torch(q, k, v, mask, scale=None, dtype=None):
    """(out, lse) of masked attention by plain torch in `dtype`; 0 and -inf for a query that sees nothing."""
    q, k, v = (x.to(dtype or q.dtype) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    seen = mask.any(-1, keepdim=True)
    if q.dtype == torch.float64:
        scores = ((q @ k.mT) * scale).masked_fill(~mask, -INF)
        out = scores.softmax(-1).masked_fill(~seen, 0) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).masked_fill(~seen, 0)
        scores = ((q.float() @ k.float().mT) * scale).masked_fill(~mask, -INF)
    return out, scores.logsumexp(-1)

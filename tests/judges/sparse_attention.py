"""How sparse_attention and merge_attention are judged: against float64, by their definitions, in loops and plain torch.

`op` is the operator under test, with the signature of the one in `torch.ops.headstart`. No code is the package's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from headstart import BlockIndex
from shapes import DTYPES, Shape
from tolerances import FLOOR, assert_close, error

NAN, INF = math.nan, math.inf
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def attend(op: Callable, q, k, v, index: BlockIndex, kv_start=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    lists = index.block_count, index.block_index, index.column_count, index.column_index
    return op(q, k, v, *lists, kv_start, block_q=index.block_q, block_k=index.block_k, **options)


def surrounded(x: torch.Tensor) -> torch.Tensor:
    """The same numbers between NaN tokens, so that a read outside a head's tokens shows."""
    b, h, n, d = x.shape
    return torch.full((b, h, n + 192, d), NAN, dtype=x.dtype)[:, :, 64 : 64 + n].copy_(x)


# --- the definition --------------------------------------------------------------------------------------------------


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


# --- attention -------------------------------------------------------------------------------------------------------


def check(op, q, k, v, index: BlockIndex, shape: Shape, scale=None, kv_start=None, unread=0):
    """Holds an operator against float64 and returns what it gave. The first `unread` keys are NaN and not seen."""
    start = shape.start() if kv_start is None else kv_start
    out, lse = attend(op, q, k, v, index, start, causal=shape.causal, scale=scale, window=shape.window)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    if unread > 0:
        k, v = (x.index_fill(2, torch.arange(unread), 0) for x in (k, v))
    mask = dense_mask(index, shape)
    exact_out, exact_lse = by_torch(q, k, v, mask, scale, torch.float64)
    # In float32, torch's own error depends on the order in which its product adds the head dims up. CPUs differ in this
    # order, and where logits are large, the errors differ by a factor of ten. The bar is the largest of a few.
    d = q.shape[-1]
    orders = [torch.arange(d), *(torch.randperm(d) for _ in range(7 if q.dtype == torch.float32 else 0))]
    by_order = [by_torch(q[..., order], k[..., order], v, mask, scale) for order in orders]
    for got, exact, results, what in zip((out, lse), (exact_out, exact_lse), zip(*by_order), ("out", "lse")):
        errors = [error(result, exact) for result in results]
        largest = max(range(len(errors)), key=lambda i, errors=errors: errors[i] if errors[i] < INF else -1)
        assert_close(got, exact, results[largest if errors[0] < INF else 0], what)
    return out, lse


def check_case(op, shape: Shape, dtype, scale=None, unread=0):
    """A random index, over tokens between NaNs, of which the first `unread` are NaN too."""
    q, k, v = (surrounded(x) for x in shape.qkv(dtype))
    k[:, :, :unread], v[:, :, :unread] = NAN, NAN
    return check(op, q, k, v, shape.random_index(), shape, scale, unread=unread)


def keys_before_every_window(shape: Shape) -> int:
    return 0 if shape.window is None else max(0, shape.nk - shape.nq - shape.window + 1)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values behind other strides and addresses."""
    b, h, n, d = x.shape
    offset = torch.full((x.numel() + 3,), NAN, dtype=x.dtype)[3:].view(x.shape)
    wide = torch.full((b + 1, h + 1, n + 5, d + 8), NAN, dtype=x.dtype)
    odd_rows = torch.full((b, h, n, d + 1), NAN, dtype=x.dtype)
    return {
        "heads after tokens": x.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens first": x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "misaligned storage": offset.copy_(x),
        "slice of a larger tensor": wide[1:, :h, 5:, 8:].copy_(x),
        "odd row stride": odd_rows[..., 1:].copy_(x),
        "between other tokens": surrounded(x),
    }


# --- merge -----------------------------------------------------------------------------------------------------------


def check_merge(op, out_a, lse_a, out_b, lse_b):
    """Against float64, with the room of the same sum in float32, rounded to the dtype. Logits are below 1e3 or far."""
    weight = torch.stack([lse_a, lse_b]).double().softmax(0).nan_to_num(0.0).unsqueeze(-1)
    exact = weight[0] * out_a + weight[1] * out_b, torch.logaddexp(lse_a.double(), lse_b.double())
    plain = (weight[0].float() * out_a + weight[1].float() * out_b).to(out_a.dtype), torch.logaddexp(lse_a, lse_b)
    out, lse = op(out_a, lse_a, out_b, lse_b)
    assert out.dtype == out_a.dtype and lse.dtype == torch.float32 and out.is_contiguous()
    assert_close(out, exact[0], plain[0], "out")
    far = exact[1] > 1e3
    assert_close(lse[~far], exact[1][~far], plain[1][~far], "lse")
    assert torch.equal(lse[far], plain[1][far])
    nothing = exact[1] == -INF
    assert (out[nothing] == 0).all() and (lse[nothing] == -INF).all()
    return out, lse


def check_merge_of_halves(attention, merge, shape: Shape, dtype):
    """Every other key block, and the blocks between them: merged, they are the whole."""
    q, k, v = shape.qkv(dtype)
    every = torch.arange(shape.blocks, dtype=torch.int32)
    halves = []
    for ids in (every[0::2], every[1::2]):
        count = torch.full((1, 1, shape.rows), len(ids), dtype=torch.int32)
        halves += attend(attention, q, k, v, BlockIndex(count, ids.repeat(1, 1, shape.rows, 1)), shape.start())
    out, lse = merge(*halves)
    whole = check(attention, q, k, v, shape.all_blocks(), shape)
    assert error(out, whole[0]) <= 2 * FLOOR[dtype] * float(whole[0].abs().max())
    assert error(lse, whole[1]) <= 1e-5

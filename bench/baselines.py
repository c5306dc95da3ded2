"""The baselines of the kernels, and the checks of their results.

A baseline is what a user would run without headstart: torch's scaled_dot_product_attention, FlexAttention compiled for
the CPU with the same blocks, torch's own int4 operator, F.linear with the weight in bf16, and a copy. A check compares
with plain float32 torch over a few rows of queries, or with the reference.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

BLOCK = 64
SDPA = "torch SDPA"
FLEX = "FlexAttention"
INT4 = "torch int4"
LINEAR = "bf16 linear"
COPY = "copy"


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense causal attention. Its flash kernel needs no copies of the keys for grouped heads."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _causal(b, h, query, key):
    return query >= key


def flex_mask(selected: torch.Tensor, tokens: int):
    """FlexAttention's `BlockMask` of selected blocks, bool [1, H, R, R], lower triangular with the diagonal.

    Only the diagonal is partial. All other blocks skip the mask, so this is FlexAttention's fastest form.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32), ids.int()

    whole = selected.tril(-1)
    return BlockMask.from_kv_blocks(
        *ordered(selected ^ whole), *ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=_causal, seq_lengths=(tokens, tokens)
    )


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask) -> torch.Tensor:
    return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)


def int4_weight(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same weight in the form of torch's CPU operator: w = (code - 8) s + z', so z' = (8 - z) s."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    pairs = torch.stack([scales.mT.float(), ((8 - zeros.float()) * scales.float()).mT], -1)
    return packed, pairs.to(torch.bfloat16).contiguous()


def int4_gemm(x: torch.Tensor, packed: torch.Tensor, pairs: torch.Tensor, group_size: int) -> torch.Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, pairs)


# --- checks ----------------------------------------------------------------------------------------------------------


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference as a share of the largest exact value; inf if a value is not finite."""
    error = float((got.float() - exact.float()).abs().max() / exact.float().abs().max())
    return error if math.isfinite(error) else math.inf


def attention_error(q, k, v, out: torch.Tensor, selected: torch.Tensor | None = None) -> float:
    """The error of `out` in the first, middle and last block of queries; float32 over the attended keys is exact.

    selected: bool [1, H or 1, R, T], the blocks that each row attends; all blocks if None.
    """
    nq, nk = q.shape[2], k.shape[2]
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    keys = torch.arange(nk)
    worst = 0.0
    rows = -(-nq // BLOCK)
    for row in sorted({0, rows // 2, rows - 1}):
        queries = torch.arange(row * BLOCK, min((row + 1) * BLOCK, nq))
        seen = keys <= (queries + nk - nq)[:, None]
        if selected is not None:
            seen = seen & selected[:, :, row].repeat_interleave(BLOCK, -1)[..., None, :nk]
        scores = q[:, :, queries].float() @ k.mT / math.sqrt(q.shape[-1])
        exact = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        worst = max(worst, relative_error(out[:, :, queries], exact))
    return worst


def disagreement(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Two bool selections: of the elements that at least one selected, the share that only one selected."""
    return float((got ^ expected).sum() / (got | expected).sum().clamp(min=1))

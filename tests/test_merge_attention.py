"""The merge of two results of attention, wherever it runs, against float64."""

from __future__ import annotations

import pytest
import torch

from backends import STEMS
from judges import sparse_attention as judge
from judges.sparse_attention import INF, NAN, by_dtype, surrounded

STEM = STEMS["merge_attention"]


@by_dtype
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 64), (2, 3, 77, 80), (2, 32, 1, 128), (1, 2, 500, 256), (1, 2, 9, 7), (2, 3, 33, 64), (2, 3, 33, 7)],
)
@pytest.mark.parametrize("layout", ["contiguous", "tokens first", "misaligned", "between other tokens"])
def test_merge(ops, layout, shape, dtype):
    b, h, n, d = shape

    def values():
        if layout == "tokens first":
            return torch.randn(b, n, h, d).to(dtype).transpose(1, 2)
        if layout == "misaligned":
            return torch.randn(b * h * n * d + 1).to(dtype)[1:].view(shape)
        x = torch.randn(shape).to(dtype)
        return x if layout == "contiguous" else surrounded(x)

    out_a, out_b, lse_a = values(), values(), torch.randn(b, h, n) * 20
    lse_b = (torch.randn(b, n, h) * 20).transpose(1, 2)
    lse_b = lse_b.contiguous() if layout == "contiguous" else lse_b
    lse_a[0, 0, :5], out_a[0, 0, :5] = -INF, 0
    for rows in (slice(3), slice(5, 8)):
        lse_b[0, 0, rows], out_b[0, 0, rows] = -INF, 0
    judge.check_merge(ops.merge_attention, out_a, lse_a, out_b, lse_b)


@by_dtype
def test_merge_numbers(ops, dtype):
    """A side that saw nothing, both, and logits far beyond exp; what is not finite is not hidden."""
    a, b = torch.randn(2, 2, 3, 70, 72).to(dtype)
    lse_a, lse_b = torch.randn(2, 2, 3, 70) * 20
    lse_a[:, 0], lse_b[:, 1] = -INF, -INF
    lse_b[:, 0, 5] = -INF
    lse_a[:, 2, 3], lse_b[:, 2, 3] = 1e30, 1e30
    a = a.masked_fill((lse_a == -INF).unsqueeze(-1), 0)
    b = b.masked_fill((lse_b == -INF).unsqueeze(-1), 0)
    judge.check_merge(ops.merge_attention, a, lse_a, b, lse_b)
    views = a.transpose(1, 2).contiguous().transpose(1, 2), lse_a.mT.contiguous().mT
    judge.check_merge(ops.merge_attention, *views, b, lse_b)
    for broken in ((a * NAN, lse_a, b, lse_b), (a, lse_a * NAN, b, lse_b), (a, lse_a, b, lse_b * NAN)):
        assert ops.merge_attention(*broken)[0][:, 2].isnan().all()


def test_a_bad_lse_is_named(ops):
    q, lse = torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3)
    said = r"merge_attention: lse_a: expected float32 \[1, 2, 3\], got float64"
    with pytest.raises((ValueError, RuntimeError), match=said):
        ops.merge_attention(q, lse.double(), q, lse)

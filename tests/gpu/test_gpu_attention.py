"""Sparse attention, windows, few queries and merging on a GPU, against the reference on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

import headstart
from headstart import BlockIndex
from headstart.reference import sparse_attention as reference
from on_a_gpu import DTYPES, compare, random_index, tokens
from tolerances import assert_close

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 64, 72, 80, 96, 128, 192, 256])
def test_sparse_attention(d, dtype):
    q, k, v = tokens(1, 4, 333, d, dtype), tokens(1, 2, 333, d, dtype), tokens(1, 2, 333, d, dtype)
    compare(q, k, v, random_index(1, 4, 333, 333, columns=70, column_rows=1))


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("columns", [0, 100])
@pytest.mark.parametrize("d", [64, 128])
def test_block_sizes(d, columns, block_k, block_q):
    q, k, v = (tokens(1, 2, 515, d, torch.bfloat16) for _ in range(3))
    compare(q, k, v, random_index(1, 2, 515, 515, columns=columns, block_q=block_q, block_k=block_k))


@pytest.mark.parametrize("nq, nk", [(1, 1), (1, 1000), (7, 300), (64, 64), (65, 700), (300, 300)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(nq, nk, causal):
    q, k, v = (
        tokens(2, 8, nq, 128, torch.float16),
        tokens(2, 2, nk, 128, torch.float16),
        tokens(2, 2, nk, 128, torch.float16),
    )
    compare(q, k, v, random_index(2, 2, nq, nk, share=0.5, columns=min(nk, 60)), causal=causal)


def test_left_padding_and_an_expanded_index():
    q, k, v = (tokens(3, 4, 300, 64, torch.float16) for _ in range(3))
    start = torch.tensor([0, 77, 299], dtype=torch.int32, device="cuda")
    compare(q, k, v, random_index(1, 1, 300, 300, columns=50, column_rows=1), kv_start=start)


@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
def test_any_scale(scale):
    q, k, v = (tokens(1, 2, 200, 64, torch.float16) for _ in range(3))
    compare(q, k, v, random_index(1, 2, 200, 200, columns=30), scale=scale)


def test_strides_and_a_misaligned_offset():
    flat = torch.randn(1 + 2 * 200 * 6 * 65, device="cuda")[1:].view(2, 200, 6, 65)[..., :64]
    q, k, v = flat[:, :, :2].transpose(1, 2), flat[:, :, 2:4].transpose(1, 2), flat[:, :, 4:].transpose(1, 2)
    compare(q, k, v, random_index(2, 2, 200, 200, columns=30))


def test_rows_that_see_nothing():
    q, k, v = (tokens(1, 2, 200, 64, torch.float16) for _ in range(3))
    rows = torch.zeros(1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 4, 3, dtype=torch.int32)
    out, lse = compare(q, k, v, BlockIndex(*rows).to("cuda"))
    assert (out == 0).all() and (lse == -math.inf).all()


def test_ids_outside_the_keys_are_never_read():
    q, k, v = (tokens(1, 2, 130, 64, torch.float16) for _ in range(3))
    top = 2**31 - 1
    count = torch.full((1, 1, 3), 9, dtype=torch.int32, device="cuda")
    ids = torch.tensor([-top, -1, 0, 2, 2**20, top], dtype=torch.int32, device="cuda").expand(1, 1, 3, 6)
    columns = torch.tensor([-top, -1, 3, 100, 130, top], dtype=torch.int32, device="cuda").expand(1, 1, 1, 6)
    got = headstart.sparse_attention(q, k, v, BlockIndex(count, ids, count[..., :1], columns))
    inside = BlockIndex(count * 0 + 2, ids[..., 2:4], count[..., :1] * 0 + 2, columns[..., 2:4])
    want = compare(q, k, v, inside)
    torch.cuda.synchronize()
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_offsets_past_two_to_the_31():
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    # The last of 34 sequences lies past 2^31 elements; it must give what it gives alone.
    k = torch.empty(34, 1, 2**19, 128, dtype=torch.float16, device="cuda")
    k[-1].normal_()
    q = torch.randn(34, 1, 64, 128, dtype=torch.float16, device="cuda")
    count = torch.full((1, 1, 1), 2, dtype=torch.int32, device="cuda")
    ids = torch.tensor([5, 2**13 - 1], dtype=torch.int32, device="cuda").view(1, 1, 1, 2)
    index = BlockIndex(count, ids)
    out, lse = headstart.sparse_attention(q, k, k, index)
    alone, alone_lse = headstart.sparse_attention(q[-1:], k[-1:], k[-1:], index)
    assert torch.equal(out[-1:], alone) and torch.equal(lse[-1:], alone_lse) and alone.isfinite().all()


# --- windows, uneven rows, few queries -------------------------------------------------------------------------------


@pytest.mark.parametrize("nq, nk", [(300, 300), (130, 5000), (1, 3000), (7, 3000)])
@pytest.mark.parametrize("window", [1, 100, 1000])
@pytest.mark.parametrize("block", [64, 128])
def test_window(block, window, nq, nk):
    from headstart.triton import sparse_attention as kernels

    q, k, v = tokens(1, 8, nq, 128, torch.float16), *(tokens(1, 2, nk, 128, torch.float16) for _ in range(2))
    index = random_index(1, 2, nq, nk, share=0.6, columns=min(nk, 200), block_q=block, block_k=block)
    lists = index.block_count, index.block_index, index.column_count, index.column_index
    out, lse = kernels.sparse_attention(q, k, v, *lists, block_q=block, block_k=block, window=window)
    mask = index.to("cpu").to_mask(nq, nk).repeat_interleave(4, 1)
    mask &= torch.arange(nk) > torch.arange(nk - nq, nk)[:, None] - window

    def dense(q, k, v):
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        scores = (q @ k.mT / math.sqrt(128)).masked_fill(~mask, -math.inf)
        return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)

    given = [x.cpu() for x in (q, k, v)]
    exact, exact_lse = dense(*(x.double() for x in given))
    plain, plain_lse = dense(*given)
    assert_close(out.cpu(), exact, plain, "out")
    assert_close(lse.cpu(), exact_lse, plain_lse.float(), "lse")


@pytest.mark.parametrize("heads_index", [1, 2, 8])
@pytest.mark.parametrize("nq", [1, 3, 17, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_queries_over_long_lists(dtype, nq, heads_index):
    q, k, v = tokens(2, 8, nq, 128, dtype), *(tokens(2, 2, 9000, 128, dtype) for _ in range(2))
    compare(q, k, v, random_index(2, heads_index, nq, 9000, columns=900, column_rows=1))


@pytest.mark.parametrize("heads_index", [8, 16, 32])
@pytest.mark.parametrize("nq", [1, 3, 8])
def test_a_batch_whose_heads_share_keys_and_lists(nq, heads_index):
    # Lists for each KV head, for two query heads and for one; so many that none is split.
    q, k, v = tokens(64, 32, nq, 128, torch.bfloat16), *(tokens(64, 8, 700, 128, torch.bfloat16) for _ in range(2))
    compare(q, k, v, random_index(64, heads_index, nq, 700, columns=40))


def test_more_lists_than_a_grid_has_in_its_second_dimension():
    q, k, v = tokens(2100, 32, 1, 64, torch.float16), *(tokens(2100, 32, 70, 64, torch.float16) for _ in range(2))
    compare(q, k, v, random_index(1, 32, 1, 70, share=0.7))


def test_a_chunk_with_one_dense_head():
    # Rows long enough to be sorted: one head lists all, the others little.
    q, k, v = tokens(1, 8, 512, 64, torch.float16), *(tokens(1, 2, 6000, 64, torch.float16) for _ in range(2))
    lists = torch.rand(1, 8, 8, 94) < 0.05
    lists[:, 3] = True
    compare(q, k, v, BlockIndex(*reference.compact(lists)).to("cuda"))


# --- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 3, 77, 80), (2, 32, 1, 128), (1, 2, 500, 256), (1, 2, 9, 7)])
@pytest.mark.parametrize("layout", ["contiguous", "tokens first", "misaligned"])
def test_merge_attention(layout, shape, dtype):
    b, h, n, d = shape

    def values():
        if layout == "tokens first":
            return torch.randn(b, n, h, d, device="cuda").to(dtype).transpose(1, 2)
        if layout == "misaligned":
            return torch.randn(b * h * n * d + 1, device="cuda").to(dtype)[1:].view(shape)
        return torch.randn(shape, device="cuda").to(dtype)

    out_a, out_b = values(), values()
    lse_a, lse_b = torch.randn(b, h, n, device="cuda") * 9, torch.randn(b, n, h, device="cuda").transpose(1, 2) * 9
    lse_a[0, 0, 0] = lse_b[0, 0, 0] = -math.inf
    out_a[0, 0, 0] = out_b[0, 0, 0] = 0
    out, lse = headstart.merge_attention(out_a, lse_a, out_b, lse_b)
    given = [x.cpu() for x in (out_a, lse_a, out_b, lse_b)]
    exact, exact_lse = reference.merge_attention(*(x.double() for x in given))
    plain, plain_lse = reference.merge_attention(*given)
    assert_close(out.cpu(), exact, plain, "out")
    assert_close(lse.cpu(), exact_lse, plain_lse, "lse")
    assert out.is_contiguous() and lse[0, 0, 0] == -math.inf and (out[0, 0, 0] == 0).all()


def test_merge_of_two_halves_is_the_whole():
    q, k, v = (tokens(1, 2, 256, 128, torch.float32) for _ in range(3))
    lists = torch.rand(1, 2, 4, 4) < 0.5
    parts = [headstart.sparse_attention(q, k, v, BlockIndex(*reference.compact(x)).to("cuda")) for x in (lists, ~lists)]
    out, lse = headstart.merge_attention(*parts[0], *parts[1])
    whole, whole_lse = headstart.sparse_attention(q, k, v, BlockIndex(*reference.compact(lists | ~lists)).to("cuda"))
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)


def test_bad_input_is_named():
    q, lse = torch.zeros(1, 2, 3, 64, device="cuda"), torch.zeros(1, 2, 3, device="cuda")
    with pytest.raises((ValueError, RuntimeError), match=r"merge_attention: lse_a: expected float32 \[1, 2, 3\], got"):
        headstart.merge_attention(q, lse.double(), q, lse)

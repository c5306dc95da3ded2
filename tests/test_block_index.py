"""`BlockIndex` and its converters: dense masks, FlexAttention's `BlockMask`, MInference's four tensors, density.

FlexAttention judges: what it computes from a mask is what our kernel computes from the index of that mask.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import headstart
import shapes
from headstart import BlockIndex
from judges.sparse_attention import dense_mask
from shapes import Shape
from tolerances import error

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:return_lse is deprecated")
by_shape = functools.partial(pytest.mark.parametrize, "shape", ids=str)


PATTERNS = {  # written as a user of FlexAttention would, in units of blocks of 64 or 128; `o` aligns bottom right
    "window": (True, lambda o, n: lambda b, h, i, j: (j <= i + o) & (j // n + 1 >= (i + o) // n)),
    "strided": (True, lambda o, n: lambda b, h, i, j: (j <= i + o) & ((j // n + i // n + h) % 2 == 0)),
    "bidirectional": (False, lambda o, n: lambda b, h, i, j: (j // n + i // n + b) % 2 == 0),
}


@pytest.mark.parametrize("block", (64, 128))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_of_a_block_mask(cpu_tier, pattern, block):
    causal, rule = PATTERNS[pattern]
    nq, nk = (256, 384) if pattern == "window" else (200, 328) if causal else (330, 330)
    shape = Shape(2, 4, 4, nq, nk, 16, causal=causal)
    q, k, v = shape.qkv(torch.float32)
    block_mask = create_block_mask(rule(nk - nq, block), 2, 4, nq, nk, device="cpu", BLOCK_SIZE=block)
    index = BlockIndex.from_block_mask(block_mask)
    assert (index.block_q, index.block_k) == (block, block)
    assert torch.equal(index.to_mask(nq, nk, causal), dense_mask(index, shape))
    judge = flex_attention(q, k, v, block_mask=block_mask, return_lse=True)
    got = headstart.sparse_attention(q, k, v, index, causal=causal)
    assert error(got[0], judge[0]) < 1e-5 and error(got[1], judge[1]) < 1e-5


@pytest.mark.parametrize("heads_index, index_batch", ((1, 1), (1, 2), (2, 2), (4, 1), (4, 2)))
def test_block_mask_of_an_index(heads_index, index_batch):
    """What `to_block_mask` gives to FlexAttention is what our kernel computes, for shared heads and batches too."""
    shape = Shape(2, 4, 2, 150, 200, 16, heads_index=heads_index, columns="own")
    q, k, v = shape.qkv(torch.float32)
    index = shape.with_(batch=index_batch).random_index()
    shared = dict(heads=4) if 1 < heads_index < 4 else {}  # 1 and all heads need no telling
    block_mask = index.to_block_mask(150, 200, **shared)
    mask = dense_mask(index, shape)
    blocks = F.pad(mask, (0, 56, 0, 42)).unflatten(-1, (4, 64)).any(-1).unflatten(-2, (3, 64)).any(-2)
    per_head = block_mask.to_dense()[:, [h * block_mask.shape[1] // 4 for h in range(4)]].bool().expand(2, -1, -1, -1)
    assert torch.equal(per_head, blocks)
    judge = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True, return_lse=True)
    seen = mask.any(-1)
    got = headstart.sparse_attention(q, k, v, index)
    assert error(got[0][seen], judge[0][seen]) < 1e-5 and error(got[1][seen], judge[1][seen]) < 1e-5


def test_block_mask_round_trip():
    shape = Shape(2, 4, 2, 200, 330, 16, heads_index=4)
    index = shape.random_index()
    back = BlockIndex.from_block_mask(index.to_block_mask(200, 330))
    assert torch.equal(back.to_mask(200, 330), index.to_mask(200, 330))


@by_shape(shapes.BLOCK_SIZES + shapes.PADDED + shapes.FULL + shapes.WINDOWED)
def test_masks(shape: Shape):
    index = shape.random_index()
    mask = index.to_mask(shape.nq, shape.nk, shape.causal, kv_start=shape.start(), window=shape.window)
    expected = dense_mask(index, shape)[:, :: shape.heads_q // shape.heads_index]
    assert torch.equal(mask, expected)
    covered = BlockIndex.from_mask(mask, shape.block_q, shape.block_k).to_mask(shape.nq, shape.nk, shape.causal)
    assert covered[mask].all()
    blocks = BlockIndex(index.block_count, index.block_index, block_q=shape.block_q, block_k=shape.block_k)
    mask = blocks.to_mask(shape.nq, shape.nk, shape.causal)
    again = BlockIndex.from_mask(mask, shape.block_q, shape.block_k).to_mask(shape.nq, shape.nk, shape.causal)
    assert torch.equal(again, mask)


def test_density_is_the_mean_over_visible_pairs():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=40, deadline=None)
    @hypothesis.given(
        st.integers(1, 300), st.integers(0, 200), st.sampled_from(((64, 64), (64, 128), (128, 64))),
        st.sampled_from(("none", "shared", "own")), st.booleans(), st.integers(0, 999),
    )  # fmt: skip
    def run(nq, more, sizes, columns, causal, seed):
        torch.manual_seed(seed)
        shape = Shape(2, 2, 2, nq, nq + more, 8, 2, *sizes, columns=columns, causal=causal)
        index = shape.random_index()
        visible = torch.ones(nq, nq + more).tril(more) if causal else torch.ones(nq, nq + more)
        expected = dense_mask(index, shape).double().sum((0, 2, 3)) / float(visible.sum() * 2)
        assert index.head_density(nq, nq + more, causal).tolist() == pytest.approx(expected.tolist(), abs=1e-12)
        assert index.density(nq, nq + more, causal) == pytest.approx(expected.mean().item(), abs=1e-12)

    run()


@by_shape([s for s in shapes.BLOCK_SIZES + shapes.LENGTHS if s.nq > 3])
def test_minference_round_trip(shape: Shape):
    index = shape.random_index()
    count, offset, columns, ids = index.to_minference()
    used = torch.arange(offset.shape[-1]) < count.unsqueeze(-1)
    assert torch.equal(offset[used], index.block_index[used] * shape.block_k) and columns.shape[2] == shape.rows
    back = BlockIndex.from_minference(count, offset, columns, ids, shape.block_q, shape.block_k)
    assert torch.equal(back.to_mask(shape.nq, shape.nk), index.to_mask(shape.nq, shape.nk))
    headstart.sparse_attention(*shape.qkv(torch.float32), back)


def test_minference_blocks_at_any_token():
    """MInference's slashes start at any token: the attended keys are those of its kernel, to the end of the keys."""
    shape = Shape(1, 2, 1, 200, 200, 16)
    count = torch.tensor([[[1, 2, 2, 2]]], dtype=torch.int32)
    offset = torch.tensor([[[[0, 0], [5, 64], [64, 130], [70, 170]]]], dtype=torch.int32)
    columns = (
        torch.tensor([[[0, 1, 2, 1]]], dtype=torch.int32),
        torch.tensor([[[[3, 9]] * 4]], dtype=torch.int32).view(1, 1, 4, 2),
    )
    index = BlockIndex.from_minference(count, offset, *columns, nk=200)
    expected = torch.zeros(1, 1, 200, 200, dtype=torch.bool)
    for r in range(4):
        for start in offset[0, 0, r, : int(count[0, 0, r])].tolist():
            expected[0, 0, r * 64 : r * 64 + 64, start : start + 64] = True
        for key in columns[1][0, 0, r, : int(columns[0][0, 0, r])].tolist():
            expected[0, 0, r * 64 : r * 64 + 64, key] = True
    assert torch.equal(index.to_mask(200, 200), expected.tril())
    headstart.sparse_attention(*shape.qkv(torch.float32), index)  # its ids are inside the keys

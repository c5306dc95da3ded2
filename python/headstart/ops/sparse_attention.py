"""Sparse attention: one index, one kernel for all patterns.

For every block of queries, a `BlockIndex` lists the blocks of keys and the single keys that it attends. One kernel
serves all patterns, because each of them can be written as such an index: MInference's A-shape, vertical-slash and
block-sparse heads (Jiang et al., 2024, arXiv 2407.02490), adaptive blocks, a sliding window, and the selected clusters
of a fixed context.

Kernels: `csrc/cpu/sparse_attention.cpp`, `triton/sparse_attention.py`, and for `merge_attention` also
`csrc/cuda/merge_attention.cu`. The maths in plain torch: `reference/sparse_attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _library
from ..reference import sparse_attention as reference
from . import _checks


@dataclass(frozen=True)
class BlockIndex:
    """The keys that each block of queries attends: the union of a list of key blocks and a list of single keys.

    B is the batch, Hi the number of index heads, R = ceil(Nq / block_q) the number of query blocks (rows):

    - ``block_count`` int32 [B, Hi, R]: the number of key blocks that the row attends.
    - ``block_index`` int32 [B, Hi, R, T]: their ids, strictly ascending. Entries past the count are ignored.
    - ``column_count`` int32 [B, Hi, R or 1], optional: the number of single keys that the row also attends.
    - ``column_index`` int32 [B, Hi, R or 1, C], optional: their positions, strictly ascending. Entries past the count
      are ignored. If the third dim is 1, all query blocks share one list.
    - ``block_q`` and ``block_k``: 64 or 128 tokens.

    Hi divides Hq, and query head h uses index head ``h // (Hq // Hi)``. So an index can have one list for each query
    head, one for each KV head, or one for all heads. B and Hi may be expanded (stride 0).

    Raises a ValueError if a dtype, a shape, a device or a block size is wrong.
    """

    block_count: torch.Tensor
    block_index: torch.Tensor
    column_count: torch.Tensor | None = None
    column_index: torch.Tensor | None = None
    block_q: int = 64
    block_k: int = 64

    def __post_init__(self):
        check_index("BlockIndex", self.block_count, self.block_index, self.column_count, self.column_index)
        _checks.block_size("BlockIndex", "block_q", self.block_q)
        _checks.block_size("BlockIndex", "block_k", self.block_k)

    def to_mask(
        self,
        nq: int,
        nk: int,
        causal: bool = True,
        kv_start: torch.Tensor | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """The index as a dense mask, bool [B, Hi, nq, nk], which is True where a query attends a key.

        `causal`, `kv_start` and `window` are as in `sparse_attention`. Raises a ValueError if `window` is below 1.
        """
        check_window("BlockIndex.to_mask", window)
        return reference.index_to_mask(
            self.block_count,
            self.block_index,
            self.column_count,
            self.column_index,
            kv_start,
            nq=nq,
            nk=nk,
            causal=causal,
            block_q=self.block_q,
            block_k=self.block_k,
            window=window,
        )

    @classmethod
    def from_mask(cls, mask: torch.Tensor, block_q: int = 64, block_k: int = 64) -> BlockIndex:
        """The smallest index of blocks that covers a dense mask, bool [B, H, nq, nk].

        It lists every key block that holds a True. Blocks are whole, so the index may attend more keys than the mask.
        If the mask is a union of blocks, cut by causality, `to_mask` gives the same mask back. Raises a ValueError if
        the mask has the wrong dtype or shape, or a block size is not 64 or 128.
        """
        _checks.tensor("BlockIndex.from_mask", "mask", mask, torch.bool, ("B", "H", "Nq", "Nk"))
        blocks = reference.pool_mask(mask, block_q, block_k)
        return cls(*reference.compact(blocks), block_q=block_q, block_k=block_k)

    def to_block_mask(self, nq: int, nk: int, causal: bool = True, heads: int | None = None):
        """FlexAttention's `BlockMask` for the same attention. Its `mask_mod` includes the columns.

        `heads` is the number of query heads. It may be None if the index has one head, or as many as there are query
        heads.
        """
        from torch.nn.attention.flex_attention import BlockMask

        mask = self.to_mask(nq, nk, causal)
        if heads is not None and mask.shape[1] > 1:
            mask = mask.repeat_interleave(heads // mask.shape[1], 1)
        count, index = reference.compact(reference.pool_mask(mask, self.block_q, self.block_k))
        batch, heads = mask.shape[:2]

        def mask_mod(b, h, q_idx, kv_idx):
            return mask[b % batch, h % heads, q_idx, kv_idx]

        return BlockMask.from_kv_blocks(
            count, index, BLOCK_SIZE=(self.block_q, self.block_k), mask_mod=mask_mod, seq_lengths=(nq, nk)
        )

    @classmethod
    def from_block_mask(cls, block_mask) -> BlockIndex:
        """The index of FlexAttention's `BlockMask`. Its full and its partial blocks all become whole blocks."""
        block_q, block_k = block_mask.BLOCK_SIZE
        columns = -(-block_mask.seq_lengths[1] // block_k)
        blocks = reference.scatter_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
        if block_mask.full_kv_num_blocks is not None:
            blocks |= reference.scatter_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
        return cls(*reference.compact(blocks), block_q=block_q, block_k=block_k)

    def to_minference(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """MInference's four tensors: (block_count, block_offset in tokens, column_count, column_index).

        Each row has its own column list. It leaves out the columns that a block of the row covers, because MInference's
        kernel would count them twice.
        """
        return reference.to_minference(
            self.block_count, self.block_index, self.column_count, self.column_index, self.block_k
        )

    @classmethod
    def from_minference(
        cls,
        block_count: torch.Tensor,
        block_offset: torch.Tensor,
        column_count: torch.Tensor,
        column_index: torch.Tensor,
        block_q: int = 64,
        block_k: int = 64,
        nk: int | None = None,
    ) -> BlockIndex:
        """The index of MInference's four tensors.

        Args:
            block_count: [B, H, R].
            block_offset: [B, H, R, T], the first token of each block, which need not be a multiple of `block_k`. Blocks
                that start at a multiple stay blocks. The tokens of the others become columns, so that the index attends
                the same keys.
            column_count, column_index: [B, H, R] and [B, H, R, C].
            block_q, block_k: 64 or 128 tokens.
            nk: the number of keys, or None. No column is listed at or past nk, although a block may reach past it.
        """
        return cls(
            *reference.from_minference(block_count, block_offset, column_count, column_index, block_k, nk),
            block_q=block_q,
            block_k=block_k,
        )

    def density(self, nq: int, nk: int, causal: bool = True) -> float:
        """The pairs of query and key that the index attends, divided by the pairs of dense attention, 0 to 1."""
        return self.head_density(nq, nk, causal).mean().item()

    def head_density(self, nq: int, nk: int, causal: bool = True) -> torch.Tensor:
        """The `density` of each index head, float64 [Hi]."""
        return reference.head_density(
            self.block_count,
            self.block_index,
            self.column_count,
            self.column_index,
            nq=nq,
            nk=nk,
            causal=causal,
            block_q=self.block_q,
            block_k=self.block_k,
        )

    def to(self, device: torch.device | str) -> BlockIndex:
        """The same index on another device."""
        move = [
            None if t is None else t.to(device)
            for t in (self.block_count, self.block_index, self.column_count, self.column_index)
        ]
        return BlockIndex(*move, block_q=self.block_q, block_k=self.block_k)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: BlockIndex,
    *,
    causal: bool = True,
    scale: float | None = None,
    kv_start: torch.Tensor | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys that an index selects.

    Query i stands at key position p = Nk - Nq + i. S is the union of the blocks and columns of its row, without the
    keys j > p (if causal), j < kv_start[b] and j <= p - window::

        out[i] = sum_{j in S} softmax_j(scale * q[i]·k[j]) v[j]        lse[i] = ln sum_{j in S} exp(scale * q[i]·k[j])

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16, last dim contiguous. D is a multiple of 8 up to 256.
        k, v: [B, Hkv, Nk, D], q's dtype, last dim contiguous. Hkv divides Hq.
        index: a `BlockIndex` on q's device, with a batch of B or 1 (for all sequences) and Hi heads. Hi divides Hq.
        causal: a query attends no key after its own position. The queries are the last Nq positions (bottom-right
            aligned), so the same formula holds for prefill, chunked prefill and decode. It needs Nq <= Nk.
        scale: 1 / sqrt(D) if None.
        kv_start: int32 [B], the first real key of each sequence of a left-padded batch.
        window: a query attends no key that is `window` or more positions before its own. None means no limit. Blocks
            that no query of a row reaches cost nothing.

    Returns:
        out [B, Hq, Nq, D] in q's dtype, and lse float32 [B, Hq, Nq] (natural log). A query that attends no key gets
        out = 0 and lse = -inf.

    Raises:
        ValueError or RuntimeError: an argument is wrong. The message names it, what was expected and what was got. On
            the CPU, an id outside the keys and a list out of order are errors. A GPU never reads at such an id.

    Source: MInference 1.0 (arXiv 2407.02490), section 3.2, generalised to one index for all patterns.
    """
    _checks.expect(isinstance(index, BlockIndex), "sparse_attention", "index", "a BlockIndex", type(index).__name__)
    return _sparse_attention(
        q,
        k,
        v,
        index.block_count,
        index.block_index,
        index.column_count,
        index.column_index,
        kv_start,
        causal=causal,
        scale=scale,
        block_q=index.block_q,
        block_k=index.block_k,
        window=window,
    )


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins the attention of the same queries over two disjoint sets of keys::

        lse = ln(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Args:
        out_a, out_b: [B, H, N, D], float32, float16 or bfloat16, both in the same dtype, last dim contiguous.
        lse_a, lse_b: float32 [B, H, N], natural log, -inf where a query attended no key.

    Returns:
        out [B, H, N, D] in out_a's dtype and lse float32 [B, H, N]. Where both lse are -inf, out is 0 and lse is -inf.

    Raises:
        ValueError or RuntimeError: an argument is wrong. The message names it, what was expected and what was got.
    """
    return _merge_attention(out_a, lse_a, out_b, lse_b)


# --- the contract: checks, fake kernels, schemas -------------------------------------------------------------------


def check_index(
    op: str,
    block_count: torch.Tensor,
    block_index: torch.Tensor,
    column_count: torch.Tensor | None,
    column_index: torch.Tensor | None,
    like: torch.Tensor | None = None,
) -> None:
    """Checks the dtypes, shapes and devices of an index's tensors against each other."""
    _checks.tensor(op, "block_count", block_count, torch.int32, ("B", "Hi", "R"), like)
    b, hi, r = block_count.shape
    _checks.tensor(op, "block_index", block_index, torch.int32, (b, hi, r, "T"), block_count)
    if (column_count is None) != (column_index is None):
        missing = "column_index" if column_index is None else "column_count"
        _checks.fail(op, missing, "a tensor, since its partner is given", None)
    if column_count is not None:
        _checks.tensor(op, "column_count", column_count, torch.int32, (b, hi, "R or 1"), block_count)
        rows = column_count.shape[2]
        if rows != 1 and rows != r:  # not `expect`: torch.compile would treat the number in its f-string as a constant
            _checks.fail(op, "column_count", f"1 or {r} rows", rows)
        _checks.tensor(op, "column_index", column_index, torch.int32, (b, hi, rows, "C"), block_count)


def check_window(op: str, window: int | None) -> None:
    if window is not None:
        _checks.expect(window >= 1, op, "window", "a number of keys, at least 1", window)


def _check(
    q, k, v, block_count, block_index, column_count, column_index, kv_start, causal, scale, block_q, block_k, window
):
    op = "sparse_attention"
    _checks.query_key(op, q, k, causal=causal)
    b, hq, nq, d = q.shape
    hkv, nk = k.shape[1], k.shape[2]
    _checks.tensor(op, "v", v, q.dtype, (b, hkv, nk, d), like=q)
    _checks.contiguous_last(op, "v", v)
    _checks.block_size(op, "block_q", block_q)
    _checks.block_size(op, "block_k", block_k)
    check_index(op, block_count, block_index, column_count, column_index, like=q)
    bi, hi, rows = block_count.shape
    _checks.expect(bi in (1, b), op, "block_count", f"a batch of {b} or 1", bi)
    _checks.expect(hi > 0 and hq % hi == 0, op, "block_count", f"a number of heads that divides q's {hq}", hi)
    r = -(-nq // block_q)
    _checks.expect(rows == r, op, "block_count", f"{r} query blocks ({nq} queries, block_q {block_q})", rows)
    _checks.kv_start(op, kv_start, b, like=q)
    if scale is not None:
        _checks.finite(op, "scale", scale)
    check_window(op, window)


def _checked(run):
    """Wraps an implementation `run`. The result has the operator's signature, checks the inputs, and calls `run`."""

    def call(
        q,
        k,
        v,
        block_count,
        block_index,
        column_count=None,
        column_index=None,
        kv_start=None,
        *,
        causal=True,
        scale=None,
        block_q=64,
        block_k=64,
        window=None,
    ):
        index = (block_count, block_index, column_count, column_index)
        options = dict(causal=causal, scale=scale, block_q=block_q, block_k=block_k, window=window)
        _check(q, k, v, *index, kv_start, **options)
        return run(q, k, v, *index, kv_start, **options)

    return call


def _empty_like_queries(q, *_, **__):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _triton_sparse_attention(*args, **kwargs):
    from ..triton import sparse_attention as kernels

    return kernels.sparse_attention(*args, **kwargs)


def _cuda_sparse_attention(q, k, v, block_count, block_index, *columns_and_padding, **options):
    """On a GPU: the kernel of `csrc/cuda/sparse_attention_sm90.cu` for what it takes, otherwise Triton's."""
    from ..triton import sparse_attention as kernels

    runs = kernels.sparse_attention
    # Padding and what lies before a window may hold anything, and only Triton's kernel never reads it.
    plain = all(x is None for x in (*columns_and_padding, options.get("window")))
    if plain and _library.has_kernel("_sparse_attention_sm90", "CUDA") and kernels.fits_sm90(q, k, v):
        runs = _sparse_attention_sm90
    return runs(q, k, v, block_count, block_index, *columns_and_padding, **options)


def _check_merge(out_a, lse_a, out_b, lse_b):
    op = "merge_attention"
    _checks.tensor(op, "out_a", out_a, _checks.FLOAT_DTYPES, ("B", "H", "N", "D"))
    _checks.tensor(op, "lse_a", lse_a, torch.float32, tuple(out_a.shape[:3]), like=out_a)
    _checks.tensor(op, "out_b", out_b, out_a.dtype, tuple(out_a.shape), like=out_a)
    _checks.tensor(op, "lse_b", lse_b, torch.float32, tuple(out_a.shape[:3]), like=out_a)
    _checks.contiguous_last(op, "out_a", out_a)
    _checks.contiguous_last(op, "out_b", out_b)


def _checked_merge(run):
    def call(out_a, lse_a, out_b, lse_b):
        _check_merge(out_a, lse_a, out_b, lse_b)
        return run(out_a, lse_a, out_b, lse_b)

    return call


def _empty_like_outputs(out_a, lse_a, *_):
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _triton_merge_attention(*args):
    from ..triton import sparse_attention as kernels

    return kernels.merge_attention(*args)


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor block_count, Tensor block_index, Tensor? column_count=None, "
    "Tensor? column_index=None, Tensor? kv_start=None, *, bool causal=True, float? scale=None, int block_q=64, "
    "int block_k=64, SymInt? window=None) -> (Tensor out, Tensor lse)"
)
_sparse_attention = _library.define(
    "sparse_attention",
    _SCHEMA,
    reference=_checked(reference.sparse_attention),
    fake=_checked(_empty_like_queries),
    triton=_checked(_triton_sparse_attention),
    cuda=_checked(_cuda_sparse_attention),
)
_sparse_attention_sm90 = _library.define(
    "_sparse_attention_sm90",
    _SCHEMA,
    reference=_checked(reference.sparse_attention),
    fake=_checked(_empty_like_queries),
)
_merge_attention = _library.define(
    "merge_attention",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
    reference=_checked_merge(reference.merge_attention),
    fake=_checked_merge(_empty_like_outputs),
    triton=_checked_merge(_triton_merge_attention),
)

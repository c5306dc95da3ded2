"""Index builders of sparse prefill: they choose the blocks and columns that a head attends from its queries and keys.

Three patterns come from MInference 1.0 (Jiang et al., 2024, arXiv 2407.02490, section 3), and one does not:

- A-shape: attention sinks and a sliding window;
- vertical-slash: the columns and diagonals that the last queries attend most;
- block top-k: the key blocks whose mean key has the largest dot product with the mean query of the query block;
- adaptive: antidiagonal scores as in XAttention (Xu et al., 2025, arXiv 2503.16428). Each row takes as many blocks as
  are needed to hold a given share of the attention mass, so every row gets the density that it needs.

One call builds the index of all heads, without host synchronisation. The output shapes depend only on the input shapes
and the budgets. All patterns are causal and bottom-right aligned: the queries are the last Nq of the Nk positions.

Kernels: `csrc/cpu/prefill_index.cpp`, `csrc/cuda/prefill_index_*.cu`, `triton/prefill_index.py`,
`triton/vertical_slash.py`. The maths: `reference/prefill_index.py`. A-shape runs that reference on every device,
because it needs only arithmetic on positions.
"""

from __future__ import annotations

import torch

from .. import _library
from ..reference import prefill_index as reference
from . import _checks
from .sparse_attention import BlockIndex


def a_shape_index(
    nq: int,
    nk: int,
    *,
    sink: int,
    local: int,
    kv_start: torch.Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
    device: torch.device | str | None = None,
) -> BlockIndex:
    """Sink tokens and a local window.

    A row attends the blocks that hold a sink key or a local key. The sink keys are the first `sink` keys. The local
    keys are, for each of the row's queries, the query's own position and the `local` - 1 keys before it.

    Args:
        nq, nk: the numbers of queries and keys, 1 <= nq <= nk. The queries are the last nq positions.
        sink, local: numbers of tokens, at least 0. `local` = 0 means no window.
        kv_start: int32 [B], the first real key of each sequence of a left-padded batch. Sinks are counted from it.
        block_q, block_k: 64 or 128 tokens.
        device: the device of the index. If None, it is kv_start's device, or the CPU without kv_start.

    Returns:
        A `BlockIndex` with one head, and batch B (1 without kv_start).

    Raises:
        ValueError: an argument is wrong. The message names it, what was expected and what was got.

    Source: MInference 1.0, "A-shape"; StreamingLLM (arXiv 2309.17453).
    """
    if device is None and kv_start is not None:
        device = kv_start.device
    count, index = _a_shape_index(
        nq,
        nk,
        sink=sink,
        local=local,
        kv_start=kv_start,
        block_q=block_q,
        block_k=block_k,
        device=None if device is None else torch.device(device),
    )
    return BlockIndex(count, index, block_q=block_q, block_k=block_k)


def vertical_slash_index(
    q: torch.Tensor,
    k: torch.Tensor,
    vertical_size: int,
    slash_size: int,
    *,
    last_q: int = 64,
    sink: int = 30,
    local: int = 100,
    kv_start: torch.Tensor | None = None,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    max_blocks: int | None = None,
    max_columns: int | None = None,
) -> BlockIndex:
    """The columns and diagonals that the last queries attend most.

    Let A be the causal softmax of the last `last_q` queries over all keys. The score of column j is the sum of A[:, j],
    and the `vertical_size` best columns are kept. Diagonal o is all pairs whose query position minus key position is o,
    and its score is the sum of A along it.

    Diagonals are kept as bands that are one block wide. In every row, band t is the block that stands t blocks before
    the block of the row's last key. A band's score adds up the scores of its diagonals, each times the share of the
    diagonal that lies in the band. So a row attends ceil(slash_size / block_k) blocks for `slash_size` diagonals, even
    if these are scattered.

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16, last dim contiguous. D is a multiple of 8 up to 256, Nq <= Nk.
        k: [B, Hkv, Nk, D], q's dtype, last dim contiguous. Hkv divides Hq.
        vertical_size, slash_size: the budgets of columns and of diagonals, in tokens, at least 1.
        last_q: how many of the last queries are used, at least 1.
        sink: the first `sink` keys are the first columns to be kept.
        local: the bands of the nearest `local` diagonals are the first bands to be kept.
        kv_start: int32 [B], the first real key of each sequence of a left-padded batch. Sinks are counted from it.
        scale: 1 / sqrt(D) if None.
        block_q, block_k: 64 or 128 tokens.
        max_blocks, max_columns: the most blocks a row and the most columns, or None. The best-scoring ones are kept.

    Returns:
        A `BlockIndex` with Hq heads, and one list of columns for all rows of a head.

    Raises:
        ValueError or RuntimeError: an argument is wrong. The message names it, what was expected and what was got.

    Source: MInference 1.0, section 3.2 and algorithm 1, with bands in place of single diagonals.
    """
    return BlockIndex(
        *_vertical_slash_index(
            q,
            k,
            vertical_size,
            slash_size,
            last_q=last_q,
            sink=sink,
            local=local,
            kv_start=kv_start,
            scale=scale,
            block_q=block_q,
            block_k=block_k,
            max_blocks=max_blocks,
            max_columns=max_columns,
        ),
        block_q=block_q,
        block_k=block_k,
    )


def block_topk_index(
    q: torch.Tensor,
    k: torch.Tensor,
    top_k: int,
    *,
    sink: int = 1,
    local: int = 1,
    kv_start: torch.Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> BlockIndex:
    """The `top_k` key blocks whose mean key has the largest dot product with the mean query of the query block.

    Blocks that hold a sink or a local key (see `a_shape_index`) are taken first, and count towards `top_k`. If `sink`
    and `local` are both 0, this is MInference's block-sparse head.

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16, last dim contiguous. D is a multiple of 8 up to 256, Nq <= Nk.
        k: [B, Hkv, Nk, D], q's dtype, last dim contiguous. Hkv divides Hq.
        top_k: blocks a row, at least 1.
        sink, local: numbers of tokens, as in `a_shape_index`.
        kv_start: int32 [B], the first real key of each sequence of a left-padded batch.
        block_q, block_k: 64 or 128 tokens.

    Returns:
        A `BlockIndex` with Hq heads.

    Raises:
        ValueError or RuntimeError: an argument is wrong. The message names it, what was expected and what was got.

    Source: MInference 1.0, section 3.2 and algorithm 2.
    """
    return BlockIndex(
        *_block_topk_index(q, k, top_k, sink=sink, local=local, kv_start=kv_start, block_q=block_q, block_k=block_k),
        block_q=block_q,
        block_k=block_k,
    )


def adaptive_block_index(
    q: torch.Tensor,
    k: torch.Tensor,
    threshold: float = 0.95,
    stride: int = 8,
    *,
    sink: int = 1,
    local: int = 1,
    kv_start: torch.Tensor | None = None,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    max_blocks: int | None = None,
    head_threshold: torch.Tensor | None = None,
    samples: int = 0,
) -> BlockIndex:
    """In each row, as few blocks as hold a given share of the estimated attention mass.

    Queries and keys are taken in groups of `stride` tokens. The score of a query group and a key group is the mean of
    scale * q·k along the antidiagonal of their stride × stride tile. A softmax runs over the key groups, and a block's
    mass is the sum over the tiles in it. Each row takes the heaviest blocks until they hold `threshold` of the row's
    mass. Blocks that hold a sink or a local key are taken first, and always.

    If `samples` is above 0, the exact attention of this number of queries of every row is also computed. A block's mass
    is then the largest share that any query group or sampled query of the row gives it. The group scores use every
    query and every key, but they blur a single strong key. A sampled query sees every key exactly, but not all queries
    are sampled. The largest share keeps a block that only a few queries need. At equal density, `samples` makes the
    error of the output two to three times smaller (docs/measurements/attention.md).

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16, last dim contiguous. D is a multiple of 8 up to 256, Nq <= Nk.
        k: [B, Hkv, Nk, D], q's dtype, last dim contiguous. Hkv divides Hq.
        threshold: the share of the mass, above 0 and up to 1.
        stride: 4, 8, 16 or 32 tokens. The estimate costs 1 / (2 stride) of dense attention's multiplications.
        sink, local: numbers of tokens, as in `a_shape_index`.
        kv_start: int32 [B], the first real key of each sequence of a left-padded batch.
        scale: 1 / sqrt(D) if None.
        block_q, block_k: 64 or 128 tokens.
        max_blocks: the most blocks a row, which also limits the size of the index, or None. The heaviest are kept.
        head_threshold: float32 [Hq], a threshold for each head in place of `threshold`.
        samples: the number of sampled queries of every row, 0 to 64, spread evenly. n of them cost n / (2 block_q) of
            dense attention.

    Returns:
        A `BlockIndex` with Hq heads.

    Raises:
        ValueError or RuntimeError: an argument is wrong. The message names it, what was expected and what was got.

    Source: XAttention (arXiv 2503.16428), section 2, with forced sinks, a per-head threshold and sampled queries.
    """
    return BlockIndex(
        *_adaptive_block_index(
            q,
            k,
            threshold,
            stride=stride,
            sink=sink,
            local=local,
            kv_start=kv_start,
            scale=scale,
            block_q=block_q,
            block_k=block_k,
            max_blocks=max_blocks,
            head_threshold=head_threshold,
            samples=samples,
        ),
        block_q=block_q,
        block_k=block_k,
    )


# --- the contract: checks, implementations, fake kernels, schemas --------------------------------------------------


def _check_common(op, q, k, sink, local, kv_start, scale, block_q, block_k):
    _checks.query_key(op, q, k)
    _checks.expect(q.shape[2] > 0, op, "q", "at least one query", 0)
    _check_window(op, sink, local, block_q, block_k)
    _checks.kv_start(op, kv_start, q.shape[0], like=q)
    if scale is not None:
        _checks.finite(op, "scale", scale)


def _check_window(op, sink, local, block_q, block_k):
    _checks.expect(sink >= 0, op, "sink", "a number of tokens, at least 0", sink)
    _checks.expect(local >= 0, op, "local", "a number of tokens, at least 0", local)
    _checks.block_size(op, "block_q", block_q)
    _checks.block_size(op, "block_k", block_k)


def _check_positive(op, argument, value):
    if value is not None:
        _checks.expect(value >= 1, op, argument, "at least 1", value)


def _check_a_shape(nq, nk, sink, local, kv_start, block_q, block_k):
    op = "a_shape_index"
    _checks.expect(nq >= 1, op, "nq", "at least one query", nq)
    _checks.expect(nk >= nq, op, "nk", f"at least as many keys as the {nq} queries", nk)
    _check_window(op, sink, local, block_q, block_k)
    if kv_start is not None:
        _checks.tensor(op, "kv_start", kv_start, torch.int32, ("B",))


def _a_shape_impl(nq, nk, *, sink, local, kv_start=None, block_q=64, block_k=64, device=None):
    _check_a_shape(nq, nk, sink, local, kv_start, block_q, block_k)
    return reference.a_shape_index(
        nq, nk, sink=sink, local=local, kv_start=kv_start, block_q=block_q, block_k=block_k, device=device
    )


def _a_shape_fake(nq, nk, *, sink, local, kv_start=None, block_q=64, block_k=64, device=None):
    _check_a_shape(nq, nk, sink, local, kv_start, block_q, block_k)
    batch = 1 if kv_start is None else kv_start.shape[0]
    capacity = reference.a_shape_capacity(nk, sink, local, kv_start is not None, block_q, block_k)
    shape = (batch, 1, -(-nq // block_q))
    device = device or torch.device("cpu")
    return (
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(*shape, capacity, dtype=torch.int32, device=device),
    )


_VS = dict(last_q=64, sink=30, local=100, kv_start=None, scale=None, block_q=64, block_k=64)
_VS |= dict(max_blocks=None, max_columns=None)


def _vertical_slash_options(q, k, vertical_size, slash_size, given):
    op = "vertical_slash_index"
    options = _VS | given
    common = (options[name] for name in ("sink", "local", "kv_start", "scale", "block_q", "block_k"))
    _check_common(op, q, k, *common)
    _check_positive(op, "vertical_size", vertical_size)
    _check_positive(op, "slash_size", slash_size)
    for name in ("last_q", "max_blocks", "max_columns"):
        _check_positive(op, name, options[name])
    return options


def _vertical_slash_impl(q, k, vertical_size, slash_size, **given):
    options = _vertical_slash_options(q, k, vertical_size, slash_size, given)
    return reference.vertical_slash_index(q, k, vertical_size, slash_size, **options)


def _vertical_slash_triton(q, k, vertical_size, slash_size, **given):
    from ..triton import vertical_slash as kernels

    return kernels.vertical_slash_index(
        q, k, vertical_size, slash_size, **_vertical_slash_options(q, k, vertical_size, slash_size, given)
    )


def _vertical_slash_fake(q, k, vertical_size, slash_size, **given):
    options = _vertical_slash_options(q, k, vertical_size, slash_size, given)
    blocks = -(-slash_size // options["block_k"])
    blocks = blocks if options["max_blocks"] is None else min(blocks, options["max_blocks"])
    columns = vertical_size if options["max_columns"] is None else min(vertical_size, options["max_columns"])
    count, index = _empty_blocks(q, k, blocks, options["block_q"], options["block_k"])
    shape = (q.shape[0], q.shape[1], 1)
    return (
        count,
        index,
        q.new_empty(shape, dtype=torch.int32),
        q.new_empty(*shape, min(columns, k.shape[2]), dtype=torch.int32),
    )


_TOPK = dict(sink=1, local=1, kv_start=None, block_q=64, block_k=64)


def _block_topk_options(q, k, top_k, given):
    options = _TOPK | given
    common = (options[name] for name in ("sink", "local", "kv_start"))
    _check_common("block_topk_index", q, k, *common, None, options["block_q"], options["block_k"])
    _check_positive("block_topk_index", "top_k", top_k)
    return options


def _block_topk_impl(q, k, top_k, **given):
    return reference.block_topk_index(q, k, top_k, **_block_topk_options(q, k, top_k, given))


def _block_topk_triton(q, k, top_k, **given):
    from ..triton import prefill_index as kernels

    return kernels.block_topk_index(q, k, top_k, **_block_topk_options(q, k, top_k, given))


def _block_topk_fake(q, k, top_k, **given):
    options = _block_topk_options(q, k, top_k, given)
    return _empty_blocks(q, k, top_k, options["block_q"], options["block_k"])


_ADAPTIVE = dict(stride=8, sink=1, local=1, kv_start=None, scale=None, block_q=64, block_k=64)
_ADAPTIVE |= dict(max_blocks=None, head_threshold=None, samples=0)


def _adaptive_options(q, k, threshold, given):
    op = "adaptive_block_index"
    options = _ADAPTIVE | given
    common = (options[name] for name in ("sink", "local", "kv_start", "scale", "block_q", "block_k"))
    _check_common(op, q, k, *common)
    _checks.expect(0 < threshold <= 1, op, "threshold", "a share of the mass, above 0 and up to 1", threshold)
    _checks.expect(options["stride"] in (4, 8, 16, 32), op, "stride", "4, 8, 16 or 32", options["stride"])
    _checks.expect(0 <= options["samples"] <= 64, op, "samples", "a number of queries from 0 to 64", options["samples"])
    _check_positive(op, "max_blocks", options["max_blocks"])
    if options["head_threshold"] is not None:
        _checks.tensor(op, "head_threshold", options["head_threshold"], torch.float32, (q.shape[1],), like=q)
    return options


def _adaptive_impl(q, k, threshold=0.95, **given):
    options = _adaptive_options(q, k, threshold, given)
    return reference.adaptive_block_index(q, k, threshold, **options)


def _adaptive_triton(q, k, threshold=0.95, **given):
    from ..triton import prefill_index as kernels

    return kernels.adaptive_block_index(q, k, threshold, **_adaptive_options(q, k, threshold, given))


def _adaptive_fake(q, k, threshold=0.95, **given):
    options = _adaptive_options(q, k, threshold, given)
    return _empty_blocks(q, k, options["max_blocks"], options["block_q"], options["block_k"])


def _empty_blocks(q, k, capacity, block_q, block_k):
    blocks = -(-k.shape[2] // block_k)
    capacity = blocks if capacity is None else min(capacity, blocks)
    shape = (q.shape[0], q.shape[1], -(-q.shape[2] // block_q))
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(*shape, capacity, dtype=torch.int32)


_a_shape_index = _library.define(
    "a_shape_index",
    "(SymInt nq, SymInt nk, *, SymInt sink, SymInt local, Tensor? kv_start=None, int block_q=64, int block_k=64, "
    "Device? device=None) -> (Tensor block_count, Tensor block_index)",
    reference=_a_shape_impl,
    fake=_a_shape_fake,
)
_vertical_slash_index = _library.define(
    "vertical_slash_index",
    "(Tensor q, Tensor k, SymInt vertical_size, SymInt slash_size, *, int last_q=64, SymInt sink=30, "
    "SymInt local=100, Tensor? kv_start=None, float? scale=None, int block_q=64, int block_k=64, "
    "SymInt? max_blocks=None, SymInt? max_columns=None) "
    "-> (Tensor block_count, Tensor block_index, Tensor column_count, Tensor column_index)",
    reference=_vertical_slash_impl,
    fake=_vertical_slash_fake,
    triton=_vertical_slash_triton,
)
_block_topk_index = _library.define(
    "block_topk_index",
    "(Tensor q, Tensor k, SymInt top_k, *, SymInt sink=1, SymInt local=1, Tensor? kv_start=None, int block_q=64, "
    "int block_k=64) -> (Tensor block_count, Tensor block_index)",
    reference=_block_topk_impl,
    fake=_block_topk_fake,
    triton=_block_topk_triton,
)
_adaptive_block_index = _library.define(
    "adaptive_block_index",
    "(Tensor q, Tensor k, float threshold=0.95, *, int stride=8, SymInt sink=1, SymInt local=1, "
    "Tensor? kv_start=None, float? scale=None, int block_q=64, int block_k=64, SymInt? max_blocks=None, "
    "Tensor? head_threshold=None, int samples=0) -> (Tensor block_count, Tensor block_index)",
    reference=_adaptive_impl,
    fake=_adaptive_fake,
    triton=_adaptive_triton,
)

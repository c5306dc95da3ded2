"""Index builders of sparse prefill: which blocks and columns a head should attend, found from its queries and keys.

Three patterns of MInference 1.0 (Jiang et al., 2024, arXiv 2407.02490, section 3) and one that it lacks:

- A-shape: attention sinks and a sliding window;
- vertical-slash: the columns and diagonals that the last queries attend most;
- block top-k: the key blocks whose mean key agrees best with the block's mean query;
- adaptive: antidiagonal scores as in XAttention (Xu et al., 2025, arXiv 2503.16428), then as many blocks as it takes
  to hold a given share of the attention mass, so that every row gets the density it needs.

All heads are built in one call, with no host synchronisation; output shapes depend on the budgets alone. All are
causal, bottom-right aligned. Kernels: `csrc/cpu/prefill_index.cpp`, `csrc/cuda/prefill_index_*.cu`,
`triton/prefill_index.py`, `triton/vertical_slash.py`; the maths: `reference/prefill_index.py`, which serves A-shape
everywhere, that being arithmetic on positions alone.
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
    """Sink tokens and a local window: every block that holds one of the first `sink` keys or, for one of the row's
    queries, the query itself or one of the `local` - 1 keys before it. `local` = 0 means no window.

    Args:
        nq, nk: numbers of queries and keys; the queries are the last nq positions.
        sink, local: tokens.
        kv_start: int32 [B], the first real key of each sequence of a left-padded batch; sinks count from it.
        device: where the index lives; kv_start's device, or the CPU, if None.

    Returns:
        A `BlockIndex` with one head, and batch B (1 without kv_start).

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

    With A the causal softmax of the last `last_q` queries over all keys: column j scores the sum of A[:, j], and the
    `vertical_size` best are kept; diagonal o (query position minus key position) scores the sum along it. Diagonals
    are chosen as bands one block wide: a band is, in every row, the block that many blocks before the row's last key,
    and scores the mass of its diagonals by the share of each that falls in it. So `slash_size` diagonals cost
    ceil(slash_size / block_k) blocks a row, however scattered.

    Args:
        q: [B, Hq, Nq, D]; k: [B, Hkv, Nk, D].
        vertical_size, slash_size: tokens, the budgets.
        sink: the first keys, always kept as columns; local: the nearest diagonals, whose bands are always kept.
        kv_start: int32 [B], the first real key of each sequence of a left-padded batch.
        max_blocks, max_columns: caps on blocks a row and columns; past them the best-scoring are kept.

    Returns:
        A `BlockIndex` with Hq heads, and one list of columns for all rows of a head.

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
    """The `top_k` key blocks whose mean key has the largest dot product with the block's mean query.

    Blocks that hold one of the first `sink` keys, or of the `local`-wide window of a query, are taken first and count
    towards `top_k`; with both 0 this is MInference's block-sparse head.

    Args:
        q: [B, Hq, Nq, D]; k: [B, Hkv, Nk, D]; top_k: blocks a row.
        kv_start: int32 [B], the first real key of each sequence of a left-padded batch.

    Returns:
        A `BlockIndex` with Hq heads.

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
    """As many blocks as it takes to hold a share of the estimated attention mass, row by row.

    Queries and keys are taken in groups of `stride` tokens; the score of two groups is the mean of q·k along the
    antidiagonal of their tile, softmax runs over the key groups, and a block's mass is the sum of its tiles. In each
    row the heaviest blocks are taken until they hold `threshold` of the row's mass; blocks that hold a sink or a
    local key are always taken, and first.

    With `samples`, the attention of that many queries of every row is computed exactly besides, and a block's mass is
    the largest share that any of the row's query groups or sampled queries gives it. Groups meet every query and key
    but blur a single strong key; sampled queries see every key sharply but not every query; and the largest share
    keeps what a few queries need and the others do not. At equal density the error of the output is two to three times
    smaller than without (docs/measurements/attention.md).

    Args:
        q: [B, Hq, Nq, D]; k: [B, Hkv, Nk, D].
        threshold: share of the mass, above 0 and up to 1.
        stride: 4, 8, 16 or 32 tokens; the estimate costs 1 / (2 stride) of dense attention's multiplications.
        sink, local: tokens, see `a_shape_index`.
        max_blocks: a cap on blocks a row (and so on the index's size); past it the heaviest are kept.
        head_threshold: float32 [Hq], a threshold for each head in place of `threshold`.
        samples: queries of every row, 0 to 64, spread evenly; n of them cost n / (2 block_q) of dense attention.

    Returns:
        A `BlockIndex` with Hq heads.

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

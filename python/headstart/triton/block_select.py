"""One kernel that selects entries from each row of scores: the top k, a share of the row's mass, or both.

One program takes one row. Forced entries come first in its ranking, then entries with higher scores, then those with
lower ids. The kernel lists the first entries of this ranking. It lists as many as there is room for. If a share is
given, it lists no more than are needed to hold this share of the row's mass.

No row is sorted. Scores become unsigned keys of the same order. The key of the last listed entry is found digit by
digit, from the top: each digit is the largest of 2^DIGIT candidates at which either bound is still met.

       key   ffff…  forced                    pass 1       pass 2               last pass, in the order of ids
                │   heaviest                  ┌──┬──┬──┬──┐                     key > last: listed
                │      ·                      │  │  │xx│  │ → ┌──┬──┬──┬──┐     key = last: while the bounds allow
      last  ──► │      · ◄── bound is met     └──┴──┴──┴──┘   │  │xx│  │  │ …   ids written at their running count
                ▼   lightest                  count and mass  └──┴──┴──┴──┘
       key   0      not visible, NaN          above each candidate

Floor: a row's scores are read from memory once, and its ids are written once. The 32 / DIGIT + 2 passes over the scores
read them from L1 (a row of 2,048 blocks is 8 KiB), or from L2 for the columns of a long context.

Results are deterministic: counts are integers, and the same entries are always added in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import on

FORCED = tl.constexpr(0xFF800000)  # the key of +inf


@triton.jit
def row_blocks(kv_start, batch, row, nq, nk, sink, local, block_q, block_k, HAS_KV_START: tl.constexpr):
    """(begin, end, sink_end, window) of a row of queries.

    The row sees the key blocks [begin, end). The blocks [begin, sink_end) and [window, end) are forced. `sink` and
    `local` are at most nk, so no sum overflows.
    """
    start = 0
    if HAS_KV_START:
        start = tl.minimum(tl.maximum(tl.load(kv_start + batch), 0), nk)
    first = nk - nq + row * block_q
    last = tl.minimum(first + block_q, nk) - 1
    begin = start // block_k
    end = tl.where(last < start, begin, last // block_k + 1)
    sinks = tl.where(sink > 0, (start + sink + block_k - 1) // block_k, begin)
    window = tl.where(local > 0, tl.maximum(first - local + 1, 0) // block_k, end)
    return begin, end, tl.minimum(sinks, end), tl.maximum(window, begin)


@triton.jit
def _keys(scores, ids, end, sink_end, window):
    """The scores of `ids` as keys (0 if not to be listed), their share of the mass, and whether they are forced."""
    score = tl.load(scores + ids, mask=ids < end, other=float("-inf"))
    forced = (ids < end) & ((ids < sink_end) | (ids >= window))
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)  # -0 ties with 0
    key = tl.where((bits >> 31) == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)
    key = tl.where(score > float("-inf"), key, tl.zeros_like(key))
    key = tl.where(forced, FORCED, key)
    return key, tl.where(score > 0, score, 0.0), forced


@triton.jit(
    do_not_specialize=["heads", "rows", "entries", "nq", "nk", "sink", "local", "block_q", "block_k", "capacity"],
    do_not_specialize_on_alignment=["scores", "kv_start", "head_share", "count", "index"],
)
def select_kernel(
    scores,
    kv_start,
    head_share,
    count,
    index,
    share,
    heads,
    rows,
    entries,
    nq,
    nk,
    sink,
    local,
    block_q,
    block_k,
    capacity,
    CHUNK: tl.constexpr,
    DIGIT: tl.constexpr,
    HAS_KV_START: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    HAS_HEAD_SHARE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = (program % rows).to(tl.int32)
    batch = program // rows // heads
    begin, end, sink_end, window = row_blocks(kv_start, batch, row, nq, nk, sink, local, block_q, block_k, HAS_KV_START)
    scores += program * entries
    lane = tl.arange(0, CHUNK)
    goal = 0.0
    if HAS_SHARE:
        for first in tl.range(begin, end, CHUNK):
            key, mass, forced = _keys(scores, first + lane, end, sink_end, window)
            goal += tl.sum(mass, 0)
        if HAS_HEAD_SHARE:
            share = tl.load(head_share + program // rows % heads)
        goal *= share

    digits = tl.arange(0, 1 << DIGIT)
    last = tl.zeros([1], tl.uint32)
    for step in tl.range(0, 32 // DIGIT):
        shift = 32 - DIGIT - step * DIGIT
        candidates = last + (digits.to(tl.uint32) << shift.to(tl.uint32))
        above = tl.zeros([1 << DIGIT], tl.int32)
        held = tl.zeros([1 << DIGIT], tl.float32)
        for first in tl.range(begin, end, CHUNK):
            key, mass, forced = _keys(scores, first + lane, end, sink_end, window)
            reached = key[:, None] >= candidates[None, :]
            above += tl.sum(reached.to(tl.int32), 0)
            if HAS_SHARE:
                held += tl.sum(tl.where(reached, mass[:, None], 0.0), 0)
        met = above >= capacity
        if HAS_SHARE:
            met = met | (held >= goal)
        digit = tl.sum((met & (digits > 0)).to(tl.int32), 0)
        last += digit.to(tl.uint32) << shift.to(tl.uint32)
    last = tl.where(last > FORCED, FORCED, last)  # forced entries are listed even if the goal is a mass of 0

    above_n = 0
    held_n = 0.0
    for first in tl.range(begin, end, CHUNK):
        key, mass, forced = _keys(scores, first + lane, end, sink_end, window)
        above_n += tl.sum((key > last).to(tl.int32), 0)
        if HAS_SHARE:
            held_n += tl.sum(tl.where(key > last, mass, 0.0), 0)
    ties = 0
    listed = 0
    ids_out = index + program * capacity
    for first in tl.range(begin, end, CHUNK):
        ids = first + lane
        key, mass, forced = _keys(scores, ids, end, sink_end, window)
        tie = ((key == last) & (key > 0)).to(tl.int32)
        rank = ties + tl.cumsum(tie, 0) - tie
        chosen = (tie != 0) & (above_n + rank < capacity)
        if HAS_SHARE:
            chosen = chosen & (forced | (held_n + rank.to(tl.float32) * mass < goal))
        chosen = (chosen | (key > last)).to(tl.int32)
        tl.store(ids_out + listed + tl.cumsum(chosen, 0) - chosen, ids, mask=chosen != 0)
        ties += tl.sum(tie, 0)
        listed += tl.sum(chosen, 0)
    tl.store(count + program, listed)
    for first in tl.range(listed, capacity, CHUNK):
        tl.store(ids_out + first + lane, tl.zeros([CHUNK], tl.int32), mask=first + lane < capacity)


def select(
    scores: torch.Tensor,
    capacity: int,
    *,
    nq: int,
    nk: int,
    block_q: int,
    block_k: int,
    sink: int = 0,
    local: int = 0,
    kv_start: torch.Tensor | None = None,
    share: float | None = None,
    head_share: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(count int32 [B, H, R], ids int32 [B, H, R, capacity]) of float32 scores [B, H, R, T], contiguous.

    A row is a block of queries, and an entry is a block of keys. nq, nk, the block sizes, sink, local and kv_start say
    which entries a row sees and which are forced. The scores of other entries are not read. Single keys are blocks of
    one key. With `share` (or `head_share` [H]), scores are masses, which are not negative.
    """
    batch, heads, rows, entries = scores.shape
    count = scores.new_empty((batch, heads, rows), dtype=torch.int32)
    index = scores.new_empty((batch, heads, rows, capacity), dtype=torch.int32)
    # There are many short rows; with two bits a pass they need 16 short passes. There are few long rows, which do not
    # fit L1; they use four bits.
    chunk = min(2048, max(32, triton.next_power_of_2(entries)))
    long = entries > 4 * chunk
    if count.numel() > 0:
        with on(scores.device):
            select_kernel[(count.numel(),)](
                scores,
                kv_start if kv_start is not None else scores,
                head_share.contiguous() if head_share is not None else scores,
                count,
                index,
                0.0 if share is None else share,
                heads,
                rows,
                entries,
                nq,
                nk,
                min(sink, nk),
                min(local, nk),
                block_q,
                block_k,
                capacity,
                CHUNK=chunk,
                DIGIT=4 if long else 2,
                HAS_KV_START=kv_start is not None,
                HAS_SHARE=share is not None or head_share is not None,
                HAS_HEAD_SHARE=head_share is not None,
                num_warps=16 if long else max(1, chunk // 512),
            )
    return count, index

"""Estimates how much of the attention a pattern computes at a length, before any query is known.

For patterns with a budget, the budget gives the answer. Adaptive takes as much as it needs, so its curve was measured.
If a search has measured the density of a head, the curve is shifted so that it passes through that point.
"""

from __future__ import annotations

from .patterns import HeadPattern

BLOCK = 64
# Adaptive's curve, fitted to SmolLM2-135M from 128 to 8,192 tokens (docs/measurements/attention.md has both):
# density = (1 + (tokens - FORCED) / (HALF · (0.07 / (1 - threshold)) ** STEEPNESS)) ** -DECAY
FORCED, HALF, STEEPNESS, DECAY = 192, 680, 0.94, 0.6
# Assumed for a search that does not say how many tokens it read.
SEARCH_TOKENS = 4096


def density(pattern: HeadPattern, nq: int, nk: int, tokens: int | None = None) -> float:
    """The share, 0 to 1, of the visible (query, key) pairs that a pattern computes for the last nq of nk tokens.

    Args:
        pattern: the pattern of one head.
        nq, nk: the numbers of queries and keys.
        tokens: the length of the prompt on which a search measured `pattern.density`. None means `SEARCH_TOKENS`.
    """
    everything = _visible(nk) - _visible(nk - nq)
    return (_attended(pattern, nk, nk, tokens) - _attended(pattern, nk - nq, nk, tokens)) / everything


def _visible(n: int) -> float:
    return n * (n + 1) / 2


def _attended(pattern: HeadPattern, n: int, nk: int, tokens: int | None) -> float:
    """The number of attended pairs of the first n queries, in a call with nk keys."""
    share = _estimate(pattern, n, nk)
    if pattern.density is not None and 0 < share < 1:
        # Scales the odds that a pair is missed by the error of the estimate at the measured length. With odds, the
        # result always stays between 0 and 1.
        tokens = tokens or SEARCH_TOKENS
        estimated = _odds(_estimate(pattern, tokens, tokens))
        if estimated > 0:
            share = 1 / (1 + _odds(share) * _odds(pattern.density) / estimated)
    return share * _visible(n)


def _odds(share: float) -> float:
    """The odds that a pair is missed."""
    return (1 - share) / max(share, 1e-6)


def _estimate(pattern: HeadPattern, n: int, nk: int) -> float:
    params = dict(pattern.params)
    if pattern.name == "dense" or n <= BLOCK:
        return 1.0
    if pattern.name == "adaptive":
        return adaptive_density(n, params["threshold"])
    if pattern.name == "block_topk":
        return _window_share(n, params["top_k"])
    if pattern.name == "a_shape":
        local = -(-(params["local"] - 1) // BLOCK) + 1 if params["local"] else 0
        return _window_share(n, -(-params["sink"] // BLOCK) + local)
    # The nearest bands are always taken. The other bands and the columns are assumed to be spread evenly over the rest.
    near, blocks = max(-(-params["local"] // BLOCK), 1), -(-nk // BLOCK)
    bands = min(1.0, max(-(-params["slash_size"] // BLOCK) - near, 0) / max(blocks - near, 1))
    columns = min(1.0, params["vertical_size"] / nk)
    missed = (1 - _window_share(n, near)) * (1 - bands) * (1 - columns)
    return 1 - missed


def _window_share(n: int, blocks: int) -> float:
    """The share of the pairs if each row takes this many blocks. One is on the diagonal, and half of it is visible."""
    keys = min(max(blocks * BLOCK - BLOCK / 2, 0), n)
    return (_visible(keys) + (n - keys) * keys) / _visible(n)


def adaptive_density(n: int, threshold: float) -> float:
    if threshold >= 1:
        return 1.0
    scale = HALF * (0.07 / (1 - threshold)) ** STEEPNESS
    return (1 + max(n - FORCED, 0) / scale) ** -DECAY

"""Scales the default coefficients of `cost.py` to this machine, by four timings that take about 0.1 s.

The defaults were measured on another machine. How the time of a kind of work grows with its amounts is much the same on
all machines. How fast a machine is differs, and so does the ratio of torch's rate to headstart's. So each kind keeps
the proportions of its coefficients, and a timing of one shape says how large they are. `headstart tune` measures all
shapes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from .. import _library
from . import cost, tune
from .cost import Call, Costs, dtype_name, kernel_terms, sdpa_terms
from .index import full_index

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
PROMPT = 256  # long enough for products to take most of the time, short enough for a CPU without bf16 arithmetic
CONTEXT = 2048  # that a decoded token attends
RUNS = 3

# The kinds of work that each timing scales.
PREFILL = {
    "SDPA": ("sdpa", "sdpa_masked"),
    "dense": ("kernel", "a_shape", "vertical_slash", "block_topk", "adaptive", "stitch"),
}
DECODE = {"SDPA": ("sdpa_decode",), "dense": ("kernel_few",)}


def in_use(dtype: torch.dtype) -> Costs:
    """The costs by which a path is chosen: those of `headstart tune`, or the defaults scaled to this machine.

    Scaling takes about 0.1 s, the first time for each dtype.
    """
    costs = cost.in_use()
    measured = costs.machine == cost.machine_key() or dtype_name(dtype) not in costs.coefficients
    if measured or not _library.has_kernel("sparse_attention", "CPU"):
        return costs
    return _scaled(costs, dtype)


@functools.lru_cache(maxsize=32)
def _scaled(costs: Costs, dtype: torch.dtype) -> Costs:
    return anchored(costs, dtype)


def anchored(costs: Costs, dtype: torch.dtype, seconds: Callable[[tune.Work], float] | None = None) -> Costs:
    """The same costs with the coefficients of one dtype scaled to this machine.

    Args:
        seconds: times a work; `shortest` if None.
    """
    kinds = costs.coefficients[dtype_name(dtype)]
    seconds = seconds or shortest
    factors = {}
    with torch.inference_mode():
        for nq, nk, scaled in ((PROMPT, PROMPT, PREFILL), (1, CONTEXT, DECODE)):
            for work in works(Call(1, HEADS, KV_HEADS, nq, nk, HEAD_DIM, dtype)):
                factor = seconds(work) / costs.seconds(dtype, work.kind, work.terms)
                factors |= dict.fromkeys(scaled[work.name], factor)
    new = {kind: {name: value * factors[kind] for name, value in terms.items()} for kind, terms in kinds.items()}
    coefficients = {**costs.coefficients, dtype_name(dtype): new}
    source = f"{costs.source}, scaled to this machine"
    return Costs(costs.machine, coefficients, costs.residuals, costs.date, source)


def works(call: Call) -> list[tune.Work]:
    """torch's attention and headstart's kernel on the same call."""
    q, k, v = tune._inputs(call)
    index = full_index(call.nq, call.nk, q.device)
    return [
        tune.Work("SDPA", functools.partial(tune._sdpa, q, k, v, None), *sdpa_terms(call)),
        tune.Work("dense", functools.partial(tune._attend, q, k, v, index), *kernel_terms(call)),
    ]


def shortest(work: tune.Work) -> float:
    """The shortest of a few calls, as a disturbance can only add time; the first one is not counted."""
    work.call()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work.call()
        times.append(time.perf_counter() - start)
    return min(times)

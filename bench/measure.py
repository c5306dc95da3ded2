"""Timing. The calls take turns, so that a disturbance of the machine slows all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int,
    max_rounds: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times the calls in rounds A B C, A B C, ...; returns microseconds by name, one for each round.

    Stops after `max_rounds`, or when `seconds` have passed and `min_rounds` are done. The caller warms up before.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = clock()
        for done in range(max_rounds):
            if done >= min_rounds and clock() - begin >= seconds:
                break
            for name, call in calls.items():
                start = clock()
                call()
                times[name].append((clock() - start) * 1e6)
    finally:
        if collecting:
            gc.enable()
    return times


class Rotation:
    """Copies of the same tensors, so many that a copy has left the caches when its turn comes again.

    Calls that take turns share one rotation, so that none finds in the caches what another has just read.
    """

    def __init__(self, tensors: Iterable, cold_bytes: int):
        first = tuple(tensors)
        size = sum(t.nbytes for t in first)
        copies = max(1, -(-cold_bytes // size))
        self.items = [first, *(tuple(t.clone() for t in first) for _ in range(copies - 1))]
        self.bytes = size * len(self.items)
        self.turn = -1

    def next(self) -> tuple:
        self.turn = (self.turn + 1) % len(self.items)
        return self.items[self.turn]

"""Times attention on this CPU, and fits the coefficients of `cost.py` to the times. `headstart tune` runs it.

It times what a patched model calls: transformers' SDPA function, headstart's kernel, and the index of a plan. The works
of one shape run in turns. Only the shortest time of each work is kept, because a disturbance can only add time. (On a
busy machine, calls of 100 µs had medians of 10 to 40 ms, which is a time slice.)
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .. import _library
from .._files import write_whole
from ..ops.sparse_attention import BlockIndex, sparse_attention
from ..reference.sparse_attention import compact
from .cost import Call, Costs, dtype_name, index_terms, kernel_terms, machine_key, sdpa_terms, stitch_terms, to_json
from .index import full_index
from .patterns import HeadPattern
from .plan import PrefillPlan

SHAPES = ((9, 3, 64), (8, 2, 128))  # query heads, key/value heads, head dim
DTYPES = (torch.bfloat16, torch.float32)
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# (queries, keys): decoding, and chunks of a prompt.
CHUNKS = ((1, 256), (1, 1024), (1, 4096), (16, 4096), (64, 1024), (64, 4096), (256, 1024), (256, 4096))
SPARSE_DENSITY = 0.25
LONGEST_MASKED = 2048
SHORTEST_SPARSE = 128
# When `measure` has used up its seconds, it leaves out shapes with more keys than this.
ALWAYS = 1024
# Two families of heads, to time how long it takes to combine their indices.
MIXED = ("adaptive", "vertical_slash")


class Work(NamedTuple):
    """A call to time, and the kind and amounts of its work, as in `cost.py`."""

    name: str
    call: Callable[[], object]
    kind: str
    terms: dict[str, float]


class Sample(NamedTuple):
    """The shortest time of one work."""

    name: str
    shape: Call
    kind: str
    terms: dict[str, float]
    seconds: float


def measured_shapes() -> list[Call]:
    """All shapes, the fastest first."""
    shapes = [
        Call(1, heads, kv_heads, nq, nk, head_dim, dtype)
        for nq, nk in [*zip(LENGTHS, LENGTHS), *CHUNKS]
        for heads, kv_heads, head_dim in SHAPES
        for dtype in DTYPES
    ]
    return sorted(shapes, key=lambda shape: (shape.pairs, shape.nk))


def measure(seconds: float = 45.0, advance: Callable[[], object] = lambda: None) -> list[Sample]:
    """Times every shape. After `seconds`, shapes with more than `ALWAYS` keys are left out.

    Calls `advance` after each shape. Raises a ValueError if the CPU kernels are not loaded.
    """
    if not _library.has_kernel("sparse_attention", "CPU"):
        raise ValueError(f"tune: no CPU kernels: {_library.cpu.error}. Cure: {_library.cpu.cure}")
    begin, samples = time.perf_counter(), []
    with torch.inference_mode():
        for shape in measured_shapes():
            if shape.nk <= ALWAYS or time.perf_counter() - begin < seconds:
                samples += _time(shape)
            advance()
    return samples


def _time(shape: Call, seconds: float = 0.25, rounds: int = 3) -> list[Sample]:
    works = _works(shape)
    times: dict[str, list[float]] = {work.name: [] for work in works}
    for work in works:
        work.call()
    begin = time.perf_counter()
    while len(times[works[0].name]) < rounds or (
        time.perf_counter() - begin < seconds and len(times[works[0].name]) < 30
    ):
        for work in works:
            start = time.perf_counter()
            work.call()
            times[work.name].append(time.perf_counter() - start)
    return [Sample(w.name, shape, w.kind, w.terms, min(times[w.name])) for w in works]


def _works(shape: Call) -> list[Work]:
    nq, nk, whole = shape.nq, shape.nk, shape.nq == shape.nk
    q, k, v = _inputs(shape)
    mask = torch.ones(nq, nk, dtype=torch.bool).tril(nk - nq)[None, None]

    def kernel(name: str, index: BlockIndex, share: float) -> Work:
        columns = 0 if index.column_index is None else shape.heads * index.column_index.shape[-1]
        return Work(name, lambda: _attend(q, k, v, index), *kernel_terms(shape, share, columns))

    works = [kernel("dense", full_index(nq, nk, q.device), 1.0)]
    if whole or nq == 1:
        works.append(Work("SDPA", lambda: _sdpa(q, k, v, None), *sdpa_terms(shape)))
    if nq > 1 and (nk <= LONGEST_MASKED or not whole):
        terms = sdpa_terms(shape._replace(masked_keys=nk))
        works.append(Work("SDPA, masked", lambda: _sdpa(q, k, v, mask), *terms))
    if nk < SHORTEST_SPARSE or nq < 64:
        return works
    index = _random_index(shape, SPARSE_DENSITY)
    works.append(kernel("sparse", index, index.density(nq, nk)))
    for name in ("a_shape", "vertical_slash", "block_topk", "adaptive"):
        plan = PrefillPlan.uniform(name)
        terms = index_terms(plan.default, shape)
        works.append(Work(f"{name} index", lambda plan=plan: plan.index(0, q, k), *terms))
    index = PrefillPlan.uniform("vertical_slash").index(0, q, k)
    works.append(kernel("vertical_slash", index, min(index.density(nq, nk), 1 - 1e-9)))
    mixed = PrefillPlan(HeadPattern.of(MIXED[0]), ({h: HeadPattern.of(MIXED[1]) for h in range(shape.heads // 2)},))
    works.append(Work("mixed index", lambda: mixed.index(0, q, k), *stitch_terms(shape)))
    return works


def _inputs(shape: Call) -> tuple[torch.Tensor, ...]:
    """q, k, v in the layout of a model. They have an attention sink and slowly changing topics for an index to find."""
    generator = torch.Generator().manual_seed(0)

    def noise(heads: int, n: int) -> torch.Tensor:
        return torch.randn(1, heads, n, shape.head_dim, generator=generator)

    topics = noise(shape.kv_heads, shape.nk // 256 + 2).flatten(0, 1).mT
    topics = F.interpolate(topics, size=shape.nk, mode="linear").mT[None] * 11**0.5 / shape.head_dim**0.25
    k, v = 0.7 * noise(shape.kv_heads, shape.nk) + topics, noise(shape.kv_heads, shape.nk)
    repeated = topics[:, :, -shape.nq :].repeat_interleave(shape.heads // shape.kv_heads, 1)
    q = 0.7 * noise(shape.heads, shape.nq) + repeated
    sink = noise(1, 1)[0, 0, 0]
    q += sink / shape.head_dim**0.5
    k[:, :, 0] = 6 * sink
    return tuple(x.to(shape.dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))


def _random_index(shape: Call, density: float) -> BlockIndex:
    """An index with the diagonal and random blocks in every head."""
    rows, blocks = -(-shape.nq // 64), -(-shape.nk // 64)
    generator = torch.Generator().manual_seed(0)
    selected = torch.rand(1, shape.heads, rows, blocks, generator=generator) < density
    on_diagonal = torch.ones(rows, blocks, dtype=torch.bool).tril(blocks - rows)
    count, ids = compact(selected & on_diagonal | on_diagonal & ~on_diagonal.tril(-1 + blocks - rows))
    return BlockIndex(count, ids[..., : int(count.max())].contiguous())


def _attend(q, k, v, index: BlockIndex) -> torch.Tensor:
    return sparse_attention(q, k, v, index)[0].transpose(1, 2).contiguous()


def _sdpa(q, k, v, mask) -> torch.Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    return sdpa_attention_forward(module, q, k, v, mask)[0]


# --- the fit ---------------------------------------------------------------------------------------------------------


def fit(samples: Sequence[Sample], source: str = "a measurement") -> Costs:
    """Fits the coefficients of every dtype and kind of work. None is negative, and the fit is to relative errors."""
    coefficients: dict[str, dict[str, dict[str, float]]] = {}
    residuals: dict[str, dict[str, dict[str, float]]] = {}
    costs = Costs(
        machine_key(), coefficients, residuals, datetime.now(timezone.utc).isoformat(timespec="seconds"), source
    )
    for dtype in dict.fromkeys(sample.shape.dtype for sample in samples):
        mine = [sample for sample in samples if sample.shape.dtype == dtype]
        found, errors = coefficients.setdefault(dtype_name(dtype), {}), residuals.setdefault(dtype_name(dtype), {})
        for kind in sorted({sample.kind for sample in mine}, key=lambda kind: kind == "stitch"):
            of_kind = [sample for sample in mine if sample.kind == kind]
            names = list(of_kind[0].terms)
            # A mixed index includes the indices of its families. Their coefficients are already known at this point.
            known = [_families(costs, sample) if kind == "stitch" else 0.0 for sample in of_kind]
            values = non_negative_fit(
                [[sample.terms[name] / sample.seconds for name in names] for sample in of_kind],
                [1 - part / sample.seconds for part, sample in zip(known, of_kind)],
            )
            found[kind] = dict(zip(names, values))
            missed = [abs(predicted(costs, sample) / sample.seconds - 1) for sample in of_kind]
            errors[kind] = {"median": statistics.median(missed), "largest": max(missed)}
    return costs


def predicted(costs: Costs, sample: Sample) -> float:
    known = _families(costs, sample) if sample.kind == "stitch" else 0.0
    return known + costs.seconds(sample.shape.dtype, sample.kind, sample.terms)


def _families(costs: Costs, sample: Sample) -> float:
    half = sample.shape.heads // 2
    parts = ((MIXED[0], sample.shape.heads - half), (MIXED[1], half))
    return sum(
        costs.index(sample.shape._replace(heads=heads, kv_heads=heads), [HeadPattern.of(name)]) for name, heads in parts
    )


def non_negative_fit(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """The x ≥ 0 with the least Σ |rows · x - targets|, found by reweighted least squares.

    With this sum of absolute values, one shape with a disturbed timing does not spoil the fit of the others.
    """
    matrix, target = np.array(rows), np.array(targets)
    weights = np.ones(len(target))
    for _ in range(15):
        values = non_negative_least_squares(matrix * weights[:, None], target * weights)
        weights = np.maximum(abs(matrix @ values - target), 1e-3) ** -0.5
    return values.tolist()


def non_negative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x ≥ 0 with the least |matrix · x - target|². It tries every set of non-zero coefficients. There are few."""
    scale = abs(matrix).max(0) + 1e-300
    matrix = matrix / scale
    best, least = np.zeros(len(scale)), target @ target
    for size in range(1, len(scale) + 1):
        for kept in map(list, itertools.combinations(range(len(scale)), size)):
            values = np.linalg.lstsq(matrix[:, kept], target, rcond=None)[0]
            missed = matrix[:, kept] @ values - target
            if values.min() >= 0 and missed @ missed < least * (1 - 1e-9):
                best, least = np.zeros(len(scale)), missed @ missed
                best[kept] = values
    return best / scale


def save(costs: Costs, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: partial.write_text(to_json(costs), encoding="utf-8"))

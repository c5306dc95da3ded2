"""The targets: what each case has to reach, as a ratio within one run on one machine. They are set for 8,192 tokens.

A page judges every results file by the targets that are here, also a file from before a target changed.
"""

from __future__ import annotations

import dataclasses

from baselines import COPY, INT4, LINEAR, SDPA
from cases import CHOICE, EVERY, STEPS
from work import (
    BITMAP,
    BITMAP_GEMM,
    BITMAP_VALUES,
    COMPRESS,
    INT4_GEMM,
    INT8_ACTIVATIONS,
    INT8_SMALL_GROUPS,
)

FASTEST_TIER = "versus_fastest_tier"


@dataclasses.dataclass(frozen=True)
class Target:
    """`metric` is a path into a result of `report.evaluate`, e.g. ``versus.torch SDPA``. One of the bounds is set."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None


def targets(group: dict, result: dict) -> tuple[Target, ...]:
    """The targets of a result. `group` and `result` are plain data, as `report.run_group` returns them."""
    family, tier, name, bf16 = group["family"], group["tier"], result["name"], group["dtype"] == "bf16"
    if result["baseline"] is not None:
        return ()
    if family == CHOICE:
        return (Target(FASTEST_TIER, at_least=0.95),) if result["tier"] == group["chosen"] else ()
    if family == "sparse_attention":
        if name == EVERY:  # float32 results need the float32 unit, with which SDPA computes too
            return (Target(f"versus.{SDPA}", at_least=3.3 if bf16 else 1),)
        return (Target("per_density", at_most=1.15),)
    if family == "prefill_index":
        return () if name == EVERY else (Target("share_of_full", at_most=0.05),)
    if family == "centroid_lookup":
        return (Target(f"versus.{SDPA}", at_least=5),) if name in STEPS and bf16 else ()
    if family == "tier":
        return (Target(f"versus.{SDPA}", at_least=1),) if tier == "avx2" else ()
    if family == INT4_GEMM:
        return int4_targets(group["tokens"], tier, name)
    if family == BITMAP:
        if name == COMPRESS:
            return (Target("gbs", at_least=1),)
        return (Target(f"versus.{COPY}", at_least=1.1),) if name == BITMAP_VALUES["same"] and tier is None else ()
    if family == BITMAP_GEMM:
        return (Target(f"versus.{LINEAR}", at_least=2.5),) if group["tokens"] == 1 and tier is None else ()
    return ()


def int4_targets(rows: int, tier: str | None, name: str) -> tuple[Target, ...]:
    if name == INT8_SMALL_GROUPS:
        return (Target("percent.multiply", at_least=60),)
    if name == INT8_ACTIVATIONS:
        return (Target(f"versus.{LINEAR}", at_least=1),) if rows == 256 and tier is None else ()
    if tier is not None:
        return (Target(f"versus.{INT4}", at_least=1),) if tier == "avx2" else ()
    return {
        1: (Target("percent.read", at_least=88), Target(f"versus.{INT4}", at_least=1.6)),
        16: (Target(f"versus.{INT4}", at_least=1.9),),
        256: (Target(f"versus.{INT4}", at_least=2.4), Target(f"versus.{LINEAR}", at_least=0.85)),
    }.get(rows, ())

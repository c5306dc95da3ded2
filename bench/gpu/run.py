"""The GPU kernels against torch's own and the machine's limits: ``PYTHONPATH=bench python bench/gpu/run.py``.

Families run in this order: attention (prompts of 8K, 32K and 128K tokens against torch's flash and cuDNN attention),
int4, bitmap, lookup, indices (every builder), decode (batches and sparse lists), merge, crossovers (which prints the
constants of csrc/torch/cuda.cpp), models (whole ones, with random weights). The limits of the machine are measured
first. Results are checked before they are timed. Writes bench/results/<gpu>.json after every row.

``--profile NAME`` launches one kernel a few times and nothing else, for Nsight Compute (`make gpu-profile`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

import attention
import headstart
import indices
import lookup
import models
import weights
from clock import Clock, Results, environment, rooflines
from headstart import _library

SECONDS = 500

Step = Callable[[Clock, Results], None]
FAMILIES: dict[str, list[Step]] = {
    "attention": [lambda c, r, p=p: attention.prompt(c, r, *p) for p in attention.PROMPTS],
    "int4": [lambda c, r, p=p: weights.int4(c, r, *p) for p in weights.INT4_CASES],
    "bitmap": [lambda c, r, p=p: weights.bitmap(c, r, *p) for p in weights.BITMAP_CASES],
    "lookup": [lambda c, r, p=p: lookup.lookup(c, r, *p) for p in lookup.CASES],
    "indices": [lambda c, r, n=n: indices.builders(c, r, n) for n in indices.LENGTHS],
    "decode": [lambda c, r, p=p: attention.decode(c, r, *p) for p in attention.DECODE],
    "merge": [lambda c, r, n=n: attention.merge(c, r, n) for n in (1, 1024, 32768)],
    "crossovers": [weights.crossovers],
    "models": [lambda c, r, p=p: models.prefill(c, r, *p) for p in models.CASES],
}


def profiled() -> dict[str, tuple[str, Callable[[], Callable]]]:
    """For Nsight Compute: a part of the kernel's name, and what makes a call that launches it."""

    def sparse(block: int) -> Callable:
        q = torch.randn(1, attention.HEADS, 8192, 128, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.randn(1, attention.KV_HEADS, 8192, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        index, _ = attention.causal_index(8192, 0.25, block)
        return lambda: headstart.sparse_attention(q, k, v, index)

    def int4(rows: int) -> Callable:
        w, x = weights.int4_weight(8192, 8192)[0], torch.randn(rows, 8192, dtype=torch.bfloat16, device="cuda")
        return lambda: headstart.int4_gemm(x, w)

    def decompress() -> Callable:
        w, out = weights.bitmap_weight(8192, 8192, 0.5, "same"), torch.empty(8192, 8192).bfloat16().cuda()
        return lambda: w.decompress(out=out)

    return {
        "sparse-64": ("sparse_attention_group_kernel", lambda: sparse(64)),
        "sparse-128": ("sparse_attention_group_kernel", lambda: sparse(128)),
        "int4-1": ("int4_gemv_kernel", lambda: int4(1)),
        "int4-256": ("int4_gemm_group_kernel", lambda: int4(256)),
        "decompress": ("bitmap_decompress_kernel", decompress),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="families to run")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="no new case begins after so many (default: %(default)s)"
    )
    parser.add_argument("--profile", help="launch one kernel for Nsight Compute; `list` prints the names")
    options = parser.parse_args(arguments)
    if options.profile == "list":
        print("\n".join(f"{name} {kernel}" for name, (kernel, _) in profiled().items()))
        return 0
    missing = _library.missing_gpu_kernels()
    if missing is not None:
        print(f"headstart: the CUDA kernels cannot run here. Cause: {missing[0]}. Cure: {missing[1]}.", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    if options.profile:
        call = profiled()[options.profile][1]()
        for _ in range(4):
            call()
        torch.cuda.synchronize()
        return 0

    clock, here = Clock(time.monotonic() + options.seconds), environment()
    print("  ".join(f"{key} {value}" for key, value in here.items()), flush=True)
    limits = rooflines(clock)
    print("  ".join(f"{key} {value:.4g}" for key, value in limits.items()), flush=True)
    results, left_out = Results(Results.path_of(here["gpu"]), limits, here), []
    for family in options.only:
        results.begin(family)
        for i, step in enumerate(FAMILIES[family]):
            if clock.left() <= 0:
                left_out.append(f"{family} (from case {i + 1} on)")
                break
            step(clock, results)
            torch.cuda.empty_cache()
        else:
            results.end()
    done = f"not measured for want of time: {', '.join(left_out)}" if left_out else "all cases measured"
    print(f"{done}; written to {results.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

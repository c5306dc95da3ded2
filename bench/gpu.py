"""The GPU kernels against dense attention and against the machine's own limits: ``python bench/gpu.py``.

Sparse attention at 8K, 32K and 128K tokens, 32 query and 8 KV heads of 128 and 64 dims, bfloat16, causal, with every
block listed and at densities 0.25, 0.1 and 0.05; the baseline is torch's scaled_dot_product_attention, each of its
flash and cuDNN backends. `merge_attention` against the copy bandwidth. `centroid_lookup` over contexts of 32K and 128K
keys, a twentieth as many clusters, a decode step and 2,048 queries, with and without parents, against plain torch.
`int4_gemm` with groups of 128, one row to 4,096, against a bfloat16 linear layer and torch's own int4 operator.
`bitmap_decompress` at 50 % against the copy bandwidth, by the bytes it moves, and `bitmap_gemm` of 1 to 256 rows
against a bfloat16 linear layer, with bfloat16, int8 and int4 values.

How: CUDA events, medians; baseline and kernel take turns within one run; L2 is flushed before each call; the numbers
are checked against dense attention (all blocks) or against float32 attention over the listed keys (some query rows).
Rooflines are measured in the same run: a large bfloat16 matmul, and a copy. Writes bench/results/<gpu>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
HEADS, KV_HEADS, BLOCK = 32, 8, 64
LENGTHS = (8192, 32768, 131072)
OPERATORS = (
    "sparse_attention", "merge_attention", "centroid_lookup", "int4_gemm", "bitmap_decompress", "bitmap_gemm",
)  # fmt: skip
# Output columns, K, rows of x: one layer larger than any L2, and the layers of Llama 3 8B.
INT4_CASES = (
    (8192, 8192, (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)),
    (28672, 4096, (1, 16, 64, 256)),
    (4096, 14336, (1, 16, 64, 256)),
    (6144, 4096, (1, 16, 64, 256)),
)
# Output columns, K, density, the kinds of values.
BITMAP_CASES = (
    (8192, 8192, 0.5, ("same", "int8", "int4")),
    (28672, 4096, 0.5, ("same",)),
    (4096, 14336, 0.5, ("same",)),
    (8192, 8192, 0.3, ("same",)),
)
BITMAP_ROWS = (1, 2, 8, 16, 32, 64, 96, 128, 256)
DENSITIES = (1.0, 0.25, 0.1, 0.05)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def environment() -> dict:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "driver": first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": first_line(["git", "rev-parse", "HEAD"]),
        "uncommitted": bool(first_line(["git", "status", "--porcelain"])),
    }


class Clock:
    """Times callables in turn, L2-cold, until each has its repeats or the time is up."""

    def __init__(self, deadline: float):
        self.deadline = deadline
        size = max(2 * getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0), 2**27)
        self.flush = torch.empty(size, dtype=torch.int8, device="cuda")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def medians(self, calls: dict[str, Callable], seconds: float = 2.0, repeats: int = 20) -> dict[str, float]:
        """Milliseconds by name; at least three rounds of all, whatever they take."""
        for call in calls.values():
            call()
        torch.cuda.synchronize()
        times = {name: [] for name in calls}
        stop = time.monotonic() + min(seconds, max(self.left(), 0))
        for done in range(repeats):
            if done >= 3 and time.monotonic() > stop:
                break
            for name, call in calls.items():
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                # The flush also keeps the GPU busy while the host prepares the launch, so no event waits for Python.
                self.flush.zero_()
                torch.cuda._sleep(1_000_000)
                begin.record()
                call()
                end.record()
                torch.cuda.synchronize()
                times[name].append(begin.elapsed_time(end))
        return {name: statistics.median(t) for name, t in times.items()}


def rooflines(clock: Clock) -> dict[str, float]:
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    ms = clock.medians({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return {
        "bf16_matmul_tflops": 2 * 8192**3 / ms["matmul"] / 1e9,
        "copy_gbps": 2 * source.nbytes / ms["copy"] / 1e6,
    }


def causal_index(n: int, density: float):
    """An index of random blocks, the first and the diagonal among them, with this share of the causal pairs."""
    from headstart import BlockIndex
    from headstart.reference import sparse_attention as reference

    blocks = n // BLOCK
    rows = torch.arange(blocks, device="cuda")
    causal = rows[None, :] <= rows[:, None]
    if density >= 1:
        selected = causal.expand(1, 1, -1, -1)
    else:
        scores = torch.rand(1, HEADS, blocks, blocks, device="cuda").masked_fill_(~causal, -1)
        scores[..., 0] = 2
        scores.diagonal(dim1=-2, dim2=-1).fill_(2)
        wanted = (density * (rows + 1)).ceil().long().clamp(min=1)
        ordered = scores.sort(-1, descending=True).values
        limit = ordered.gather(-1, (wanted - 1).expand(1, HEADS, -1).unsqueeze(-1))
        selected = causal & (scores >= limit)
    count, ids = reference.compact(selected)
    return BlockIndex(count, ids[..., : int(count.max())].contiguous(), block_q=BLOCK, block_k=BLOCK), count


def largest_error(q, k, v, index, out) -> float:
    """Over a few query blocks of a few heads, against float32 attention over the listed keys."""
    worst = 0.0
    n = q.shape[2]
    for head in (0, HEADS - 1):
        listed = head * index.block_count.shape[1] // HEADS
        for row in {0, n // BLOCK // 2, n // BLOCK - 1}:
            ids = index.block_index[0, listed, row, : int(index.block_count[0, listed, row])].long()
            keys = (ids[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten()
            queries = row * BLOCK + torch.arange(BLOCK, device="cuda")
            kv_head = head * KV_HEADS // HEADS
            scores = q[0, head, queries].float() @ k[0, kv_head, keys].float().T / math.sqrt(q.shape[-1])
            scores.masked_fill_(keys[None, :] > queries[:, None], -math.inf)
            exact = scores.softmax(-1) @ v[0, kv_head, keys].float()
            worst = max(worst, float((out[0, head, queries].float() - exact).abs().max()))
    return worst


def dense_calls(q, k, v) -> dict[str, Callable]:
    calls = {}
    for name, backend in BACKENDS.items():

        def call(backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        try:
            call()
        except RuntimeError:
            continue  # this build or GPU does not have that backend
        calls[name] = call
    return calls


def attention(clock: Clock, limits: dict, n: int, d: int) -> list[dict]:
    import headstart

    q = torch.randn(1, HEADS, n, d, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(1, KV_HEADS, n, d, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    dense = dense_calls(q, k, v)
    results = []
    for density in DENSITIES:
        if clock.left() < 10:
            break
        index, count = causal_index(n, density)
        out, _ = headstart.sparse_attention(q, k, v, index)
        error = largest_error(q, k, v, index, out)
        if not error < 0.03:
            raise SystemExit(f"bench/gpu.py: wrong result at n {n}, D {d}, density {density}: error {error:.3g}")
        # Pairs as the definition counts them: half of each diagonal block, every other listed block whole.
        rows = n // BLOCK
        listed = int(count.sum()) * (HEADS // count.shape[1])
        pairs = (listed - HEADS * rows) * BLOCK**2 + HEADS * rows * BLOCK * (BLOCK + 1) // 2
        dense_pairs = HEADS * n * (n + 1) // 2
        ms = clock.medians({**dense, "headstart": lambda index=index: headstart.sparse_attention(q, k, v, index)})
        tflops = 4 * pairs * d / ms["headstart"] / 1e9
        result = {"op": "sparse_attention", "tokens": n, "head_dim": d, "density": pairs / dense_pairs}
        result |= {"ms": ms["headstart"], "tflops": tflops, "error": error}
        result |= {"of_matmul": tflops / limits["bf16_matmul_tflops"]}
        result |= {f"{name}_ms": ms[name] for name in dense}
        if dense:
            best = min(ms[name] for name in dense)
            result |= {"speedup": best / ms["headstart"], "dense_tflops": 4 * dense_pairs * d / best / 1e9}
        results.append(result)
        baselines = "  ".join(f"{name} {ms[name]:9.3f} ms" for name in dense)
        versus = f"  {result['speedup']:6.2f}x best dense" if dense else ""
        print(
            f"sparse_attention  n {n:6d}  D {d:3d}  density {result['density']:5.3f}  {ms['headstart']:9.3f} ms  "
            f"{tflops:6.1f} TFLOP/s  {100 * result['of_matmul']:5.1f} % of matmul  {baselines}{versus}",
            flush=True,
        )
    return results


def merge(clock: Clock, limits: dict, n: int, d: int) -> dict:
    import headstart
    from headstart.reference import sparse_attention as reference

    out_a, out_b = (torch.randn(1, HEADS, n, d, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    lse_a, lse_b = (torch.randn(1, HEADS, n, device="cuda") for _ in range(2))
    got, _ = headstart.merge_attention(out_a, lse_a, out_b, lse_b)
    want, _ = reference.merge_attention(out_a, lse_a, out_b, lse_b)
    error = float((got.float() - want.float()).abs().max())
    if not error < 0.05:
        raise SystemExit(f"bench/gpu.py: merge_attention is wrong at n {n}, D {d}: error {error:.3g}")
    calls = {
        "torch": lambda: reference.merge_attention(out_a, lse_a, out_b, lse_b),
        "headstart": lambda: headstart.merge_attention(out_a, lse_a, out_b, lse_b),
    }
    ms = clock.medians(calls)
    gbps = (3 * out_a.nbytes + 3 * lse_a.nbytes) / ms["headstart"] / 1e6
    share = gbps / limits["copy_gbps"]
    print(
        f"merge_attention   n {n:6d}  D {d:3d}  {ms['headstart']:9.4f} ms  {gbps:7.1f} GB/s  "
        f"{100 * share:5.1f} % of copy  {ms['torch'] / ms['headstart']:6.2f}x plain torch",
        flush=True,
    )
    result = {"op": "merge_attention", "tokens": n, "head_dim": d, "ms": ms["headstart"], "gbps": gbps}
    return result | {"of_copy": share, "torch_ms": ms["torch"], "error": error}


def lookup(clock: Clock, limits: dict, n: int, nq: int, parents: bool, d: int = 128) -> dict:
    from headstart.reference import centroid_lookup as reference

    def level(count, runs):
        """`count` centroids a head, each of a run of as many of the `runs` below."""
        offsets = torch.arange(count + 1, device="cuda") * runs // count
        centroids = torch.randn(KV_HEADS, count, d, dtype=torch.bfloat16, device="cuda")
        return centroids, offsets.int().expand(KV_HEADS, -1).contiguous()

    clusters = n // 20
    centroids, offsets = level(clusters, n)
    q = torch.randn(1, HEADS, nq, d, dtype=torch.bfloat16, device="cuda")
    given = dict(scale=d**-0.5, block_q=BLOCK, max_columns=n)
    # Logits are normal with deviation 1, so a logit of x scores e^(x - 1/2) / n. A row keeps what one of its 4 or 256
    # query vectors keeps: about a twentieth of the clusters, and of parents a third to a half.
    above, parent_above = (2.25, 1.3) if nq == 1 else (3.5, 2.8)
    threshold, parent_threshold = (torch.tensor([math.exp(x - 0.5) / n], device="cuda") for x in (above, parent_above))
    if parents:
        parent_centroids, parent_offsets = level(n // 100, clusters)
        given |= dict(parent_centroids=parent_centroids, parent_offsets=parent_offsets)
        given |= dict(parent_threshold=parent_threshold)
    args = q, centroids, offsets, threshold
    count, _ = torch.ops.headstart.centroid_lookup(*args, **given)
    want, _ = reference.centroid_lookup(*args, **given)
    error = float((count - want).abs().sum() / want.sum())
    if not error < 0.01:
        raise SystemExit(f"bench/gpu.py: centroid_lookup is wrong at n {n}, nq {nq}: counts differ by {error:.3g}")
    calls = {
        "torch": lambda: reference.centroid_lookup(*args, **given),
        "headstart": lambda: torch.ops.headstart.centroid_lookup(*args, **given),
    }
    ms = clock.medians(calls)
    result = {"op": "centroid_lookup", "tokens": n, "queries": nq, "head_dim": d, "parents": parents}
    result |= {"ms": ms["headstart"], "torch_ms": ms["torch"], "kept": float(want.sum()) / (want.numel() * n)}
    rate = ""
    if not parents:  # with them, what is multiplied depends on the data
        tflops, gbps = 4 * HEADS * nq * clusters * d / ms["headstart"] / 1e9, centroids.nbytes / ms["headstart"] / 1e6
        result |= {"tflops": tflops, "gbps": gbps, "of_matmul": tflops / limits["bf16_matmul_tflops"]}
        rate = f"{tflops:6.1f} TFLOP/s  {gbps:7.1f} GB/s of centroids  "
    levels = "parents" if parents else "flat   "
    print(
        f"centroid_lookup   n {n:6d}  queries {nq:4d}  {levels}  kept {result['kept']:5.3f}  "
        f"{ms['headstart']:9.4f} ms  {rate}{ms['torch'] / ms['headstart']:6.2f}x plain torch",
        flush=True,
    )
    return result


def torch_int4(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int):
    """The same weight for torch's operator: there w = (code - 8) s + z', so z' = (8 - z) s. None where it has none."""
    pairs = torch.stack([scales.mT.float(), ((8 - zeros.float()) * scales.float()).mT], -1).bfloat16().contiguous()
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        torch.ops.aten._weight_int4pack_mm(pairs.new_zeros(1, codes.shape[1]), packed, group_size, pairs)
    except RuntimeError:
        return None
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group_size, pairs)


def int4(clock: Clock, limits: dict, n: int, k: int, rows: tuple[int, ...], group_size: int = 128) -> list[dict]:
    import headstart
    from headstart import _library
    from headstart.ops.int4_gemm import Int4Weight
    from headstart.reference import int4_gemm as reference

    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = (0.001 + 0.01 * torch.rand(n, k // group_size, device="cuda")).bfloat16()
    zeros = torch.randint(4, 12, (n, k // group_size), dtype=torch.uint8, device="cuda")
    panels = [reference.to_panels(part) for part in (scales, zeros)]
    w = Int4Weight(torch.ops.headstart.int4_pack(codes), *panels, group_size, (n, k))
    dense, theirs = w.dequantize(torch.bfloat16), torch_int4(codes, scales, zeros, group_size)
    read, results = sum(part.nbytes for part in (w.packed, *panels)), []
    for m in rows:
        if clock.left() < 5:
            break
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        given = (x, w.packed, w.scales, w.zeros)
        calls = {
            "linear": lambda x=x: F.linear(x, dense),
            "triton": lambda given=given: _library.triton_kernels["int4_gemm"](*given, group_size=group_size, n=n),
            "headstart": lambda x=x: headstart.int4_gemm(x, w),
        }
        if theirs is not None:
            calls["torch_int4"] = lambda x=x: theirs(x)
        exact = calls["linear"]().float()
        error = {name: float((call().float() - exact).abs().max() / exact.abs().max()) for name, call in calls.items()}
        if not max(error["headstart"], error["triton"]) < 0.03:
            raise SystemExit(f"bench/gpu.py: int4_gemm is wrong at {m} rows, {n} x {k}: {error}")
        ms = clock.medians(calls)
        gbps, tflops = (read + x.nbytes + 2 * m * n) / ms["headstart"] / 1e6, 2 * m * n * k / ms["headstart"] / 1e9
        result = {"op": "int4_gemm", "rows": m, "columns": n, "k": k, "ms": ms["headstart"], "gbps": gbps}
        result |= {"tflops": tflops, "of_copy": gbps / limits["copy_gbps"], "error": error["headstart"]}
        result |= {"of_matmul": tflops / limits["bf16_matmul_tflops"]} | {f"{name}_ms": ms[name] for name in calls}
        results.append(result)
        versus = "  ".join(f"{ms[name] / ms['headstart']:6.2f}x {name}" for name in calls if name != "headstart")
        print(
            f"int4_gemm         {n:5d} x {k:5d}  rows {m:4d}  {ms['headstart']:9.4f} ms  {gbps:7.1f} GB/s "
            f"{100 * result['of_copy']:5.1f} % of copy  {tflops:6.1f} TFLOP/s  {versus}",
            flush=True,
        )
    return results


def bitmap_weight(n: int, k: int, density: float, values: str, group_size: int = 128):
    """A random weight of this kind, compressed; codes of quantised ones are random too."""
    from headstart.ops.bitmap import BitmapWeight
    from headstart.reference import bitmap as reference

    kept = torch.rand(n, k, device="cuda") < density
    if values == "same":
        w = torch.randn(n, k, dtype=torch.bfloat16, device="cuda").masked_fill_(~kept, 0)
        return BitmapWeight(*torch.ops.headstart.bitmap_compress(w), (n, k))
    most = 127 if values == "int8" else 7
    codes = torch.randint(1, most + 1, (n, k), dtype=torch.int8, device="cuda").masked_fill_(~kept, 0)
    packed, bitmask, offsets = torch.ops.headstart.bitmap_compress(codes)
    packed = reference.pack_signed_nibbles(packed) if values == "int4" else packed
    scales = (0.001 + 0.01 * torch.rand(n, k // group_size, device="cuda")).bfloat16()
    return BitmapWeight(packed, bitmask, offsets, (n, k), scales, group_size)


def bitmap(clock: Clock, limits: dict, n: int, k: int, density: float, values: str) -> list[dict]:
    import headstart
    from headstart import _library
    from headstart.reference import bitmap as reference

    w = bitmap_weight(n, k, density, values)
    tensors, options = (w.values, w.bitmask, w.row_offsets), dict(scales=w.scales, group_size=w.group_size)
    dense, into = (torch.empty(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    reference.decompress(*tensors, **options, out=dense)
    on_triton = {name: _library.triton_kernels[name] for name in ("bitmap_decompress.out", "bitmap_gemm")}
    calls = {
        "triton": lambda: on_triton["bitmap_decompress.out"](*tensors, k, **options, out=into),
        "headstart": lambda: w.decompress(out=into),
    }
    for name, call in calls.items():
        into.fill_(math.nan)
        call()
        if not torch.equal(into, dense):
            raise SystemExit(f"bench/gpu.py: bitmap_decompress ({name}) is wrong at {n} x {k}, {values} values")
    ms = clock.medians(calls)
    kind = {"columns": n, "k": k, "density": density, "values": values}
    gbps = (w.nbytes + dense.nbytes) / ms["headstart"] / 1e6
    result = {"op": "bitmap_decompress", **kind, "ms": ms["headstart"], "gbps": gbps, "triton_ms": ms["triton"]}
    results = [result | {"of_copy": gbps / limits["copy_gbps"]}]
    title = f"{n:5d} x {k:5d}  {values:4s} at {density:.0%}"
    print(
        f"bitmap_decompress {title}  {ms['headstart']:9.4f} ms  {gbps:7.1f} GB/s moved "
        f"{100 * results[0]['of_copy']:5.1f} % of copy  {ms['triton'] / ms['headstart']:6.2f}x triton",
        flush=True,
    )
    for m in BITMAP_ROWS:
        if clock.left() < 5:
            break
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        calls = {
            "linear": lambda x=x: F.linear(x, dense),
            "triton": lambda x=x: on_triton["bitmap_gemm"](x, *tensors, cols=k, **options),
            "headstart": lambda x=x: headstart.bitmap_gemm(x, w),
        }
        exact = calls["linear"]().float()
        error = {name: float((call().float() - exact).abs().max() / exact.abs().max()) for name, call in calls.items()}
        if not max(error["headstart"], error["triton"]) < 0.03:
            raise SystemExit(f"bench/gpu.py: bitmap_gemm is wrong at {m} rows, {n} x {k}, {values} values: {error}")
        ms = clock.medians(calls)
        gbps, tflops = (w.nbytes + x.nbytes + 2 * m * n) / ms["headstart"] / 1e6, 2 * m * n * k / ms["headstart"] / 1e9
        result = {"op": "bitmap_gemm", "rows": m, **kind, "ms": ms["headstart"], "gbps": gbps, "tflops": tflops}
        result |= {"of_copy": gbps / limits["copy_gbps"], "error": error["headstart"]}
        results.append(result | {f"{name}_ms": ms[name] for name in calls})
        versus = "  ".join(f"{ms[name] / ms['headstart']:6.2f}x {name}" for name in calls if name != "headstart")
        print(
            f"bitmap_gemm       {title}  rows {m:4d}  {ms['headstart']:9.4f} ms  {gbps:7.1f} GB/s "
            f"{100 * result['of_copy']:5.1f} % of copy  {versus}",
            flush=True,
        )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=220, help="wall-clock bound; what does not fit is left out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device here", file=sys.stderr)
        return 1
    from headstart import _library

    clock = Clock(time.monotonic() + arguments.seconds)
    torch.manual_seed(0)
    report = {"environment": environment(), "complete": True, "results": []}
    report["kernels"] = {op: _library.has_kernel(op, "CUDA") for op in OPERATORS}
    if not all(report["kernels"].values()):
        print(f"bench/gpu.py: no CUDA kernel for {[op for op, has in report['kernels'].items() if not has]}",
              file=sys.stderr)  # fmt: skip
        return 1
    print("  ".join(f"{key} {value}" for key, value in report["environment"].items()))
    report["rooflines"] = limits = rooflines(clock)
    print(f"bf16 matmul {limits['bf16_matmul_tflops']:.1f} TFLOP/s, copy {limits['copy_gbps']:.0f} GB/s", flush=True)
    report["results"] += [merge(clock, limits, n, 128) for n in (1, 1024, 32768)]
    for n in LENGTHS[1:]:
        report["results"] += [lookup(clock, limits, n, nq, parents) for nq in (1, 2048) for parents in (False, True)]
    for columns, k, rows in INT4_CASES:
        results = int4(clock, limits, columns, k, rows)
        report["complete"] &= len(results) == len(rows)
        report["results"] += results
        torch.cuda.empty_cache()
    for columns, k, density, kinds in BITMAP_CASES:
        for values in kinds:
            results = bitmap(clock, limits, columns, k, density, values)
            report["complete"] &= len(results) == 1 + len(BITMAP_ROWS)
            report["results"] += results
            torch.cuda.empty_cache()
    for n in LENGTHS:
        for d in (128, 64):
            if clock.left() < 15:
                report["complete"] = False
                continue
            results = attention(clock, limits, n, d)
            report["complete"] &= len(results) == len(DENSITIES)
            report["results"] += results
            torch.cuda.empty_cache()
    slug = re.sub(r"[^a-z0-9]+", "-", report["environment"]["gpu"].lower()).strip("-")
    path = ROOT / "bench" / "results" / f"{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".json.new")
    fresh.write_text(json.dumps(report, indent=1) + "\n")
    fresh.replace(path)
    done = "all cases" if report["complete"] else "not all cases fitted in the time"
    print(f"{done}; written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""int4_gemm, bitmap_decompress and bitmap_gemm on a GPU, and from how many rows on a dense weight is faster."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

import headstart
from clock import Clock, Results, expect_right, relative_error
from headstart import _library
from headstart.ops.bitmap import BitmapWeight
from headstart.ops.int4_gemm import Int4Weight
from headstart.reference import bitmap as bitmap_reference
from headstart.reference import int4_gemm as int4_reference

GROUP = 128
# Output columns, K, rows of x: one layer larger than any L2, and the layers of Llama 3 8B.
INT4_CASES = (
    (8192, 8192, (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)),
    (28672, 4096, (1, 16, 64, 256)),
    (4096, 14336, (1, 16, 64, 256)),
    (6144, 4096, (1, 16, 64, 256)),
)
# Output columns, K, density, kind of values.
BITMAP_CASES = (
    (8192, 8192, 0.5, "same"),
    (8192, 8192, 0.5, "int8"),
    (8192, 8192, 0.5, "int4"),
    (28672, 4096, 0.5, "same"),
    (4096, 14336, 0.5, "same"),
    (8192, 8192, 0.3, "same"),
)
BITMAP_ROWS = (1, 2, 8, 16, 32, 64, 96, 128, 256)
SWEPT = ((8192, 8192), (28672, 4096), (4096, 14336))
INT4_SWEEP = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
BITMAP_SWEEP = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
NEVER = 2**40


def int4_weight(n: int, k: int) -> tuple[Int4Weight, torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = (0.001 + 0.01 * torch.rand(n, k // GROUP, device="cuda")).bfloat16()
    zeros = torch.randint(4, 12, (n, k // GROUP), dtype=torch.uint8, device="cuda")
    panels = [int4_reference.to_panels(part) for part in (scales, zeros)]
    return Int4Weight(torch.ops.headstart.int4_pack(codes), *panels, GROUP, (n, k)), codes, scales, zeros


def torch_int4(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Callable | None:
    """The same weight for torch's operator: there w = (code - 8) s + z', so z' = (8 - z) s. None where it has none."""
    pairs = torch.stack([scales.mT.float(), ((8 - zeros.float()) * scales.float()).mT], -1).bfloat16().contiguous()
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        torch.ops.aten._weight_int4pack_mm(pairs.new_zeros(1, codes.shape[1]), packed, GROUP, pairs)
    except RuntimeError:
        return None
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, pairs)


def figures_of(results: Results, read: int, ms: float, m: int, n: int, k: int) -> dict[str, float]:
    gbps, tflops = read / ms / 1e6, 2 * m * n * k / ms / 1e9
    return {
        "gbps": gbps,
        "of_read": gbps / results.limits["read_gbps"],
        "tflops": tflops,
        "of_matmul": tflops / results.limits["bf16_matmul_tflops"],
    }


def int4(clock: Clock, results: Results, n: int, k: int, rows: tuple[int, ...]) -> None:
    w, codes, scales, zeros = int4_weight(n, k)
    sets = [w, *(int4_weight(n, k)[0] for _ in range(clock.copies(w.nbytes) - 1))]
    dense = [each.dequantize(torch.bfloat16) for each in sets[: clock.copies(2 * n * k)]]
    theirs, triton = torch_int4(codes, scales, zeros), _library.triton_kernels["int4_gemm"]
    for m in rows:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")

        def on_triton(w, x=x):
            return triton(x, w.packed, w.scales, w.zeros, group_size=GROUP, n=n)

        case = {"rows": m, "columns": n, "k": k}
        exact = F.linear(x, dense[0])
        error = max(relative_error(headstart.int4_gemm(x, w), exact), relative_error(on_triton(w), exact))
        expect_right("int4_gemm", case, error, 0.03)
        calls = {
            "linear": [lambda x=x, w=w: F.linear(x, w) for w in dense],
            "triton": [lambda run=on_triton, w=w: run(w) for w in sets],
            "headstart": [lambda x=x, w=w: headstart.int4_gemm(x, w) for w in sets],
        }
        ms = clock.rotated(calls)
        if theirs is not None:  # one weight alone, so its caches are flushed
            ms |= clock.cold({"torch_int4": lambda x=x: theirs(x)}, seconds=0.3)
        read = w.nbytes + x.nbytes + 2 * m * n
        results.add("int4_gemm", case, ms, **figures_of(results, read, ms["headstart"], m, n, k), error=error)


def bitmap_weight(n: int, k: int, density: float, values: str) -> BitmapWeight:
    """A random weight of this kind, compressed; codes of quantised ones are random too."""
    kept = torch.rand(n, k, device="cuda") < density
    if values == "same":
        w = torch.randn(n, k, dtype=torch.bfloat16, device="cuda").masked_fill_(~kept, 0)
        return BitmapWeight(*torch.ops.headstart.bitmap_compress(w), (n, k))
    most = 127 if values == "int8" else 7
    codes = torch.randint(1, most + 1, (n, k), dtype=torch.int8, device="cuda").masked_fill_(~kept, 0)
    packed, bitmask, offsets = torch.ops.headstart.bitmap_compress(codes)
    packed = bitmap_reference.pack_signed_nibbles(packed) if values == "int4" else packed
    scales = (0.001 + 0.01 * torch.rand(n, k // GROUP, device="cuda")).bfloat16()
    return BitmapWeight(packed, bitmask, offsets, (n, k), scales, GROUP)


def bitmap(clock: Clock, results: Results, n: int, k: int, density: float, values: str) -> None:
    w = bitmap_weight(n, k, density, values)
    sets = [w, *(bitmap_weight(n, k, density, values) for _ in range(clock.copies(w.nbytes) - 1))]

    def parts(w):
        return (w.values, w.bitmask, w.row_offsets), dict(scales=w.scales, group_size=w.group_size)

    dense = [torch.empty(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(clock.copies(2 * n * k))]
    into = [torch.empty_like(x) for x in dense]
    for each, w_ in zip(dense, sets):
        tensors, options = parts(w_)
        bitmap_reference.decompress(*tensors, **options, out=each)
    on_triton = {name: _library.triton_kernels[name] for name in ("bitmap_decompress.out", "bitmap_gemm")}

    def triton_decompress(w, out):
        tensors, options = parts(w)
        on_triton["bitmap_decompress.out"](*tensors, k, **options, out=out)

    kind = {"columns": n, "k": k, "density": density, "values": values}
    ways = {"triton": triton_decompress, "headstart": lambda w, out: w.decompress(out=out)}
    for run in ways.values():
        into[0].fill_(math.nan)
        run(w, into[0])
        expect_right("bitmap_decompress", kind, 0.0 if torch.equal(into[0], dense[0]) else math.inf, 1)
    pairs = [(sets[i % len(sets)], into[i % len(into)]) for i in range(max(len(sets), len(into)))]
    calls = {name: [lambda run=run, pair=pair: run(*pair) for pair in pairs] for name, run in ways.items()}
    ms = clock.rotated(calls)
    gbps = (w.nbytes + dense[0].nbytes) / ms["headstart"] / 1e6
    results.add("bitmap_decompress", kind, ms, gbps=gbps, of_copy=gbps / results.limits["copy_gbps"])
    for m in BITMAP_ROWS:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")

        def triton_gemm(w, x=x):
            tensors, options = parts(w)
            return on_triton["bitmap_gemm"](x, *tensors, cols=k, **options)

        case, exact = {"rows": m, **kind}, F.linear(x, dense[0])
        error = max(relative_error(headstart.bitmap_gemm(x, w), exact), relative_error(triton_gemm(w), exact))
        expect_right("bitmap_gemm", case, error, 0.03)
        calls = {
            "linear": [lambda x=x, w=w: F.linear(x, w) for w in dense[: len(sets)]],
            "triton": [lambda run=triton_gemm, w=w: run(w) for w in sets],
            "headstart": [lambda x=x, w=w: headstart.bitmap_gemm(x, w) for w in sets],
        }
        ms = clock.rotated(calls)
        read = w.nbytes + x.nbytes + 2 * m * n
        results.add("bitmap_gemm", case, ms, **figures_of(results, read, ms["headstart"], m, n, k), error=error)


def crossover(rows: tuple[int, ...], fused: list[float], dense: list[float]) -> int | None:
    """The fewest of `rows` from which on the dense way is never slower; None if it is slower at the last."""
    faster = [d <= f for f, d in zip(fused, dense)]
    first = next((i for i in range(len(rows)) if all(faster[i:])), None)
    return None if first is None else rows[first]


def crossovers(clock: Clock, results: Results) -> None:
    """Both ways of a GEMM with packed weights, by rows; prints the constants for csrc/torch/cuda.cpp."""
    found: dict[str, list[int | None]] = {"kInt4DenseRows": [], "kBitmapDenseRows": []}
    for n, k in SWEPT:
        int4_w, bitmap_w = int4_weight(n, k)[0], bitmap_weight(n, k, 0.5, "same")
        for name, op, sweep, run in (
            ("kInt4DenseRows", "int4_gemm", INT4_SWEEP, lambda x, w=int4_w: headstart.int4_gemm(x, w)),
            ("kBitmapDenseRows", "bitmap_gemm", BITMAP_SWEEP, lambda x, w=bitmap_w: headstart.bitmap_gemm(x, w)),
        ):
            fused, dense = [], []
            for m in sweep:
                x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")

                def forced(rows, run=run, x=x):
                    _library.set_cuda_dense_rows(rows, rows)
                    return run(x)

                try:
                    ms = clock.cold({"headstart": lambda f=forced: f(NEVER), "dense": lambda f=forced: f(1)}, 0.4)
                finally:
                    _library.set_cuda_dense_rows()
                results.add(op, {"rows": m, "columns": n, "k": k, "way": "fused against dense"}, ms)
                fused.append(ms["headstart"])
                dense.append(ms["dense"])
            found[name].append(crossover(sweep, fused, dense))
    for name, rows in found.items():
        # A layer that never crosses over counts as one beyond the sweep.
        ordered = sorted(math.inf if r is None else r for r in rows)
        middle = ordered[len(ordered) // 2]
        words = "no crossover within the sweep" if middle == math.inf else f"{middle:.0f}"
        print(f"csrc/torch/cuda.cpp: {name} = {words} (by layer: {rows})", flush=True)
    results.note(crossovers=found)

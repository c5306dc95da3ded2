"""Every operator of the CUDA library once, on small inputs: ``PYTHONPATH=tests python tests/gpu_smoke.py [NAME ...]``.

`make gpu-smoke` runs it by itself and under each tool of compute-sanitizer, where every launch takes a thousand times
as long. So inputs are made and results are judged on the CPU, and the GPU runs little but the kernels themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from backends import cuda_ops
from headstart import _library
from judges import bitmap, centroid_lookup, int4_gemm, prefill_index, sparse_attention
from shapes import Shape

INT4_ROWS = (1, 12, 40, 200)  # one for each of the kernels that int4_gemm chooses from by the number of rows
INDEX = Shape(1, 4, 2, 300, 333, 64)


def check_sparse_attention(ops) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        return
    for dim, dtype in ((64, torch.float16), (128, torch.bfloat16)):
        for block in (64, 128):
            shape = Shape(1, 4, 2, 300, 333, dim, 4, block_q=block)
            sparse_attention.check_case(ops._sparse_attention_sm90, shape, dtype)


def check_merge(ops) -> None:
    out, lse = torch.randn(1, 2, 70, 64).bfloat16(), torch.randn(1, 2, 70)
    sparse_attention.check_merge(ops.merge_attention, out, lse, 2 * out, lse + 1)


def check_adaptive(ops) -> None:
    q, k = prefill_index.inputs(INDEX)
    prefill_index.check_adaptive(ops, INDEX, 4 * q, k)
    prefill_index.check_adaptive(ops, INDEX, 4 * q, k, stride=16, samples=4)


def check_centroid_lookup(ops) -> None:
    for queries, parents in ((1, 0), (1, 12), (70, 0), (70, 12)):
        case = centroid_lookup.Case(1, 2, queries, 150, 64, torch.bfloat16, parents=parents)
        centroid_lookup.check_case(ops.centroid_lookup, case)


def check_int4_gemm(ops) -> None:
    for dtype in int4_gemm.DTYPES:
        for rows in INT4_ROWS:
            int4_gemm.check_case(ops.int4_gemm, rows, 300, 520, 64, dtype)


def check_bitmap_decompress(ops) -> None:
    bitmap.check_bits(ops.bitmap_decompress_out, 37, 577, 0.5, torch.bfloat16)
    for values in ("int8", "int4"):
        bitmap.check_scaled(ops.bitmap_decompress_out, 37, 577, 0.5, torch.bfloat16, values, 128)


def check_fresh_bitmap_decompress(ops) -> None:
    w = bitmap.random_weight(37, 577, 0.5, torch.bfloat16)
    got = ops.bitmap_decompress(w.values, w.bitmask, w.row_offsets, 577)
    assert bitmap.same_bits(got, bitmap.truth(w, torch.bfloat16))


def check_bitmap_gemm(ops) -> None:
    for values in ("same", "int8", "int4"):
        for rows in (1, 8, 32, 150):
            bitmap.check_case(ops.bitmap_gemm, rows, 300, 520, torch.bfloat16, values, 128)


CASES: dict[str, Callable] = {
    "_sparse_attention_sm90": check_sparse_attention,
    "merge_attention": check_merge,
    "vertical_slash_index": lambda ops: prefill_index.check_vertical_slash(ops, INDEX, *prefill_index.inputs(INDEX)),
    "block_topk_index": lambda ops: prefill_index.check_topk(ops, INDEX, *prefill_index.inputs(INDEX)),
    "adaptive_block_index": check_adaptive,
    "centroid_lookup": check_centroid_lookup,
    "int4_gemm": check_int4_gemm,
    "bitmap_decompress": check_fresh_bitmap_decompress,
    "bitmap_decompress.out": check_bitmap_decompress,
    "bitmap_gemm": check_bitmap_gemm,
}


def main(names: list[str]) -> int:
    missing = _library.missing_gpu_kernels()
    if missing is not None:
        print(f"headstart: the CUDA kernels cannot run here. Cause: {missing[0]}. Cure: {missing[1]}.", file=sys.stderr)
        return 1
    for name in names or CASES:
        torch.manual_seed(0)
        start = time.monotonic()
        CASES[name](cuda_ops(name))
        torch.cuda.synchronize()
        print(f"{name:<22} right, from _cuda.so, in {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Every operator of the CUDA library once, on small inputs: ``PYTHONPATH=tests python tests/gpu/smoke.py [NAME ...]``.

`make gpu-smoke` runs it by itself and under each tool of compute-sanitizer, where every launch takes a thousand times
as long. So inputs are made and results are judged on the CPU, and the GPU runs little but the kernels themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

import bitmap_judge
import centroid_judge
import headstart
import int4_judge
from headstart import _library
from headstart.reference import sparse_attention as reference
from on_a_gpu import cuda_kernel, on_the_gpu
from tolerances import assert_close

INT4_ROWS = (1, 12, 40, 200)  # one for each of the kernels that int4_gemm chooses from by the number of rows


def merge_attention() -> None:
    parts = [torch.randn(1, 2, 70, 64).bfloat16(), torch.randn(1, 2, 70)] * 2
    out, lse = cuda_kernel("merge_attention")(*(x.cuda() for x in parts))
    exact, exact_lse = reference.merge_attention(*(x.double() for x in parts))
    plain, plain_lse = reference.merge_attention(*parts)
    assert_close(out.cpu(), exact, plain, "out")
    assert_close(lse.cpu(), exact_lse, plain_lse, "lse")


def index_builder(name: str, build: Callable) -> None:
    cuda_kernel(name)
    q, k = torch.randn(1, 4, 300, 64), torch.randn(1, 2, 333, 64)
    got, want = build(q.cuda(), k.cuda()).to("cpu").to_mask(300, 333), build(q, k).to_mask(300, 333)
    # A near tie between two scores may fall either way.
    share = float((got != want).double().mean())
    assert share < 0.01, f"{share:.1%} of the mask differs from the CPU's"


def adaptive_block_index() -> None:
    index_builder("adaptive_block_index", lambda q, k: headstart.adaptive_block_index(q, k, 0.9, stride=8))
    index_builder("adaptive_block_index", lambda q, k: headstart.adaptive_block_index(q, k, 0.9, stride=16, samples=4))


def centroid_lookup() -> None:
    operator = cuda_kernel("centroid_lookup")

    def run(*args, **options):
        options = {name: on_the_gpu(x) for name, x in options.items()}
        return [x.cpu() for x in operator(*(on_the_gpu(x) for x in args), **options)]

    centroid_judge.OP = centroid_judge.cleaned(run)
    for queries, parents in ((1, None), (1, 12), (70, None), (70, 12)):
        centroid_judge.check_case(centroid_judge.Case(1, 2, queries, 150, 64, torch.bfloat16, parents=parents))


def int4_gemm() -> None:
    operator = cuda_kernel("int4_gemm")
    int4_judge.OP = lambda *args, **options: operator(*(on_the_gpu(x) for x in args), **options).cpu()
    for dtype in int4_judge.DTYPES:
        for rows in INT4_ROWS:
            int4_judge.check_case(rows, 300, 520, 64, dtype)


def bitmap_decompress() -> None:
    out_operator, operator = cuda_kernel("bitmap_decompress.out"), cuda_kernel("bitmap_decompress")

    def run(*args, out, **options) -> None:
        options = {name: on_the_gpu(x) for name, x in options.items()}
        given = [on_the_gpu(x) for x in args]
        moved = on_the_gpu(out)
        out_operator(*given, out=moved, **options)
        fresh = operator(*given, **options)
        assert torch.equal(bitmap_judge.bits(fresh), bitmap_judge.bits(moved)), "with out= it gives something else"
        out.copy_(moved)

    bitmap_judge.DECOMPRESS = run
    bitmap_judge.check_bits(37, 577, 0.5, torch.bfloat16)
    for values in ("int8", "int4"):
        bitmap_judge.check_scaled(37, 577, 0.5, torch.bfloat16, values, 128)


def bitmap_gemm() -> None:
    operator = cuda_kernel("bitmap_gemm")

    def run(*args, **options):
        options = {name: on_the_gpu(x) for name, x in options.items()}
        return operator(*(on_the_gpu(x) for x in args), **options).cpu()

    bitmap_judge.GEMM = run
    for values in ("same", "int8", "int4"):
        for rows in (1, 8, 32, 150):
            bitmap_judge.check_case(rows, 300, 520, torch.bfloat16, values, 128)


CASES: dict[str, Callable[[], None]] = {
    "merge_attention": merge_attention,
    "vertical_slash_index": lambda: index_builder(
        "vertical_slash_index", lambda q, k: headstart.vertical_slash_index(q, k, 60, 256)
    ),
    "block_topk_index": lambda: index_builder("block_topk_index", lambda q, k: headstart.block_topk_index(q, k, 3)),
    "adaptive_block_index": adaptive_block_index,
    "centroid_lookup": centroid_lookup,
    "int4_gemm": int4_gemm,
    "bitmap_decompress": bitmap_decompress,
    "bitmap_gemm": bitmap_gemm,
}


def main(names: list[str]) -> int:
    missing = _library.missing_gpu_kernels()
    if missing is not None:
        print(f"headstart: the CUDA kernels cannot run here. Cause: {missing[0]}. Cure: {missing[1]}.", file=sys.stderr)
        return 1
    for name in names or CASES:
        torch.manual_seed(0)
        start = time.monotonic()
        CASES[name]()
        torch.cuda.synchronize()
        print(f"{name:<22} right, from _cuda.so, in {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

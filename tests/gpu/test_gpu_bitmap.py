"""Bitmap weights on a GPU: the CUDA kernels and Triton's, by the judge of the CPU."""

from __future__ import annotations

import pytest
import torch

import bitmap_judge
import headstart
from headstart import _library
from on_a_gpu import DTYPES, cuda_kernel, expect_no_wait, expect_same_when_replayed, on_the_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def bitmap(request, monkeypatch):
    """The operators of the bitmap judge, from the CUDA library and on Triton: (decompress, with out=, and gemm)."""
    chosen = {"cuda": cuda_kernel, "triton": _library.triton_kernels.get}[request.param]
    run = chosen("bitmap_decompress.out"), chosen("bitmap_gemm")

    def decompress(*args, out, **options):
        moved = on_the_gpu(out)
        options = {name: on_the_gpu(x) for name, x in options.items()}
        run[0](*(on_the_gpu(x) for x in args), out=moved, **options)
        # All of what surrounds the output, so that the judge sees what was written there.
        whole = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
        whole.copy_(torch.empty(0, dtype=out.dtype, device="cuda").set_(moved.untyped_storage()))

    def gemm(*args, **options):
        options = {name: on_the_gpu(x) for name, x in options.items()}
        return run[1](*(on_the_gpu(x) for x in args), **options).cpu()

    monkeypatch.setattr(bitmap_judge, "DECOMPRESS", decompress)
    monkeypatch.setattr(bitmap_judge, "GEMM", gemm)
    return run


BITMAP_SHAPES = [(1, 1), (3, 7), (17, 1024), (5, 577), (33, 96), (290, 64), (300, 5000), (4, 20000), (40000, 40)]


@bitmap_judge.by_value_dtype
@pytest.mark.parametrize("n, k", BITMAP_SHAPES)
def test_bitmap_decompress(bitmap, n, k, dtype):
    bitmap_judge.check_bits(n, k, (0.1, 0.5, 0.9)[n % 3], dtype, offset=n % 4, stride=k + 5 if n % 2 else None)


@bitmap_judge.by_dtype
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("n, k", BITMAP_SHAPES[1:-1])
def test_bitmap_decompress_scales(bitmap, n, k, values, dtype):
    for group_size in (128, -1, (13, 8, 200)[n % 3]):
        bitmap_judge.check_scaled(n, k, 0.5, dtype, values, group_size, offset=n % 4)


@bitmap_judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_bitmap_rows_anywhere_and_damage(bitmap, values, dtype):
    bitmap_judge.check_slice(dtype, values)
    bitmap_judge.check_damaged(dtype, values)


@bitmap_judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 32, 33, 64, 150])
@pytest.mark.parametrize("n, k", [(1024, 4096), (17, 33), (1000, 5000), (130, 1000), (64, 1)])
def test_bitmap_gemm(bitmap, n, k, m, values, dtype):
    if bitmap[1] is _library.triton_kernels["bitmap_gemm"] and m not in (1, 16, 64, 150):
        pytest.skip("each number of rows compiles a kernel")
    scales = dtype if values == "same" or dtype == torch.float16 else DTYPES[n % 3]
    group_size, density = (128, -1, 40)[n % 3], (0.2, 0.5, 0.8)[m % 3]
    bitmap_judge.check_case(m, n, k, dtype, values, group_size, density, scales, bias=n % 2 == 0)


@bitmap_judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_bitmap_gemm_reads_every_weight(bitmap, values, dtype):
    bitmap_judge.check_every_weight(dtype, 35, 300, (1, 8, 32, 75), values)
    bitmap_judge.check_every_weight(dtype, 700, 2000, (8, 64, 1000), values)


@bitmap_judge.by_dtype
def test_bitmap_gemm_on_odd_input(bitmap, dtype):
    for m in (1, 3, 20):
        bitmap_judge.check_what_is_not_finite(dtype, m)
    bitmap_judge.check_strides(dtype)


def bitmap_weight(n, k, values="same", dtype=torch.bfloat16):
    w = bitmap_judge.random_weight(n, k, 0.5, dtype, values, 128)
    return w, w.to("cuda")


@pytest.mark.parametrize("m", [1, 12, 60, 500])
def test_bitmap_in_a_cuda_graph(bitmap, m):
    _, w = bitmap_weight(1000, 2048)
    x = torch.randn(m, 2048, dtype=torch.bfloat16, device="cuda")
    given = (w.values, w.bitmask, w.row_offsets)
    dense = torch.empty(1000, 2048, dtype=torch.bfloat16, device="cuda")

    def step():
        bitmap[0](*given, 2048, out=dense)
        return bitmap[1](x * 1.0, *given, cols=2048), dense + 0.0

    def change():
        x.normal_()
        w.values.normal_()

    expect_no_wait(step)
    expect_same_when_replayed(step, change)


def test_bitmap_gemm_compiles_whole():
    _, w = bitmap_weight(300, 512, "int8")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: headstart.bitmap_gemm(x * 1.0, w), fullgraph=True, dynamic=True)
    for m in (2, 30, 700):
        x = torch.randn(m, 512, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(x), headstart.bitmap_gemm(x, w))


def test_bitmap_compress_on_the_gpu():
    w = bitmap_judge.random_bits(83, 135, 0.5, torch.bfloat16)
    got = torch.ops.headstart.bitmap_compress(w.cuda())
    for a, b in zip(got, bitmap_judge.reference.compress(w)):
        a, b = (bitmap_judge.bits(x) if x.is_floating_point() else x for x in (a.cpu(), b))
        assert torch.equal(a, b)


def test_bitmap_past_two_to_the_31(bitmap):
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    # Full rows, so that the values, too, are more than 2^31; rows repeat every 61, which no power of two does.
    n, k = 2**15 + 16, 2**16
    few = torch.randint(1, 256, (61, k), dtype=torch.uint8, device="cuda").view(torch.int8)
    values = few.repeat(-(-n // 61), 1)[:n].flatten()
    bitmask = torch.full((n, k // 8), 255, dtype=torch.uint8, device="cuda")
    offsets = torch.arange(n + 1, device="cuda") * k
    out = torch.zeros(n, k, dtype=torch.int8, device="cuda")
    bitmap[0](values, bitmask, offsets, k, out=out)
    assert torch.equal(out.flatten(), values)
    del out
    scales = torch.ones(n, 1, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(1, k, dtype=torch.bfloat16, device="cuda")
    x[0, -1] = 1
    got = bitmap[1](x, values, bitmask, offsets, cols=k, scales=scales)
    assert torch.equal(got[0], values.view(n, k)[:, -1].bfloat16())

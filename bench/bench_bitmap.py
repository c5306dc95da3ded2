"""Bitmap weights: decompression beside a copy, compression, and products beside a bf16 linear layer."""

FAMILIES = ("bitmap", "bitmap_gemm")


def test_bitmap(benchmark, family_work):
    result = benchmark(family_work.call)
    assert family_work.check is None or family_work.check(result) <= family_work.error_bar

"""The Triton kernels of the bitmap operators, without a GPU: their results through the interpreter, held to
`bitmap_judge.py`, and their machine code for sm_80 and sm_90.
"""

from __future__ import annotations

import pytest
import torch

import bitmap_judge as judge
from headstart import _library
from triton_testing import SHARED_MEMORY, compile_launch, compiled, interpreted, resources, run_in_the_interpreter

pytest.importorskip("triton", reason="triton is not installed")


@compiled
@pytest.mark.slow
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture(params=["one program a row", "segments and parts"])
def kernels(request, interpreter, poisoned, monkeypatch):
    """The judge's operators are Triton's, interpreted."""
    from headstart.triton import bitmap

    def decompress(*args, out, **options):
        _library.triton_kernels["bitmap_decompress.out"](*args, out=out, **options)

    monkeypatch.setattr(judge, "DECOMPRESS", decompress)
    monkeypatch.setattr(judge, "GEMM", _library.triton_kernels["bitmap_gemm"])
    split = "segments" in request.param
    monkeypatch.setattr(bitmap, "SEGMENT", 512 if split else 2**20)
    monkeypatch.setattr(bitmap, "PART", 128 if split else 2**20)
    return bitmap


@interpreted
@judge.by_value_dtype
def test_decompress_moves_bits(kernels, dtype):
    for n, k in ((1, 1), (17, 1024), (5, 577)):
        judge.check_bits(n, k, (0.1, 0.5, 0.9)[n % 3], dtype, offset=n % 4, stride=k + 5 if n % 2 else None)
        w = judge.random_bits(n, k, 0.5, dtype)
        c = judge.BitmapWeight(*judge.reference.compress(w), (n, k))
        got = _library.triton_kernels["bitmap_decompress"](c.values, c.bitmask, c.row_offsets, k)
        assert torch.equal(judge.bits(got), judge.bits(w))


@interpreted
@judge.by_dtype
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_decompress_scales(kernels, values, dtype):
    for n, k in ((3, 7), (17, 700)):
        for group_size in (32, -1, (13, 8, 200)[n % 3]):
            judge.check_scaled(n, k, 0.5, dtype, values, group_size, offset=n % 4)


@interpreted
def test_decompress_past_two_to_the_31(kernels):
    judge.check_far()


@interpreted
@judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_decompress_rows_anywhere_and_damage(kernels, values, dtype):
    judge.check_slice(dtype, values)
    judge.check_damaged(dtype, values)


CASES = ((1, 40, 288), (1, 17, 33), (9, 33, 300), (17, 70, 130), (40, 100, 90), (99, 20, 70), (2, 16, 1))


@interpreted
@judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
@pytest.mark.parametrize("m, n, k", CASES)
def test_gemm_against_float64(kernels, m, n, k, values, dtype):
    scales = judge.DTYPES[(m + n) % 3]
    scales = dtype if values == "same" or dtype == torch.float16 else scales
    judge.check_case(m, n, k, dtype, values, (32, -1, 13)[n % 3], (0.2, 0.5, 0.8)[m % 3], scales, bias=k % 2 == 0)


@interpreted
@judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_gemm_reads_every_weight(kernels, values, dtype):
    judge.check_every_weight(dtype, 20, 150, (75,), values)


@interpreted
@judge.by_dtype
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_gemm_on_odd_input(kernels, dtype):
    for m in (1, 20):
        judge.check_what_is_not_finite(dtype, m)
    judge.check_strides(dtype)


# --- machine code ----------------------------------------------------------------------------------------------------

KINDS = {
    "raw": (None, None), "int8": (torch.int8, None), "int4": (torch.uint8, None),
    "int8, fp32 scales": (torch.int8, torch.float32),
}  # fmt: skip


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [0, 1, 32, 64], ids=lambda m: f"{m} rows" if m else "decompress")
def test_kernels_compile(m, kind, dtype, capability, monkeypatch, tmp_path, record_property, capsys):
    from headstart.triton import bitmap as module

    quantised, scale_dtype = KINDS[kind]
    if dtype == torch.int8 and (m or quantised) or (dtype != torch.bfloat16 and (quantised and m > 1 or scale_dtype)):
        pytest.skip("no such kernel, or as for another dtype")
    n, k = 4096, 4096
    values = torch.empty(2**20, dtype=quantised or dtype)
    bitmask, offsets = torch.empty(n, k // 8, dtype=torch.uint8), torch.empty(n + 1, dtype=torch.int64)
    scales = torch.empty(n, k // 128, dtype=scale_dtype or dtype) if quantised else None
    options = dict(scales=scales, group_size=128 if quantised else -1)

    def call():
        if m == 0:
            _library.triton_kernels["bitmap_decompress"](values, bitmask, offsets, k, **options)
        else:
            x = torch.empty(m, k, dtype=dtype)
            _library.triton_kernels["bitmap_gemm"](x, values, bitmask, offsets, x.new_empty(n), cols=k, **options)

    name = "bitmap_gemm_kernel" if m else "bitmap_decompress_kernel"
    binary = compile_launch([module], monkeypatch, name, capability, call)
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    ptx = binary.asm["ptx"]
    if m and dtype != torch.float32:
        assert "mma.sync" in ptx or "wgmma.mma_async" in ptx, "no tensor cores in it"
    if m == 0:
        assert "st.global.v4.b32" in ptx or dtype == torch.int8, "no 16-byte stores"
    assert "atom" not in ptx
    used = resources(binary, tmp_path)
    if used is not None:
        record_property("resources", str(used))
        with capsys.disabled():
            print(f"\nsm_{capability} {name} m={m} {kind} {dtype}: {used}", end=" ")
        assert used["stack"] == 0, f"spills: {used}"

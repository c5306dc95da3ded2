"""int4_gemm: the packed layout, the product wherever it runs, and the contract."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import headstart
from backends import STEMS, expect_no_wait, expect_same_when_replayed, gpu_kernel, interpreted, places
from headstart.ops.int4_gemm import Int4Weight, int4_gemm
from headstart.reference import int4_gemm as reference
from judges import int4_gemm as judge
from judges.int4_gemm import DTYPES, by_dtype, exact, random_weight

STEM = STEMS["int4_gemm"]
ROOT = Path(__file__).parent.parent
hs = torch.ops.headstart


# --- the packed layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 32), (17, 33), (70, 140), (15, 31), (48, 100), (33, 64), (2, 97)])
@pytest.mark.parametrize("seed", range(3))
def test_pack_is_the_documented_layout(n, k, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (n, k), dtype=np.uint8))
    packed = hs.int4_pack(codes)
    assert packed.shape == (-(-n // 16), -(-k // 32), 4, 16) and packed.dtype == torch.int32
    assert torch.equal(hs.int4_unpack(packed, n, k), codes)
    flat = packed.numpy().view(np.uint32)
    for row, column in np.random.default_rng(seed).integers(0, (n, k), (20, 2)):
        slab, inside = divmod(column, 32)
        word = flat[row // 16, slab, inside % 8 // 2, row % 16]
        pair = (word >> np.uint32(4 * (inside // 8))) & np.uint32(0x000F000F)
        assert (pair >> np.uint32(16 * (inside % 2))) & 15 == codes[row, column]
    whole = hs.int4_unpack(packed, packed.shape[0] * 16, packed.shape[1] * 32)
    assert not whole[n:].any() and not whole[:, k:].any()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_layout_header_agrees(tmp_path):
    n, k = 21, 70
    source = tmp_path / "layout.cpp"
    source.write_text(f"""
        #include <cstdio>
        #include "layouts/int4.h"
        int main() {{
          for (int n = 0; n < {n}; ++n)
            for (int k = 0; k < {k}; ++k) {{
              constexpr auto check = headstart::int4::place(1, 3, 64);
              static_assert(check.word == 17 && check.shift == 16);
              const auto p = headstart::int4::place(n, k, {k});
              std::printf("%lld %d\\n", (long long)p.word, p.shift);
            }}
          std::printf("%lld\\n", (long long)headstart::int4::scale_index(20, 2, 3));
        }}""")
    program = tmp_path / "layout"
    subprocess.run(["g++", "-std=c++17", "-I", ROOT / "csrc", source, "-o", program], check=True)
    *places, scale_index = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    places = np.array([line.split() for line in places], dtype=np.int64)
    codes, scales, _, weight = random_weight(n, k)
    flat = weight.packed.numpy().view(np.uint32).ravel()
    assert ((flat[places[:, 0]] >> places[:, 1].astype(np.uint32)) & 15).tolist() == codes.flatten().tolist()
    assert weight.scales.flatten()[int(scale_index)] == scales[20, 2]


def test_dequantize_is_the_definition():
    codes, scales, zeros, w = random_weight(33, 70)
    torch.testing.assert_close(w.dequantize(torch.float64), exact(codes, scales, zeros, 32), rtol=1e-6, atol=1e-6)


# --- the product ----------------------------------------------------------------------------------------------------

# (M, N, K, group size): tails of every tile, groups longer than K, K shorter than a group. In the lane model, one tile
# of many rows and one of columns are split into parts; more are not (it has one processor).
CASES = (
    (1, 70, 288, 32), (1, 17, 33, -1), (3, 64, 416, 96), (17, 33, 1000, 128), (33, 100, 130, 64), (70, 200, 160, 32),
    (130, 40, 96, 64), (2, 96, 1, 32), (5, 64, 512, -1),
)  # fmt: skip
MORE_CASES = (
    (1, 40, 288, 32), (8, 17, 33, -1), (9, 33, 1000, 128), (16, 30, 130, 64), (17, 60, 130, 32), (20, 150, 330, -1),
    (33, 100, 700, 128), (40, 200, 290, 64), (70, 300, 160, 32),
)  # fmt: skip


@by_dtype
@pytest.mark.parametrize("m, n, k, group_size", CASES)
def test_against_float64(ops, m, n, k, group_size, dtype):
    judge.check_case(ops.int4_gemm, m, n, k, group_size, dtype, n % 2 == 0, DTYPES[(m + n) % 3], bias=k % 2 == 0)


@places("reference", "cpu", "lanes", "cuda", "triton")
@by_dtype
@pytest.mark.parametrize("m, n, k, group_size", MORE_CASES)
def test_more_against_float64(ops, m, n, k, group_size, dtype):
    judge.check_case(ops.int4_gemm, m, n, k, group_size, dtype, n % 4 == 0, DTYPES[(m + n) % 3], bias=k % 2 == 0)


@places("reference", "cpu", "interpreter", "cuda", "triton")
@by_dtype
@pytest.mark.parametrize("kind", judge.WIDE)
@pytest.mark.parametrize("m, n, k, group_size", [(1, 70, 288, 32), (3, 17, 33, -1), (40, 33, 416, 128)])
def test_eight_bits_and_minimums(ops, m, n, k, group_size, kind, dtype):
    judge.check_wide_case(ops.int4_gemm, kind, m, n, k, group_size, dtype, DTYPES[(m + n) % 3], bias=k % 2 == 0)


@places("cpu")
@by_dtype
@pytest.mark.parametrize("kind", judge.WIDE)
def test_every_size_of_a_tile_in_eight_bits_and_with_minimums(ops, kind, dtype):
    sizes = [(200, 288, 32), (17, 33, 64), (96, 1, 32), (64, 1000, -1)]
    sizes += [(40, 272, 16), (33, 100, 48)] if kind.startswith("8") else []
    for n, k, group_size in sizes:
        for m in (1, 2, 3, 4, 5, 6, 7, 13, 70):
            judge.check_wide_case(ops.int4_gemm, kind, m, n, k, group_size, dtype, bias=m % 2 == 0)


@places("cpu", "reference")
@pytest.mark.parametrize("kind", judge.WIDE)
def test_a_row_does_not_depend_on_others_in_eight_bits_and_with_minimums(ops, kind):
    w, _ = judge.random_wide_weight(kind, 60, 300, 32, torch.float16)
    for dtype in DTYPES:
        x = torch.randn(70, 300).to(dtype)
        for options in ({}, {"int8_activations": True}) if ops.kind == "cpu" else ({},):
            whole = judge.gemm(ops.int4_gemm, x, w, **options)
            for m in (1, 3, 7, 64) if ops.kind == "cpu" else ():
                assert torch.equal(
                    torch.cat([judge.gemm(ops.int4_gemm, part, w, **options) for part in x.split(m)]), whole
                )
            spoiled = x.clone()
            spoiled[4, 17] = torch.inf
            got, keep = judge.gemm(ops.int4_gemm, spoiled, w, **options), torch.arange(70) != 4
            assert not got[4].isfinite().any()
            torch.testing.assert_close(got[keep], whole[keep])


@places("cpu")
@pytest.mark.parametrize("kind", judge.WIDE)
def test_rounded_rows_in_eight_bits_and_with_minimums(ops, kind):
    """Rounding x is all that is lost: against the weight by its definition, in float64."""
    for group_size in (32, 128, -1):
        w, true = judge.random_wide_weight(kind, 60, 600, group_size)
        for m in (1, 2, 5, 12, 40):
            x = torch.randn(m, 600)
            rounded = reference.round_to_int8(x, group_size)
            want = rounded.double() @ true.T
            got = judge.gemm(ops.int4_gemm, x, w, int8_activations=True)
            room = 1e-6 * (rounded.double().abs() @ true.abs().T)
            assert ((got - want).abs() <= room).all()


@places("cpu")
@by_dtype
@pytest.mark.parametrize("n, k", [(200, 288), (1, 32), (17, 33), (96, 1), (64, 1000), (33, 416)])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
def test_every_size_of_a_tile(ops, n, k, group_size, dtype):
    for m in (1, 2, 3, 4, 5, 6, 7, 13, 70):
        judge.check_case(ops.int4_gemm, m, n, k, group_size, dtype, False, torch.bfloat16)
        judge.check_case(ops.int4_gemm, m, n, k, group_size, dtype, True, torch.float16, bias=False)


@places("cuda", "triton")
@by_dtype
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 17, 40, 64, 65, 200])
@pytest.mark.parametrize(
    "n, k, group_size",
    [(1024, 4096, 128), (17, 33, -1), (1000, 5000, 96), (200, 288, 32), (130, 1000, 64), (64, 1, 32), (70, 4100, 64)],
)
def test_large_weights(ops, n, k, group_size, m, dtype):
    if ops.kind == "triton" and (m not in (1, 40, 200) or n not in (1024, 17, 1000)):
        pytest.skip("each compiles a kernel, and the interpreter ran such")
    judge.check_case(ops.int4_gemm, m, n, k, group_size, dtype, n % 8 == 0, DTYPES[n % 3], bias=n % 3 > 0)


@places("cuda", "triton")
@by_dtype
@pytest.mark.parametrize("m", [512, 1500])
@pytest.mark.parametrize("n, k, group_size", [(300, 8192, -1), (4096, 300, 32)])
def test_many_rows(ops, n, k, group_size, m, dtype):
    judge.check_case(ops.int4_gemm, m, n, k, group_size, dtype)


@places("reference", "cpu")
def test_any_shape(ops):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(
        batch=st.lists(st.integers(0, 4), max_size=2),
        n=st.integers(1, 50),
        k=st.integers(1, 300),
        group_size=st.sampled_from([32, 64, 96, 128, -1]),
        symmetric=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**16),
    )
    def run(batch, n, k, group_size, symmetric, dtype, seed):
        torch.manual_seed(seed)
        codes, scales, zeros, w = random_weight(n, k, group_size, symmetric, dtype=torch.float16)
        x, bias = torch.randn(*batch, k).to(dtype), torch.randn(n).to(dtype)
        want = x.double() @ exact(codes, scales, zeros, group_size).T + bias.double()
        out = judge.gemm(ops.int4_gemm, x, w, bias)
        assert out.dtype == dtype and out.shape == (*batch, n)
        # Codes, zero points and an offset of 16 are multiplied apart, and a short sum of them may cancel out. So the
        # room is that of these terms, and not of the result.
        terms = exact(codes + 16, scales, torch.zeros_like(scales), group_size)
        terms += exact(torch.zeros_like(codes), -scales, zeros, group_size)
        room = x.double().abs() @ terms.T + bias.double().abs()
        assert ((out.double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 2e-7 * room + 1e-30).all()

    run()


@places("reference", "cpu")
def test_against_torch_int4(ops):
    """PyTorch's own CPU operator computes the same product: there w = (code - 8) s + z', z' = (8 - z) s."""
    codes, scales, zeros, w = random_weight(64, 256, 64, dtype=torch.bfloat16)
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    pairs = torch.stack([scales.T.float(), (8 - zeros.T.float()) * scales.T.float()], -1).to(torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    want = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, pairs.contiguous())
    room = x.abs().float() @ exact(codes, scales, zeros, 64).abs().float().T
    assert ((judge.gemm(ops.int4_gemm, x, w).float() - want.float()).abs() <= 0.01 * room).all()


@by_dtype
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_hot_rows_read_every_weight(ops, dtype, symmetric):
    batches = {"interpreter": (135, 40), "lanes": (135, 30, 15, 8)}.get(
        ops.kind, (135, 1, 2, 3, 4, 5, 6, 8, 16, 40, 64)
    )
    judge.check_every_weight(ops.int4_gemm, dtype, 83, 135, 64, batches, symmetric)
    judge.check_every_weight(
        ops.int4_gemm, dtype, 20, 135, 96, (27,) if ops.kind == "interpreter" else (9, 27), symmetric
    )


@places("cuda", "triton")
@by_dtype
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_hot_rows_read_every_weight_of_many(ops, dtype, symmetric):
    judge.check_every_weight(ops.int4_gemm, dtype, 83, 135, 64, (1024,), symmetric)
    judge.check_every_weight(ops.int4_gemm, dtype, 300, 2000, 96, (40, 1024), symmetric)


@places("cpu", "interpreter", "lanes", "cuda", "triton")
@by_dtype
@pytest.mark.parametrize("n, k, group_size", [(200, 288, 32), (64, 600, 128), (19, 330, -1)])
def test_a_row_does_not_depend_on_the_batch(ops, n, k, group_size, dtype, request):
    if ops.kind == "interpreter":
        request.getfixturevalue("in_order")
        judge.check_batches(ops.int4_gemm, dtype, n, k, group_size, (7, 64), rows=21)
    elif ops.kind == "cpu":
        judge.check_batches(ops.int4_gemm, dtype, n, k, group_size, (1, 2, 3, 4, 5, 6, 7, 9, 64, 200), rows=270)
    elif ops.kind == "lanes":
        judge.check_batches(ops.int4_gemm, dtype, n, k, group_size, (5, 13, 20, 64), rows=66)
    else:
        check_batches_on_a_gpu(ops, dtype, n, k, group_size)


@places("cuda", "triton")
@by_dtype
def test_a_row_of_a_large_weight_does_not_depend_on_the_batch(ops, dtype):
    check_batches_on_a_gpu(ops, dtype, 5000, 4096, 128)


def check_batches_on_a_gpu(ops, dtype, n, k, group_size):
    judge.check_batches(ops.int4_gemm, dtype, n, k, group_size, (1, 5, 13, 16), rows=16)
    # From 256 rows on, the CUDA library multiplies a dense copy (csrc/torch/cuda.cpp).
    judge.check_batches(ops.int4_gemm, dtype, n, k, group_size, (20, 40, 80, 160), rows=240)
    # Hopper multiplies more than 16 rows by other instructions (int4_gemm_sm90.cu).
    if ops.kind == "triton" or torch.cuda.get_device_capability() != (9, 0):
        judge.check_batches(ops.int4_gemm, dtype, n, k, group_size, (3, 64), rows=240)


@pytest.fixture
def in_order(monkeypatch):
    """Dots that add one product after the other, as tensor cores do; numpy's order depends on the shapes."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def added(self, a, b, d, *rest):
        for k in range(a.data.shape[1]):
            left, right = TensorHandle(a.data[:, k : k + 1], a.dtype), TensorHandle(b.data[k : k + 1], b.dtype)
            d = dot(self, left, right, d, *rest)
        return d

    monkeypatch.setattr(InterpreterBuilder, "create_dot", added)


@by_dtype
@pytest.mark.parametrize("check", ["zero_points", "strides", "what_is_not_finite_stays_in_its_row"])
def test_odd_input(ops, check, dtype):
    if ops.kind == "reference" and check != "zero_points":
        pytest.skip("torch's products may depend on the strides, and on the rows beside a row")
    getattr(judge, f"check_{check}")(ops.int4_gemm, dtype)


@by_dtype
def test_zero_points_of_many_rows(ops, dtype):
    judge.check_zero_points(ops.int4_gemm, dtype, m=20)


@places("cpu")
@by_dtype
def test_activations_of_any_size_and_mean(ops, dtype):
    """Large means and outliers, where the offset of the dequantised codes weighs most."""
    *parts, w = random_weight(64, 512, 128)
    weight = w, exact(*parts, 128)
    for m in (1, 8):
        x = torch.randn(m, 512) + 30
        given = [x, x.index_fill(1, torch.tensor([77]), -3000), x * 1e-6, x * 2.0 ** torch.randint(-40, 0, (512,))]
        given += [] if dtype == torch.float16 else [x * 1e-34, x * 1e30]
        for x in given:
            judge.check(ops.int4_gemm, x.to(dtype), *weight)


@places("cpu")
@by_dtype
def test_a_row_does_not_depend_on_the_threads(ops, dtype):
    w = random_weight(300, 256, 64)[3]
    threads, x = torch.get_num_threads(), torch.randn(90, 256).to(dtype)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([judge.gemm(ops.int4_gemm, x[:m], w) for m in (1, 4, 90)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@places("reference", "cpu", "interpreter", "cuda", "triton")
@pytest.mark.parametrize("group_size", [96, 2**31 * 32, 2**63 - 32])
def test_a_group_longer_than_a_row_is_a_row(ops, group_size):
    w = random_weight(20, 70, -1)[3]
    x = torch.randn(3, 70)
    long = ops.int4_gemm(x, w.packed, w.scales, w.zeros, group_size=group_size, n=20)
    assert torch.equal(long, judge.gemm(ops.int4_gemm, x, w))


@places("reference", "cpu")
def test_slices_of_columns_are_slices_of_memory(ops):
    w = random_weight(80, 64)[3]
    x = torch.randn(3, 64)
    part = ops.int4_gemm(x, w.packed[1:3], w.scales[1:3], w.zeros[1:3], group_size=32, n=32)
    torch.testing.assert_close(part, judge.gemm(ops.int4_gemm, x, w)[:, 16:48])


# --- activations rounded to 8 bits -----------------------------------------------------------------------------------


@places("cpu")
@by_dtype
@pytest.mark.parametrize("n, k", [(200, 288), (1, 32), (17, 33), (96, 1), (64, 1000), (33, 416)])
@pytest.mark.parametrize("group_size", [32, 96, 128, -1])
def test_rounded_activations(ops, n, k, group_size, dtype):
    """Exactly what the reference rounds x to, times the weight; float32's own error on top."""
    for symmetric in (False, True):
        *parts, w = random_weight(n, k, group_size, symmetric, dtype=torch.float16)
        true, bias = exact(*parts, group_size), None if symmetric else torch.randn(n).to(dtype)
        for m in (1, 2, 3, 4, 5, 6, 7, 13, 70):
            x = torch.randn(m, k).to(dtype)
            rounded = reference.round_to_int8(x, group_size).double()
            step = x.float().abs().amax() / 127
            assert (rounded - x).abs().max() <= 0.51 * step
            want = rounded @ true.T + (0 if bias is None else bias.double())
            out = judge.gemm(ops.int4_gemm, x, w, bias, int8_activations=True)
            room = rounded.abs() @ true.abs().T + 1
            assert out.dtype == dtype and out.shape == (m, n)
            assert ((out.double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 1e-6 * room).all()


@places("cpu")
@by_dtype
def test_rounded_rows_do_not_depend_on_each_other(ops, dtype):
    w = random_weight(200, 600, 128, dtype=torch.float16)[3]
    x = torch.randn(70, 600).to(dtype) * torch.logspace(-3, 3, 70)[:, None].to(dtype)
    x[5] = 0

    def gemm(x):
        return judge.gemm(ops.int4_gemm, x, w, int8_activations=True)

    whole = gemm(x)
    assert not whole[5].any()
    for m in (1, 2, 3, 5, 6, 7, 64):
        assert torch.equal(torch.cat([gemm(rows) for rows in x.split(m)]), whole)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[4, 17] = bad
        got, keep = gemm(spoiled), torch.arange(70) != 4
        assert got[4].isnan().all() and torch.equal(got[keep], whole[keep])
    assert not gemm(torch.full((2, 600), 1e-36)).any()


# --- what belongs to one place ---------------------------------------------------------------------------------------


@interpreted
@by_dtype
def test_a_row_does_not_depend_on_who_adds_the_parts(interpreter, poisoned, dtype, monkeypatch):
    from headstart._library import triton_kernels
    from headstart.triton import int4_gemm as module

    w = random_weight(64, 600, 128)[3]
    x, results = torch.randn(3, 600).to(dtype), []
    monkeypatch.setattr(module, "PART", 128)
    for programs in (0, 10**6):
        monkeypatch.setattr(module, "PROGRAMS", programs)
        results.append(judge.gemm(triton_kernels["int4_gemm"], x, w))
    assert torch.equal(*results)


@places("interpreter")
@pytest.mark.parametrize("m, n, k, group_size", [(17, 33, 1000, 128), (33, 100, 130, 64), (70, 200, 160, 32)])
def test_against_float64_in_the_order_of_hopper(ops, m, n, k, group_size, monkeypatch):
    from headstart.triton import int4_gemm as module

    limits = module.device_limits(torch.device("cpu"))._replace(wgmma=True)
    monkeypatch.setattr(module, "device_limits", lambda device: limits)
    judge.check_case(ops.int4_gemm, m, n, k, group_size, torch.float16)


@pytest.mark.slow
@by_dtype
@pytest.mark.parametrize("kind", judge.WIDE)
def test_open_in_the_lane_model(dtype, kind):
    from lane_model.int4_gemm import dequantize

    for n, k, group_size in ((40, 288, 32), (17, 33, -1), (5, 130, 64)):
        w, _ = judge.random_wide_weight(kind, n, k, group_size, torch.float16)
        assert torch.equal(dequantize(w, dtype), w.dequantize(dtype))


@pytest.mark.slow
@by_dtype
@pytest.mark.parametrize("n, k, group_size", [(40, 288, 32), (17, 33, -1), (5, 130, 64), (20, 1088, 96)])
def test_dequantize_in_the_lane_model(dtype, n, k, group_size):
    from lane_model.int4_gemm import dequantize

    for symmetric, scale_dtype in ((False, torch.float16), (True, torch.bfloat16), (False, torch.float32)):
        w = random_weight(n, k, group_size, symmetric, dtype=scale_dtype)[3]
        if symmetric:
            odd = torch.empty(w.packed.numel() + 1, dtype=torch.int32)[1:].view(w.packed.shape).copy_(w.packed)
            w = Int4Weight(odd, w.scales, w.zeros, w.group_size, w.shape)
        assert torch.equal(dequantize(w, dtype), w.dequantize(dtype))


def weight_on_the_gpu(n, k):
    return random_weight(n, k, 128, dtype=torch.bfloat16)[3].to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cuda", "triton"])
@pytest.mark.parametrize("m", [1, 12, 40, 500])
def test_in_a_cuda_graph(gpu, kind, m):
    w, gemm = weight_on_the_gpu(1000, 2048), gpu_kernel("int4_gemm", kind)
    x = torch.randn(m, 2048, dtype=torch.bfloat16, device="cuda")

    def step():
        return gemm(x * 1.0, w.packed, w.scales, w.zeros, group_size=128, n=1000)

    expect_no_wait(step)
    expect_same_when_replayed(step, x.normal_)


@pytest.mark.gpu
def test_compiles_whole_on_a_gpu(gpu):
    w = weight_on_the_gpu(300, 512)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: headstart.int4_gemm(x * 1.0, w), fullgraph=True, dynamic=True)
    for m in (2, 30, 700):
        x = torch.randn(m, 512, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(x), headstart.int4_gemm(x, w))


# --- pack and unpack -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(200, 288), (1, 32), (17, 33), (96, 1), (64, 1000), (33, 416), (40, 64)])
def test_pack_and_unpack(cpu_tier, n, k):
    for bits in (4, 8):
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        packed = hs.int4_pack(codes, bits=bits)
        assert torch.equal(packed, reference.pack(codes, bits))
        assert torch.equal(hs.int4_pack(codes.T.contiguous().T, bits=bits), packed)
        assert torch.equal(hs.int4_unpack(packed, n, k, bits=bits), codes)
        assert torch.equal(hs.int4_unpack(packed, n, k, bits=bits), reference.unpack(packed, n, k, bits))
        assert hs.int4_pack(codes[:0], bits=bits).numel() == hs.int4_pack(codes[:, :0], bits=bits).numel() == 0


def test_codes_above_the_range_are_not_truncated(cpu_tier):
    codes = torch.full((5, 40), 3, dtype=torch.uint8)
    codes[4, 39] = 16
    with pytest.raises((ValueError, RuntimeError), match="int4_pack: codes: expected values 0 to 15, got 16"):
        hs.int4_pack(codes)
    with pytest.raises((ValueError, RuntimeError), match="int4_pack: bits: expected 4 or 8, got 5"):
        hs.int4_pack(codes, bits=5)
    assert torch.equal(hs.int4_unpack(hs.int4_pack(codes, bits=8), 5, 40, bits=8), codes)


@pytest.mark.gpu
def test_pack_and_unpack_on_a_gpu(gpu):
    codes = torch.randint(0, 16, (83, 135), dtype=torch.uint8, device="cuda")
    packed = hs.int4_pack(codes)
    assert torch.equal(packed.cpu(), hs.int4_pack(codes.cpu()))
    assert torch.equal(hs.int4_unpack(packed, 83, 135), codes)


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(dtype, permuted):
    codes, _, _, w = random_weight(20, 70, 32, dtype=dtype)
    x = torch.randn(2, 3, 70).to(dtype)
    if permuted:
        x, codes = x.transpose(0, 1), codes.T.contiguous().T
    bias = torch.randn(20).to(dtype)
    torch.library.opcheck(hs.int4_gemm.default, (x, w.packed, w.scales, w.zeros, bias), dict(group_size=32, n=20))
    if dtype == torch.float32:
        torch.library.opcheck(hs.int4_gemm.default, (x, w.packed, w.scales), dict(group_size=32, n=20))
        torch.library.opcheck(hs.int4_pack.default, (codes,))
        wide, _ = judge.random_wide_weight("8 bits with minimums", 20, 70, 16)
        options = dict(group_size=16, n=20, minimums=wide.minimums, bits=8)
        torch.library.opcheck(hs.int4_gemm.default, (x, wide.packed, wide.scales), options)
        torch.library.opcheck(hs.int4_pack.default, (codes,), dict(bits=8))
        torch.library.opcheck(hs.int4_unpack.default, (wide.packed, 20, 70), dict(bits=8))
        torch.library.opcheck(hs.int4_unpack.default, (w.packed, 20, 70))


def test_compile_dynamic():
    def run(x, codes, scales):
        return hs.int4_gemm(x, hs.int4_pack(codes), scales, group_size=32, n=codes.shape[0])

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, k, m in ((20, 70, 2), (40, 130, 5)):
        codes, _, _, w = random_weight(n, k)
        x = torch.randn(m, k)
        torch.testing.assert_close(compiled(x, codes, w.scales), run(x, codes, w.scales))
    torch.compile(lambda x: int4_gemm(x, w), fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        (dict(x=torch.randn(2, 64).double()), "x"),
        (dict(x=torch.randn(64, 2).T), "x"),
        (dict(x=torch.randn(2, 96)), "packed"),
        (dict(packed=torch.zeros(2, 2, 4, 16)), "packed"),
        (dict(packed=torch.zeros(2, 2, 4, 16, dtype=torch.int32, device="meta")), "packed"),
        (dict(packed=torch.zeros(2, 2, 16, 4, dtype=torch.int32).mT), "packed"),
        (dict(scales=torch.ones(2, 3, 16)), "scales"),
        (dict(scales=torch.ones(2, 2, 16, dtype=torch.int32)), "scales"),
        (dict(zeros=torch.ones(2, 2, 16)), "zeros"),
        (dict(bias=torch.ones(17)), "bias"),
        (dict(bias=torch.ones(20).half()), "bias"),
        (dict(group_size=48), "group_size"),
        (dict(group_size=0), "group_size"),
        (dict(n=40), "packed"),
        (dict(n=0), "packed"),
    ],
)
def test_bad_input_names_the_argument(change, argument):
    w = random_weight(20, 64)[3]
    args = dict(x=torch.randn(2, 64), packed=w.packed, scales=w.scales, zeros=w.zeros, bias=None, group_size=32, n=20)
    said = f"int4_gemm: {argument}: expected .*, got "
    with pytest.raises((ValueError, RuntimeError), match=said) as compiled:
        hs.int4_gemm(**(args | change))
    with pytest.raises(ValueError, match=said) as by_reference:
        hs.int4_gemm.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, **(args | change))
    assert str(compiled.value).splitlines()[0] == str(by_reference.value)

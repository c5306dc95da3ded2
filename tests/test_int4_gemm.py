"""Int4 weights: the packed layout, the checkpoint formats bit by bit, quantisation, and the product in float64."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.ops.int4_gemm import Int4Weight, int4_gemm
from headstart.reference import int4_gemm as reference
from int4_judge import exact, random_weight
from tolerances import assert_close

ops = torch.ops.headstart
ROOT = Path(__file__).parent.parent
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def words(nibbles):
    """uint [..., 8], nibble 0 lowest, to int32 [...], by numpy."""
    nibbles = np.asarray(nibbles).astype(np.uint32)
    return torch.from_numpy((nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32))


# --- the packed layout ----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 70), k=st.integers(1, 140), seed=st.integers(0, 99))
def test_pack_is_the_documented_layout(n, k, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (n, k), dtype=np.uint8))
    packed = ops.int4_pack(codes)
    assert packed.shape == (-(-n // 16), -(-k // 32), 4, 16) and packed.dtype == torch.int32
    assert torch.equal(ops.int4_unpack(packed, n, k), codes)
    flat = packed.numpy().view(np.uint32)
    for row, column in np.random.default_rng(seed).integers(0, (n, k), (20, 2)):
        slab, inside = divmod(column, 32)
        word = flat[row // 16, slab, inside % 8 // 2, row % 16]
        pair = (word >> np.uint32(4 * (inside // 8))) & np.uint32(0x000F000F)
        assert (pair >> np.uint32(16 * (inside % 2))) & 15 == codes[row, column]
    whole = ops.int4_unpack(packed, packed.shape[0] * 16, packed.shape[1] * 32)
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


def test_slices_of_columns_are_slices_of_memory():
    codes, scales, zeros, w = random_weight(80, 64)
    x = torch.randn(3, 64)
    part = ops.int4_gemm(x, w.packed[1:3], w.scales[1:3], w.zeros[1:3], group_size=32, n=32)
    torch.testing.assert_close(part, int4_gemm(x, w)[:, 16:48])


def test_one_hot_activations_read_every_weight():
    codes, scales, zeros, w = random_weight(33, 70)
    torch.testing.assert_close(int4_gemm(torch.eye(70), w).T.double(), exact(codes, scales, zeros, 32))
    torch.testing.assert_close(w.dequantize(torch.float64), exact(codes, scales, zeros, 32), rtol=1e-6, atol=1e-6)


# --- the product ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    batch=st.lists(st.integers(0, 4), max_size=2),
    n=st.integers(1, 50),
    k=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 96, 128, -1]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_against_float64(batch, n, k, group_size, symmetric, dtype):
    codes, scales, zeros, w = random_weight(n, k, group_size, symmetric, dtype=torch.float16)
    x, bias = torch.randn(*batch, k).to(dtype), torch.randn(n).to(dtype)
    out = int4_gemm(x, w, bias)
    true = exact(codes, scales, zeros, group_size)
    want = x.double() @ true.T + bias.double()
    room = x.double().abs() @ true.abs().T + bias.double().abs()
    assert out.dtype == dtype and out.shape == (*batch, n)
    error = (out.double() - want).abs() - torch.finfo(dtype).eps * want.abs()
    assert (error <= 1e-6 * room + 1e-30).all()


def test_against_torch_int4():
    """PyTorch's own CPU operator computes the same product: there w = (code - 8) s + z', z' = (8 - z) s."""
    codes, scales, zeros, w = random_weight(64, 256, 64, dtype=torch.bfloat16)
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    pairs = torch.stack([scales.T.float(), (8 - zeros.T.float()) * scales.T.float()], -1).to(torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    want = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, pairs.contiguous())
    room = x.abs().float() @ exact(codes, scales, zeros, 64).abs().float().T
    assert ((int4_gemm(x, w).float() - want.float()).abs() <= 0.01 * room).all()


# --- the CPU kernels, in every tier ---------------------------------------------------------------------------------

by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 70)
SIZES = ((200, 288), (1, 32), (17, 33), (96, 1), (64, 1000), (33, 416))


def poisoned(function, *shape):
    """Calls a function after freeing NaNs where it is likely to allocate, so that what it does not write is seen."""
    trash = [torch.full(shape, torch.nan, dtype=d) for d in (torch.bfloat16, torch.float32)]
    del trash
    return function()


def check(x, w, true, bias=None):
    """Runs the kernel and holds it against float64, and against what F.linear makes of the same weight."""
    want = x.double() @ true.T + (0 if bias is None else bias.double())
    out = poisoned(lambda: int4_gemm(x, w, bias), *x.shape[:-1], len(true))
    assert out.dtype == x.dtype and out.shape == want.shape and out.is_contiguous()
    assert_close(out, want, torch.nn.functional.linear(x, true.to(x.dtype), bias), "out")
    return out


@by_dtype
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
def test_kernels(cpu_tier, dtype, n, k, group_size):
    bias = torch.randn(n).to(dtype)
    for symmetric, scale_dtype in ((False, torch.bfloat16), (True, torch.float16)):
        *parts, w = random_weight(n, k, group_size, symmetric, dtype=scale_dtype)
        true = exact(*parts, group_size)
        for m in ROWS:
            check(torch.randn(m, k).to(dtype), w, true, None if symmetric else bias)


@by_dtype
def test_activations_of_any_size_and_mean(cpu_tier, dtype):
    """Large means and outliers, where the offset of the dequantised codes weighs most."""
    *parts, w = random_weight(64, 512, 128)
    weight = w, exact(*parts, 128)
    for m in (1, 8):
        x = torch.randn(m, 512) + 30
        check(x.to(dtype), *weight)
        x[:, 77] = -3000
        check(x.to(dtype), *weight)
        check((x * 1e-6).to(dtype), *weight)
        check((x * 2.0 ** torch.randint(-40, 0, (512,))).to(dtype), *weight)
        if dtype != torch.float16:
            check((x * 1e-34).to(dtype), *weight)
            check((x * 1e30).to(dtype), *weight)


@by_dtype
@pytest.mark.parametrize("symmetric", [False, True])
def test_kernels_read_every_weight(cpu_tier, dtype, symmetric):
    """One-hot rows, scales that are powers of two: every weight comes back exactly, by few rows and by many."""
    n, k = 83, 135
    codes, _, zeros, _ = random_weight(n, k, 64, symmetric)
    scales = 2.0 ** torch.randint(-3, 4, (n, 3))
    want = exact(codes, scales, zeros, 64).to(dtype)
    w = Int4Weight._of_codes(codes, scales, zeros, 64)
    hot = torch.eye(k, dtype=dtype)
    assert torch.equal(int4_gemm(hot, w).T, want)
    for m in (1, 2, 3, 4, 5, 6):
        assert torch.equal(torch.cat([int4_gemm(rows, w) for rows in hot.split(m)]).T, want)


@by_dtype
@pytest.mark.parametrize(("n", "k", "group_size"), [(200, 288, 32), (64, 600, 128), (19, 330, -1)])
def test_a_row_does_not_depend_on_the_batch(cpu_tier, dtype, n, k, group_size):
    w = random_weight(n, k, group_size, dtype=torch.float16)[3]
    x, bias = torch.randn(270, k).to(dtype), torch.randn(n).to(dtype)
    whole = int4_gemm(x, w, bias)
    for m in (1, 2, 3, 4, 5, 6, 7, 9, 64):
        assert torch.equal(torch.cat([int4_gemm(rows, w, bias) for rows in x[:70].split(m)]), whole[:70])
    first = Int4Weight(w.packed[:2], w.scales[:2], w.zeros[:2], group_size, (min(n, 32), k))
    assert torch.equal(int4_gemm(x, first), int4_gemm(x, w)[:, :32])


@by_dtype
def test_a_row_does_not_depend_on_the_threads(cpu_tier, dtype):
    w = random_weight(300, 256, 64)[3]
    threads, x = torch.get_num_threads(), torch.randn(90, 256).to(dtype)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([int4_gemm(x[:m], w) for m in (1, 4, 90)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@by_dtype
def test_strides_batches_and_offsets(cpu_tier, dtype):
    w = random_weight(40, 96, 32)[3]
    wide = torch.randn(3, 7, 2, 301).to(dtype)
    views = (
        wide[..., 5:101],
        wide[..., 1:97].transpose(0, 2),
        wide[:, :1, :, 200:296],
        wide[0, 0, 0, 3:99],
        wide[..., :96][:0],
    )
    for x in views:
        out = int4_gemm(x, w)
        assert out.shape == (*x.shape[:-1], 40) and torch.equal(out, int4_gemm(x.contiguous(), w))
    odd = torch.empty(w.packed.numel() + 1, dtype=torch.int32)[1:].view(w.packed.shape).copy_(w.packed)
    moved = Int4Weight(odd, w.scales, w.zeros, 32, w.shape)
    assert torch.equal(int4_gemm(views[0], moved), int4_gemm(views[0], w))
    one = random_weight(5, 1, 32)[3]
    assert int4_gemm(torch.randn(4, 6).to(dtype)[:, 2:3], one).shape == (4, 5)


@by_dtype
def test_what_is_not_finite_stays_in_its_row(cpu_tier, dtype):
    w = random_weight(40, 96, 32)[3]
    x = torch.randn(9, 96).to(dtype)
    want = int4_gemm(x, w)
    x[4, 17] = torch.nan
    got = int4_gemm(x, w)
    assert got[4].isnan().all()
    keep = torch.arange(9) != 4
    assert torch.equal(got[keep], want[keep])


@by_dtype
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("group_size", [32, 96, 128, -1])
def test_rounded_activations(cpu_tier, dtype, n, k, group_size):
    """Exactly what the reference rounds x to, times the weight; float32's own error on top."""
    for symmetric in (False, True):
        *parts, w = random_weight(n, k, group_size, symmetric, dtype=torch.float16)
        true, bias = exact(*parts, group_size), None if symmetric else torch.randn(n).to(dtype)
        for m in ROWS:
            x = torch.randn(m, k).to(dtype)
            rounded = reference.round_to_int8(x, group_size).double()
            step = x.float().abs().amax() / 127
            assert (rounded - x).abs().max() <= 0.51 * step
            want = rounded @ true.T + (0 if bias is None else bias.double())
            out = poisoned(lambda: int4_gemm(x, w, bias, int8_activations=True), m, n)  # noqa: B023
            room = rounded.abs() @ true.abs().T + 1
            assert out.dtype == dtype and out.shape == (m, n)
            assert ((out.double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 1e-6 * room).all()


@by_dtype
def test_rounded_rows_do_not_depend_on_each_other(cpu_tier, dtype):
    w = random_weight(200, 600, 128, dtype=torch.float16)[3]
    x = torch.randn(70, 600).to(dtype) * torch.logspace(-3, 3, 70)[:, None].to(dtype)
    x[5] = 0
    whole = int4_gemm(x, w, int8_activations=True)
    assert not whole[5].any()
    for m in (1, 2, 3, 5, 6, 7, 64):
        parts = [int4_gemm(rows, w, int8_activations=True) for rows in x.split(m)]
        assert torch.equal(torch.cat(parts), whole)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[4, 17] = bad
        got = int4_gemm(spoiled, w, int8_activations=True)
        keep = torch.arange(70) != 4
        assert got[4].isnan().all() and torch.equal(got[keep], whole[keep])
    tiny = int4_gemm(torch.full((2, 600), 1e-36), w, int8_activations=True)
    assert not tiny.any()


@pytest.mark.parametrize(("n", "k"), [*SIZES, (40, 64)])
def test_kernels_pack_and_unpack(cpu_tier, n, k):
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)  # the low four bits count
    packed = ops.int4_pack(codes)
    assert torch.equal(packed, reference.pack(codes))
    assert torch.equal(ops.int4_pack(codes.T.contiguous().T), packed)
    assert torch.equal(ops.int4_unpack(packed, n, k), codes & 15)
    assert torch.equal(ops.int4_unpack(packed, n, k), reference.unpack(packed, n, k))
    assert ops.int4_pack(codes[:0]).numel() == ops.int4_pack(codes[:, :0]).numel() == 0


# --- quantisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_quantize_beats_plain_rounding(dtype, symmetric, group_size):
    w = torch.randn(24, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[3] = 0
    q = Int4Weight.quantize(w, group_size, symmetric)
    assert (q.zeros is None) == symmetric and q.scales.dtype == dtype
    got = q.dequantize()
    size = 200 if group_size == -1 else group_size
    plain = torch.zeros(24, 200)
    for g in range(0, 200, size):
        part = w[:, g : g + size].float()
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        step = (torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15).clamp(min=1e-9)
        zero = 8 if symmetric else (-low / step).round()
        plain[:, g : g + size] = ((part / step + zero).round().clamp(0, 15) - zero) * step
    assert (got[3] == 0).all() and torch.isfinite(got).all()
    assert (got - w.float()).square().mean() < (plain - w.float()).square().mean()


def test_quantize_is_lossless_on_its_own_output():
    codes, scales, zeros, _ = random_weight(16, 64)
    codes[:, ::32], codes[:, 1::32] = 0, 15  # every group shows its whole range
    zeros = zeros.clamp(0, 15)
    w = exact(codes, scales, zeros, 32).float()
    torch.testing.assert_close(Int4Weight.quantize(w, 32).dequantize(), w)


def test_tiny_and_huge_weights_stay_finite():
    for value in (6e-8, 6e4):
        w = torch.full((2, 64), value, dtype=torch.float16)
        w[:, ::2] *= -1
        got = Int4Weight.quantize(w, 32).dequantize()
        assert torch.isfinite(got).all() and (got - w.float()).abs().max() <= max(6e-8, 0.1 * value)
    assert torch.isfinite(Int4Weight.quantize(torch.tensor([[3e38, -3e38] * 16]), 32).dequantize()).all()


# --- formats: hand-written packers, by their definitions ------------------------------------------------------------


def awq_words(codes):
    """[R, C] to [R, C / 8]: nibble i of word c is column 8c + AWQ_COLUMNS[i]."""
    return words(codes.numpy().reshape(len(codes), -1, 8)[:, :, AWQ_COLUMNS])


def sequential_words(codes):
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    return words(padded.numpy().reshape(len(codes), -1, 8))


@pytest.mark.parametrize("group_size", [32, 160])
def test_awq(group_size):
    codes, scales, zeros, want = random_weight(48, 160, min(group_size, 160), dtype=torch.float16)
    tensors = awq_words(codes.T.contiguous()), awq_words(zeros.T.contiguous()), scales.T.contiguous()
    w = Int4Weight.from_awq(*tensors, group_size)
    assert torch.equal(w.codes(), codes) and torch.equal(w.packed, want.packed)
    assert torch.equal(w.dequantize(), exact(codes, scales, zeros, group_size).float())
    assert all(torch.equal(a, b) for a, b in zip(w.to_awq(), tensors, strict=True))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(version, act_order):
    codes, scales, zeros, _ = random_weight(20, 104, 32, dtype=torch.float16)
    g_idx = torch.arange(104, dtype=torch.int32) // 32
    if act_order:
        g_idx = g_idx[torch.randperm(104, generator=torch.Generator().manual_seed(1))]
    stored = (zeros.int() + version - 2).remainder(16).to(torch.uint8)
    tensors = sequential_words(codes).T.contiguous(), sequential_words(stored.T.contiguous()), scales.T.contiguous()
    w = Int4Weight.from_gptq(*tensors, g_idx, group_size=32, version=version)
    true = (codes.double() - zeros.double()[:, g_idx]) * scales.double()[:, g_idx]
    assert torch.equal(w.codes(), codes) and torch.equal(w.dequantize(), true.float())
    assert (w.permutation is not None) == act_order
    x = torch.randn(2, 3, 104)
    torch.testing.assert_close(int4_gemm(x, w).double(), x.double() @ true.T, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(w.to_gptq(version), (*tensors, g_idx), strict=True))


@pytest.mark.parametrize(("n", "k", "group_size"), [(20, 100, 32), (8, 64, 64), (5, 33, -1)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors(n, k, group_size, symmetric):
    codes, scales, zeros, _ = random_weight(n, k, group_size, symmetric, dtype=torch.bfloat16)
    tensors = {
        "weight_packed": sequential_words(codes),
        "weight_scale": scales,
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = sequential_words(zeros.T.contiguous()).T.contiguous()
    named = {f"model.layers.0.mlp.up_proj.{name}": x for name, x in tensors.items()}
    w = Int4Weight.from_compressed_tensors(named, group_size)
    assert torch.equal(w.codes(), codes) and torch.equal(
        w.dequantize(), exact(codes, scales, zeros, group_size).float()
    )
    written = w.to_compressed_tensors()
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)
    if not symmetric:
        older = tensors | {"weight_zero_point": (zeros.int() - 8).to(torch.int8)}
        assert torch.equal(Int4Weight.from_compressed_tensors(older, group_size).zeros, w.zeros)


def test_compressed_tensors_g_idx():
    codes, scales, zeros, plain = random_weight(16, 64, 32)
    tensors = plain.to_compressed_tensors()
    assert Int4Weight.from_compressed_tensors(tensors | {"weight_g_idx": torch.full((64,), -1)}, 32).permutation is None
    g_idx = torch.arange(64, dtype=torch.int32) % 2
    w = Int4Weight.from_compressed_tensors(tensors | {"weight_g_idx": g_idx}, 32)
    want = (codes.double() - zeros.double()[:, g_idx]) * scales.double()[:, g_idx]
    assert torch.equal(w.dequantize(), want.float()) and torch.equal(w.codes(), codes)
    assert torch.equal(w.to_compressed_tensors()["weight_g_idx"], g_idx)


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(dtype, permuted):
    codes, _, _, w = random_weight(20, 70, 32, dtype=dtype)
    x = torch.randn(2, 3, 70).to(dtype)
    if permuted:
        x, codes = x.transpose(0, 1), codes.T.contiguous().T
    bias = torch.randn(20).to(dtype)
    torch.library.opcheck(ops.int4_gemm.default, (x, w.packed, w.scales, w.zeros, bias), dict(group_size=32, n=20))
    if dtype == torch.float32:
        torch.library.opcheck(ops.int4_gemm.default, (x, w.packed, w.scales), dict(group_size=32, n=20))
        torch.library.opcheck(ops.int4_pack.default, (codes,))
        torch.library.opcheck(ops.int4_unpack.default, (w.packed, 20, 70))


def test_compile_dynamic():
    def run(x, codes, scales):
        return ops.int4_gemm(x, ops.int4_pack(codes), scales, group_size=32, n=codes.shape[0])

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
        ops.int4_gemm(**(args | change))
    with pytest.raises(ValueError, match=said) as by_reference:
        ops.int4_gemm.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, **(args | change))
    assert str(compiled.value).splitlines()[0] == str(by_reference.value)


def test_bad_artifacts_name_the_field():
    w = random_weight(16, 64, 32, dtype=torch.float16)[3]
    awq, gptq, tensors = w.to_awq(), w.to_gptq(2), w.to_compressed_tensors()

    def fails(message, function, *args, **kwargs):
        with pytest.raises((ValueError, RuntimeError), match=message):
            function(*args, **kwargs)

    fails("from_awq: qzeros: expected", Int4Weight.from_awq, awq[0], awq[1][:1], awq[2], 32)
    fails("from_awq: qweight: expected", Int4Weight.from_awq, awq[0].short(), awq[1], awq[2], 32)
    fails("from_gptq: version: expected 1 or 2, got 3", Int4Weight.from_gptq, *gptq, group_size=32, version=3)
    crooked = gptq[3].clone().fill_(1)
    fails("from_gptq: g_idx: expected groups of 32", Int4Weight.from_gptq, *gptq[:3], crooked, group_size=32, version=2)
    fails("weight_scale: expected", Int4Weight.from_compressed_tensors, tensors | {"weight_scale": awq[2]}, 64)
    fails("weight_shape: expected", Int4Weight.from_compressed_tensors, {}, 32)
    fails("quantize: w: expected finite", Int4Weight.quantize, torch.full((1, 32), torch.nan))
    fails("quantize: group_size: expected", Int4Weight.quantize, torch.ones(1, 64), 40)
    fails("int4_gemm: weight: expected an Int4Weight", int4_gemm, torch.ones(1, 64), w.packed)
    fails(r"int4_gemm: x: expected \[..., 64\]", int4_gemm, torch.ones(1, 32), w)
    fails("int4_unpack: packed: expected", ops.int4_unpack, w.packed, 40, 64)
    fails("int4_pack: codes: expected uint8", ops.int4_pack, torch.zeros(2, 2))

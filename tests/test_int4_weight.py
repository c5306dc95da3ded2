"""Int4Weight: quantisation, and the checkpoint formats bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headstart.ops.int4_gemm import Int4Weight, int4_gemm
from judges.int4_gemm import exact, random_weight

ops = torch.ops.headstart
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def words(nibbles):
    """uint [..., 8], nibble 0 lowest, to int32 [...], by numpy."""
    nibbles = np.asarray(nibbles).astype(np.uint32)
    return torch.from_numpy((nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32))


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

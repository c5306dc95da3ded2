"""The Triton kernels of int4_gemm, without a GPU: their results through the interpreter, held to `int4_judge.py`, and
their machine code for sm_80 and sm_90.
"""

from __future__ import annotations

import re

import pytest
import torch

import int4_judge as judge
from headstart import _library
from triton_testing import (
    SHARED_MEMORY,
    compile_launch,
    compiled,
    interpreted,
    main_loop,
    resources,
    run_in_the_interpreter,
)

pytest.importorskip("triton", reason="triton is not installed")


@compiled
@pytest.mark.slow
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture(params=["parts added by a kernel of their own", "parts added in order"])
def kernels(request, interpreter, poisoned, monkeypatch):
    """`int4_judge.OP` is the Triton operator, interpreted, on a device that has few programs or enough."""
    from headstart.triton import int4_gemm

    monkeypatch.setattr(judge, "OP", _library.triton_kernels["int4_gemm"])
    monkeypatch.setattr(int4_gemm, "PART", 128)  # several parts of a short K
    monkeypatch.setattr(int4_gemm, "PROGRAMS", 10**6 if "kernel" in request.param else 0)
    return int4_gemm


@pytest.fixture
def in_order(interpreter, monkeypatch):
    """Dots that add one product after the other, as tensor cores do; numpy's order depends on the shapes."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def added(self, a, b, d, *rest):
        for k in range(a.data.shape[1]):
            left, right = TensorHandle(a.data[:, k : k + 1], a.dtype), TensorHandle(b.data[k : k + 1], b.dtype)
            d = dot(self, left, right, d, *rest)
        return d

    monkeypatch.setattr(InterpreterBuilder, "create_dot", added)


CASES = (
    (1, 70, 288, 32), (1, 17, 33, -1), (3, 64, 416, 96), (17, 33, 1000, 128), (33, 100, 130, 64), (70, 200, 160, 32),
    (130, 40, 96, 64), (2, 96, 1, 32), (5, 64, 512, -1),
)  # fmt: skip


@interpreted
@judge.by_dtype
@pytest.mark.parametrize("m, n, k, group_size", CASES)
def test_against_float64(kernels, m, n, k, group_size, dtype):
    scales = judge.DTYPES[(m + n) % 3]
    judge.check_case(m, n, k, group_size, dtype, symmetric=n % 2 == 0, scale_dtype=scales, bias=k % 2 == 0)


@interpreted
@pytest.mark.parametrize("m, n, k, group_size", CASES[3:6])
def test_against_float64_in_the_order_of_hopper(kernels, m, n, k, group_size, monkeypatch):
    limits = kernels.device_limits(torch.device("cpu"))._replace(wgmma=True)
    monkeypatch.setattr(kernels, "device_limits", lambda device: limits)
    judge.check_case(m, n, k, group_size, torch.float16, symmetric=False, scale_dtype=torch.float16, bias=True)


@interpreted
@judge.by_dtype
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_weight(kernels, dtype, symmetric):
    judge.check_every_weight(dtype, 83, 135, 64, (135, 40), symmetric)
    judge.check_every_weight(dtype, 20, 135, 96, (9,), symmetric)


@interpreted
@judge.by_dtype
@pytest.mark.parametrize("n, k, group_size", [(200, 288, 32), (64, 600, 128), (19, 330, -1)])
def test_a_row_does_not_depend_on_the_batch(kernels, in_order, dtype, n, k, group_size):
    judge.check_batches(dtype, n, k, group_size, (7, 64), rows=21)


@interpreted
@judge.by_dtype
def test_a_row_does_not_depend_on_who_adds_the_parts(kernels, dtype, monkeypatch):
    w = judge.random_weight(64, 600, 128)[3]
    x, results = torch.randn(3, 600).to(dtype), []
    for programs in (0, 10**6):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        results.append(judge.gemm(x, w))
    assert torch.equal(*results)


@interpreted
@judge.by_dtype
@pytest.mark.parametrize("check", ["zero_points", "strides", "what_is_not_finite_stays_in_its_row"])
def test_odd_input(kernels, dtype, check):
    getattr(judge, f"check_{check}")(dtype)


def test_parts_depend_on_k_alone_and_cover_it():
    from headstart.triton.int4_gemm import choose_parts

    for k in (1, 32, 33, 1000, 1024, 1025, 4096, 14336, 53248, 10**6):
        parts, slabs = choose_parts(k)
        assert slabs % 4 == 0 and (parts - 1) * slabs < -(-k // 32) <= parts * slabs and parts <= 16


# --- machine code ----------------------------------------------------------------------------------------------------


def build(monkeypatch, name, capability, m, dtype, group_size=128, k=4096, zeros=True):
    from headstart.triton import int4_gemm as module

    n = 4096
    x, packed = torch.empty(m, k, dtype=dtype), torch.empty(n // 16, -(-k // 32), 4, 16, dtype=torch.int32)
    scales = torch.empty(n // 16, 1 if group_size == -1 else -(-k // group_size), 16, dtype=dtype)

    def call():
        given = dict(group_size=group_size, n=n)
        zero_points = scales.to(torch.uint8) if zeros else None
        _library.triton_kernels["int4_gemm"](x, packed, scales, zero_points, x.new_empty(n), **given)

    return compile_launch([module], monkeypatch, name, capability, call)


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name, m", [("int4_gemm_kernel", m) for m in (1, 32, 64, 512)] + [("add_parts_kernel", 1)])
@pytest.mark.parametrize("group_size", [32, 128])
def test_kernels_compile(name, m, dtype, group_size, capability, monkeypatch, tmp_path, record_property, capsys):
    if group_size == 32 and (m != 512 or dtype != torch.bfloat16) or (name == "add_parts_kernel" and m != 1):
        pytest.skip("differs in the block of K alone")
    binary = build(monkeypatch, name, capability, m, dtype, group_size)
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    if name == "int4_gemm_kernel" and dtype != torch.float32:
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in binary.asm["ptx"], "no tensor cores in it"
    assert "atom" not in binary.asm["ptx"]
    used = resources(binary, tmp_path)
    if used is not None:
        record_property("resources", str(used))
        with capsys.disabled():
            print(f"\nsm_{capability} {name} m={m} {dtype} group {group_size}: {used}", end=" ")
        assert used["stack"] == 0, f"spills: {used}"


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("m", [1, 32, 64, 512])
def test_the_weight_is_copied_ahead_and_stays_in_registers(m, capability, monkeypatch):
    """Words, zero points and x come by cp.async, some blocks of K early. What a lane has unpacked, it multiplies:
    nothing unpacked goes through shared memory."""
    binary = build(monkeypatch, "int4_gemm_kernel", capability, m, torch.bfloat16)
    copied = re.findall(r"async_copy_global_to_local.*?tensor<[\dx]+!tt.ptr<(\w+)>", binary.asm["ttgir"])
    two_warps = (m, capability) == (32, 80)  # too few threads: Triton loads a zero point for each, without a copy
    assert set(copied) == ({"i32", "bf16"} if two_warps else {"i32", "i8", "bf16"}), copied
    loop = main_loop(binary.asm["ptx"])
    assert loop.count("ld.global.b8") == two_warps and loop.count("cp.async.c") >= 3
    assert loop.count("ld.global") <= 4  # the scales of the next block
    assert loop.count("st.shared") <= 2, "unpacked weights in shared memory"


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("m, dtype", [*((m, torch.bfloat16) for m in (1, 32, 64, 512)), (512, torch.float32)])
@pytest.mark.parametrize(
    "given",
    [dict(zeros=False), dict(group_size=-1), dict(group_size=64), dict(group_size=96, k=4032)]
    + [dict(group_size=-1, k=4104), dict(k=4100)],
    ids=str,
)
def test_no_configuration_spills(given, m, dtype, capability, monkeypatch, tmp_path):
    used = resources(build(monkeypatch, "int4_gemm_kernel", capability, m, dtype, **given), tmp_path)
    assert used is None or used["stack"] == 0, f"spills: {used}"

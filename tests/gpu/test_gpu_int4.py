"""int4_gemm on a GPU: the CUDA kernels and Triton's, by the judge of the CPU."""

from __future__ import annotations

import pytest
import torch

import headstart
import int4_judge
from headstart import _library
from on_a_gpu import DTYPES, cuda_kernel, expect_no_wait, expect_same_when_replayed, on_the_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def gemm(request, monkeypatch):
    """The operator of the int4 judge, from the CUDA library and on Triton."""
    run = {"cuda": cuda_kernel, "triton": _library.triton_kernels.get}[request.param]("int4_gemm")

    def call(*args, **options):
        return run(*(on_the_gpu(x) for x in args), **options).cpu()

    monkeypatch.setattr(int4_judge, "OP", call)
    return run


INT4_SHAPES = [
    (1024, 4096, 128),
    (17, 33, -1),
    (1000, 5000, 96),
    (200, 288, 32),
    (130, 1000, 64),
    (64, 1, 32),
    (70, 4100, 64),
]


@int4_judge.by_dtype
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 17, 40, 64, 65, 200])
@pytest.mark.parametrize("n, k, group_size", INT4_SHAPES)
def test_int4_gemm(gemm, n, k, group_size, m, dtype):
    if gemm is _library.triton_kernels["int4_gemm"] and (
        m not in (1, 40, 200) or (n, k, group_size) in INT4_SHAPES[3:]
    ):
        pytest.skip("the interpreter ran these, and each compiles a kernel")
    scales = DTYPES[n % 3]
    int4_judge.check_case(m, n, k, group_size, dtype, symmetric=n % 8 == 0, scale_dtype=scales, bias=n % 3 > 0)


@int4_judge.by_dtype
@pytest.mark.parametrize("n, k, group_size", [(300, 8192, -1), (4096, 300, 32)])
def test_int4_gemm_of_many_rows(gemm, n, k, group_size, dtype):
    for m in (512, 1500):
        int4_judge.check_case(m, n, k, group_size, dtype)


@int4_judge.by_dtype
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_gemm_reads_every_weight(gemm, dtype, symmetric):
    batches = (1, 8, 16, 40, 1024)
    int4_judge.check_every_weight(dtype, 83, 135, 64, batches, symmetric)
    int4_judge.check_every_weight(dtype, 300, 2000, 96, batches[3:], symmetric)


@int4_judge.by_dtype
@pytest.mark.parametrize("n, k, group_size", [(200, 288, 32), (64, 600, 128), (19, 330, -1), (5000, 4096, 128)])
def test_int4_gemm_does_not_depend_on_the_batch(gemm, dtype, n, k, group_size):
    int4_judge.check_batches(dtype, n, k, group_size, (1, 5, 13, 16), rows=16)
    int4_judge.check_batches(dtype, n, k, group_size, (20, 40, 80, 160), rows=320)
    # Hopper multiplies more than 16 rows by other instructions (int4_gemm_sm90.cu).
    if gemm is _library.triton_kernels["int4_gemm"] or torch.cuda.get_device_capability() != (9, 0):
        int4_judge.check_batches(dtype, n, k, group_size, (3, 64), rows=320)


@int4_judge.by_dtype
@pytest.mark.parametrize("check", ["zero_points", "strides", "what_is_not_finite_stays_in_its_row"])
def test_int4_gemm_on_odd_input(gemm, dtype, check):
    getattr(int4_judge, f"check_{check}")(dtype)


def int4_weight(n, k, group_size=128):
    return int4_judge.random_weight(n, k, group_size, dtype=torch.bfloat16)[3].to("cuda")


@pytest.mark.parametrize("m", [1, 12, 40, 500])
def test_int4_gemm_in_a_cuda_graph(gemm, m):
    w = int4_weight(1000, 2048)
    x = torch.randn(m, 2048, dtype=torch.bfloat16, device="cuda")

    def step():
        return gemm(x * 1.0, w.packed, w.scales, w.zeros, group_size=128, n=1000)

    expect_no_wait(step)
    expect_same_when_replayed(step, x.normal_)


def test_int4_gemm_compiles_whole():
    w = int4_weight(300, 512)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: headstart.int4_gemm(x * 1.0, w), fullgraph=True, dynamic=True)
    for m in (2, 30, 700):
        x = torch.randn(m, 512, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(x), headstart.int4_gemm(x, w))


def test_int4_pack_and_unpack():
    codes = torch.randint(0, 16, (83, 135), dtype=torch.uint8, device="cuda")
    packed = torch.ops.headstart.int4_pack(codes)
    assert torch.equal(packed.cpu(), torch.ops.headstart.int4_pack(codes.cpu()))
    assert torch.equal(torch.ops.headstart.int4_unpack(packed, 83, 135), codes)

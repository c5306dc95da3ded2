"""The bitmap operators: bits and products wherever they run, and the contract. BitmapWeight: test_bitmap_weight.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import headstart
from backends import STEMS, expect_no_wait, expect_same_when_replayed, gpu_kernel, places
from headstart.ops.bitmap import BitmapWeight, bitmap_gemm
from headstart.reference import bitmap as reference
from judges import bitmap as judge
from judges.bitmap import DTYPES, by_dtype, by_value_dtype, random_bits, random_weight, same_bits, sparse

STEM = STEMS["bitmap"]
hs = torch.ops.headstart
by_values = pytest.mark.parametrize("values", ["same", "int8", "int4"])


# --- decompression ---------------------------------------------------------------------------------------------------

# N, K, density. Columns: whole chunks, rows of the mask that 16, 8, 4 and 1 bytes divide, one column.
SHAPES = (
    (1, 1, 0.5), (3, 7, 0.1), (2, 256, 0.9), (17, 1024, 0.9), (5, 577, 0.9), (33, 96, 0.1), (16, 320, 0.5),
    (4, 2304, 0.5), (37, 200, 0.5), (1, 33, 0.5), (19, 1, 0.5), (16, 512, 0.0), (5, 545, 0.7), (3, 1100, 1.0),
)  # fmt: skip
# More than 16 tiles of rows are not cut into segments in the lane model, which has one processor.
MANY_ROWS = ((290, 64, 0.9), (270, 530, 0.1))
LARGE = ((300, 5000, 0.1), (4, 20000, 0.5), (40000, 40, 0.5))


@by_value_dtype
@pytest.mark.parametrize("n, k, density", SHAPES)
def test_decompress_moves_bits(ops, n, k, density, dtype):
    stride = k + 5 if n % 2 else None
    judge.check_bits(ops.bitmap_decompress_out, n, k, density, dtype, offset=n % 4, stride=stride)
    if k == 320:  # aligned rows with room between them
        judge.check_bits(ops.bitmap_decompress_out, n, k, density, dtype, stride=384)


@places("reference", "cpu", "lanes", "cuda", "triton")
@by_value_dtype
@pytest.mark.parametrize("n, k, density", MANY_ROWS)
def test_decompress_moves_bits_of_many_rows(ops, n, k, density, dtype):
    judge.check_bits(ops.bitmap_decompress_out, n, k, density, dtype, offset=n % 4)


@places("cpu", "cuda", "triton")
@by_value_dtype
@pytest.mark.parametrize("n, k, density", LARGE)
def test_decompress_moves_bits_of_large_weights(ops, n, k, density, dtype):
    judge.check_bits(ops.bitmap_decompress_out, n, k, density, dtype)


@places("reference", "cpu", "interpreter", "cuda", "triton")
@by_value_dtype
def test_decompress_into_memory_of_its_own(ops, dtype):
    for n, k in ((1, 1), (17, 1024), (5, 577)):
        w = random_bits(n, k, 0.5, dtype)
        assert same_bits(ops.bitmap_decompress(*reference.compress(w), k), w)
    for values in ("int8", "int4") if dtype in DTYPES else ():
        w = random_weight(37, 577, 0.5, dtype, values, 128)
        got = ops.bitmap_decompress(w.values, w.bitmask, w.row_offsets, 577, scales=w.scales, group_size=128)
        assert same_bits(got, judge.truth(w, dtype))


@by_dtype
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("n, k, density", [(3, 7, 0.5), (17, 700, 0.5), (1, 33, 0.5), (16, 512, 0.0), (3, 1100, 1.0)])
def test_decompress_scales(ops, n, k, density, values, dtype):
    for group_size in (32, -1, (13, 8, 200)[n % 3]):
        judge.check_scaled(ops.bitmap_decompress_out, n, k, density, dtype, values, group_size, offset=n % 4)


@places("cpu", "lanes", "cuda", "triton")
@by_dtype
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("n, k, density", SHAPES[2:] + MANY_ROWS)
def test_decompress_scales_of_more_shapes(ops, n, k, density, values, dtype):
    for group_size in (32, -1, (13, 8, 200)[n % 3]):
        judge.check_scaled(ops.bitmap_decompress_out, n, k, density, dtype, values, group_size, offset=n % 4)


@places("cuda", "triton")
@by_dtype
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("n, k, density", LARGE[:2])
def test_decompress_scales_of_large_weights(ops, n, k, density, values, dtype):
    for group_size in (128, -1, (13, 8, 200)[n % 3]):
        judge.check_scaled(ops.bitmap_decompress_out, n, k, density, dtype, values, group_size, offset=n % 4)


@places("cpu", "lanes", "cuda")
@by_dtype
@pytest.mark.parametrize("values, group_size", [("int8", 545), ("int4", 64), ("int4", 13), ("int4", 1)])
def test_decompress_groups_of_every_size(ops, values, group_size, dtype):
    for n, k, density in SHAPES[-6:]:
        judge.check_scaled(ops.bitmap_decompress_out, n, k, density, dtype, values, group_size, offset=n % 3)


@places("cpu")
@by_value_dtype
def test_decompress_by_streaming_stores(ops, dtype):
    """Large enough for them, where the output is aligned and where it is not."""
    rows = 2**23 // (1024 * torch.empty(0, dtype=dtype).element_size()) + 3
    for k, offset in ((1024, 0), (1030, 1)):
        w = random_bits(rows, k, 0.4, dtype)
        out = torch.empty(rows * k + 64, dtype=dtype)
        skip = (-out.data_ptr() % 64) // out.element_size() + offset
        out = out[skip : skip + rows * k].view(rows, k)
        ops.bitmap_decompress_out(*reference.compress(w), k, out=out)
        assert same_bits(out, w)


@places("cpu", "interpreter", "lanes")
def test_decompress_past_two_to_the_31(ops):
    judge.check_far(ops.bitmap_decompress_out)


@by_dtype
@by_values
def test_decompress_rows_anywhere(ops, values, dtype):
    judge.check_slice(ops.bitmap_decompress_out, dtype, values)


@places("interpreter", "lanes", "cuda", "triton")
@by_dtype
@by_values
def test_decompress_damaged(ops, values, dtype):
    judge.check_damaged(ops.bitmap_decompress_out, dtype, values)


@by_values
def test_pad_bits_are_not_columns(ops, values):
    w = random_weight(20, 300, 0.5, torch.float32, values)
    bitmask = w.bitmask.clone()
    bitmask[:-1, -1] |= 0xF0
    padded = dataclasses.replace(w, bitmask=bitmask)
    assert torch.equal(*(judge.decompress(ops.bitmap_decompress_out, each) for each in (padded, w)))
    for m in (1, 9):
        x = torch.randn(m, 300)
        assert torch.equal(*(judge.gemm(ops.bitmap_gemm, x, each) for each in (padded, w)))


# --- the product -----------------------------------------------------------------------------------------------------

# M, N, K: one row, a tile of 8 rows, tiles of 32 (float32: 16), more of them than one.
CASES = (
    (1, 40, 288), (1, 17, 33), (8, 17, 33), (9, 33, 300), (17, 70, 130), (40, 100, 90), (99, 20, 70), (2, 16, 1),
)  # fmt: skip
MORE_CASES = (
    (1, 270, 520), (1, 16, 2304), (2, 64, 416), (9, 33, 1000), (13, 130, 257), (33, 100, 700), (40, 300, 290),
    (2, 96, 1), (20, 19, 330),
)  # fmt: skip


@by_dtype
@by_values
@pytest.mark.parametrize("m, n, k", CASES)
def test_gemm_against_float64(ops, m, n, k, values, dtype):
    check_gemm(ops, m, n, k, values, dtype)


@places("reference", "cpu", "lanes", "cuda", "triton")
@by_dtype
@by_values
@pytest.mark.parametrize("m, n, k", MORE_CASES)
def test_gemm_against_float64_in_more_cases(ops, m, n, k, values, dtype):
    if ops.kind == "triton" and m not in (1, 9, 40):
        pytest.skip("each number of rows compiles a kernel")
    check_gemm(ops, m, n, k, values, dtype)


def check_gemm(ops, m, n, k, values, dtype):
    scales = dtype if values == "same" or dtype == torch.float16 else DTYPES[(m + n) % 3]
    group_size, density = (32, -1, (13, 40)[m % 2])[n % 3], (0.2, 0.5, 0.8)[m % 3]
    judge.check_case(ops.bitmap_gemm, m, n, k, dtype, values, group_size, density, scales, bias=k % 2 == 0)


@places("cuda", "triton")
@by_dtype
@by_values
@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 32, 33, 64, 150])
@pytest.mark.parametrize("n, k", [(1024, 4096), (17, 33), (1000, 5000), (130, 1000), (64, 1)])
def test_gemm_with_large_weights(ops, n, k, m, values, dtype):
    if ops.kind == "triton" and m not in (1, 16, 64, 150):
        pytest.skip("each number of rows compiles a kernel")
    scales = dtype if values == "same" or dtype == torch.float16 else DTYPES[n % 3]
    group_size, density = (128, -1, 40)[n % 3], (0.2, 0.5, 0.8)[m % 3]
    judge.check_case(ops.bitmap_gemm, m, n, k, dtype, values, group_size, density, scales, bias=n % 2 == 0)


VALUES = [("same", 32, None), ("int8", 32, torch.float16), ("int8", -1, None), ("int4", 64, torch.bfloat16)]
VALUES += [("int4", 13, torch.float32), ("int8", 545, None), ("int4", 1, None)]
by_scales = pytest.mark.parametrize("values, group_size, scale_dtype", VALUES)


@places("reference", "cpu")
@by_dtype
@by_scales
@pytest.mark.parametrize(
    "n, k, density, rows",
    [
        (37, 200, 0.5, (1, 2, 3, 4, 5, 6, 7, 13, 70)),
        (1, 33, 0.5, (1, 9)),
        (19, 1, 0.5, (1, 3)),
        (16, 512, 0.0, (2, 8)),
        (5, 545, 0.7, (1, 4, 13)),
        (3, 1100, 1.0, (1, 2, 25)),
    ],
)
def test_gemm_of_every_size_of_a_tile(ops, n, k, density, rows, values, group_size, scale_dtype, dtype):
    w = random_weight(n, k, density, scale_dtype or dtype, values, group_size)
    w = dataclasses.replace(w, values=judge.surrounded(w.values, n % 3))
    for m in rows:
        x, bias = judge.rows_between_nan(m, k, dtype), torch.randn(n).to(dtype) if m % 2 else None
        judge.check(ops.bitmap_gemm, x, w, bias)


@places("reference", "cpu")
def test_gemm_of_any_shape(ops):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(
        batch=st.lists(st.integers(0, 4), max_size=2),
        n=st.integers(1, 30),
        k=st.integers(1, 100),
        values=st.sampled_from(["same", "int8", "int4"]),
        dtype=st.sampled_from(DTYPES),
    )
    def run(batch, n, k, values, dtype):
        w = BitmapWeight.compress(sparse(n, k, dtype=dtype), values, group_size=32)
        judge.check(ops.bitmap_gemm, torch.randn(*batch, k).to(dtype), w, torch.randn(n).to(dtype))

    run()


@by_dtype
@by_values
def test_gemm_reads_every_weight(ops, values, dtype):
    n, k, batches = {
        "reference": (37, 300, (60,)),
        "interpreter": (20, 150, (75,)),
        "lanes": (20, 300, (1, 75)),
    }.get(ops.kind, (37, 300, (1, 2, 3, 4, 8, 32, 60, 75)))
    whole_powers = ops.kind in ("reference", "cpu")
    judge.check_every_weight(ops.bitmap_gemm, dtype, n, k, batches, values, whole_powers)


@places("cuda", "triton")
@by_dtype
@by_values
def test_gemm_reads_every_weight_of_many(ops, values, dtype):
    judge.check_every_weight(ops.bitmap_gemm, dtype, 700, 2000, (8, 64, 1000), values)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@by_dtype
def test_gemm_on_odd_input(ops, dtype):
    for m in (1, 3, 8, 20):
        judge.check_what_is_not_finite(ops.bitmap_gemm, dtype, m)
    judge.check_strides(ops.bitmap_gemm, dtype)


@places("cpu")
@by_values
def test_gemm_with_a_slice_of_rows(ops, values):
    w = random_weight(40, 300, 0.5, torch.bfloat16, values)
    scales = None if w.scales is None else w.scales[3:30]
    offsets = w.row_offsets[3:31]
    part = dataclasses.replace(w, bitmask=w.bitmask[3:30], row_offsets=offsets, scales=scales, shape=(27, 300))
    for m in (1, 9):
        x = torch.randn(m, 300).bfloat16()
        assert torch.equal(judge.gemm(ops.bitmap_gemm, x, part), judge.gemm(ops.bitmap_gemm, x, w)[:, 3:30])


@places("cpu")
@by_dtype
@by_scales
def test_a_row_does_not_depend_on_the_batch_or_the_threads(ops, dtype, values, group_size, scale_dtype):
    w = random_weight(53, 1100, 0.5, scale_dtype or dtype, values, group_size)
    x, bias = torch.randn(270, 1100).to(dtype), torch.randn(53).to(dtype)

    def gemm(x):
        return judge.gemm(ops.bitmap_gemm, x, w, bias)

    whole = gemm(x)
    for m in (1, 2, 3, 4, 5, 6, 7, 9, 64):
        assert torch.equal(torch.cat([gemm(rows) for rows in x[:70].split(m)]), whole[:70]), m
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(gemm(x), whole) and torch.equal(gemm(x[:1]), whole[:1])
    finally:
        torch.set_num_threads(threads)


@places("reference", "cpu")
def test_empty_sizes(ops):
    bias = torch.randn(3)
    for values in ("same", "int8"):
        quantised = values != "same"
        w = BitmapWeight(
            torch.empty(0, dtype=torch.int8 if quantised else torch.float32),
            torch.empty(3, 0, dtype=torch.uint8),
            torch.zeros(4, dtype=torch.int64),
            (3, 0),
            torch.ones(3, 1) if quantised else None,
        )
        for m in (1, 9):
            assert torch.equal(judge.gemm(ops.bitmap_gemm, torch.empty(m, 0), w, bias), bias.expand(m, 3))
            assert not judge.gemm(ops.bitmap_gemm, torch.empty(m, 0), w).any()
        assert judge.decompress(ops.bitmap_decompress_out, w).shape == (3, 0)
    w = BitmapWeight(*reference.compress(torch.empty(0, 40)), (0, 40))
    assert judge.gemm(ops.bitmap_gemm, torch.randn(2, 40), w).shape == (2, 0)
    assert ops.bitmap_decompress(w.values, w.bitmask, w.row_offsets, 40).shape == (0, 40)
    w = BitmapWeight(*reference.compress(torch.ones(5, 40)), (5, 40))
    assert judge.gemm(ops.bitmap_gemm, torch.randn(2, 0, 40), w).shape == (2, 0, 5)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def weight_on_the_gpu(n: int, k: int, values: str = "same") -> BitmapWeight:
    return random_weight(n, k, 0.5, torch.bfloat16, values, 128).to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cuda", "triton"])
@pytest.mark.parametrize("m", [1, 12, 60, 500])
def test_in_a_cuda_graph(gpu, kind, m):
    decompress, gemm = (gpu_kernel(name, kind) for name in ("bitmap_decompress.out", "bitmap_gemm"))
    w = weight_on_the_gpu(1000, 2048)
    x = torch.randn(m, 2048, dtype=torch.bfloat16, device="cuda")
    given = w.values, w.bitmask, w.row_offsets
    dense = torch.empty(1000, 2048, dtype=torch.bfloat16, device="cuda")

    def step():
        decompress(*given, 2048, out=dense)
        return gemm(x * 1.0, *given, cols=2048), dense + 0.0

    def change():
        x.normal_()
        w.values.normal_()

    expect_no_wait(step)
    expect_same_when_replayed(step, change)


@pytest.mark.gpu
def test_compiles_whole_on_a_gpu(gpu):
    w = weight_on_the_gpu(300, 512, "int8")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: headstart.bitmap_gemm(x * 1.0, w), fullgraph=True, dynamic=True)
    for m in (2, 30, 700):
        x = torch.randn(m, 512, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(x), headstart.bitmap_gemm(x, w))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cuda", "triton"])
def test_past_two_to_the_31_on_a_gpu(gpu, kind):
    decompress, gemm = (gpu_kernel(name, kind) for name in ("bitmap_decompress.out", "bitmap_gemm"))
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    # Full rows, so that the values, too, are more than 2^31; rows repeat every 61, which no power of two does.
    n, k = 2**15 + 16, 2**16
    few = torch.randint(1, 256, (61, k), dtype=torch.uint8, device="cuda").view(torch.int8)
    values = few.repeat(-(-n // 61), 1)[:n].flatten()
    bitmask = torch.full((n, k // 8), 255, dtype=torch.uint8, device="cuda")
    offsets = torch.arange(n + 1, device="cuda") * k
    out = torch.zeros(n, k, dtype=torch.int8, device="cuda")
    decompress(values, bitmask, offsets, k, out=out)
    assert torch.equal(out.flatten(), values)
    del out
    scales = torch.ones(n, 1, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(1, k, dtype=torch.bfloat16, device="cuda")
    x[0, -1] = 1
    got = gemm(x, values, bitmask, offsets, cols=k, scales=scales)
    assert torch.equal(got[0], values.view(n, k)[:, -1].bfloat16())


# --- compression -----------------------------------------------------------------------------------------------------


@by_value_dtype
def test_compress(cpu_tier, dtype):
    for n, k, density in (*SHAPES[-6:], (0, 40, 1), (4, 0, 1), (2, 70000, 0.1)):
        w = random_bits(n, k, density, dtype) if n and k else torch.empty(n, k, dtype=dtype)
        want = reference.compress(w)
        for view in (w, torch.cat([w, w], 1)[:, k:], w.T.contiguous().T):
            got = hs.bitmap_compress(view)
            assert all(same_bits(a, b) if a.dtype == dtype else torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.gpu
def test_compress_on_a_gpu(gpu):
    w = random_bits(83, 135, 0.5, torch.bfloat16)
    for a, b in zip(hs.bitmap_compress(w.cuda()), reference.compress(w)):
        assert same_bits(a.cpu(), b) if b.is_floating_point() else torch.equal(a.cpu(), b)


# --- the contract ----------------------------------------------------------------------------------------------------


def tensors_of(w):
    return w.values, w.bitmask, w.row_offsets, w.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(dtype, permuted):
    dense = sparse(11, 30, dtype=dtype)
    w, x = BitmapWeight.compress(dense), torch.randn(2, 3, 30).to(dtype)
    if permuted:
        dense, x = dense.T, x.transpose(0, 1)
    torch.library.opcheck(hs.bitmap_gemm.default, (x, *tensors_of(w)[:3], torch.ones(11).to(dtype)), dict(cols=30))
    if dtype != torch.float32:
        return
    torch.library.opcheck(hs.bitmap_compress.default, (dense,))
    torch.library.opcheck(hs.bitmap_decompress.default, tensors_of(w))
    out = torch.empty(30, 11).T.contiguous() if permuted else torch.empty(11, 40)[:, :30]
    torch.library.opcheck(hs.bitmap_decompress.out, tensors_of(w), dict(out=out))
    q = BitmapWeight.compress(sparse(11, 30), "int4", 16)
    scaled = dict(scales=q.scales, group_size=16)
    torch.library.opcheck(hs.bitmap_decompress.default, tensors_of(q), scaled)
    torch.library.opcheck(hs.bitmap_gemm.default, (x, *tensors_of(q)[:3]), dict(cols=30, **scaled))


def test_compile_dynamic():
    def run(x, values, bitmask, row_offsets, out):
        hs.bitmap_decompress.out(values, bitmask, row_offsets, x.shape[-1], out=out)
        return hs.bitmap_gemm(x, values, bitmask, row_offsets, cols=x.shape[-1]) + x @ out.T

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, k in ((9, 20), (17, 50)):
        w, x = BitmapWeight.compress(sparse(n, k)), torch.randn(3, k)
        outs = torch.full((n, k), torch.nan), torch.full((n, k), torch.nan)
        got, want = (f(x, *tensors_of(w)[:3], out) for f, out in zip((compiled, run), outs, strict=True))
        torch.testing.assert_close(got, want)
        assert torch.equal(outs[0], sparse(n, k))
    torch.compile(lambda x: bitmap_gemm(x, w), fullgraph=True, backend="aot_eager")(x)


def test_compress_traces_with_a_size_from_data():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(hs.bitmap_compress, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (3, 8):
            w = sparse(n, 20)
            assert all(torch.equal(a, b) for a, b in zip(compiled(w), hs.bitmap_compress(w), strict=True))


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        (dict(x=torch.randn(2, 29)), "x"),
        (dict(x=torch.randn(30, 2).T), "x"),
        (dict(x=torch.randn(2, 30).half()), "values"),
        (dict(values=torch.randn(1000, 1)), "values"),
        (dict(values=torch.randn(10)), "row_offsets"),
        (dict(values=torch.randn(1000, device="meta")), "values"),
        (dict(bitmask=torch.zeros(11, 3, dtype=torch.uint8)), "bitmask"),
        (dict(bitmask=torch.zeros(4, 11, dtype=torch.uint8).T), "bitmask"),
        (dict(row_offsets=torch.zeros(11, dtype=torch.int64)), "row_offsets"),
        (dict(row_offsets=torch.zeros(12, dtype=torch.int32)), "row_offsets"),
        (dict(row_offsets=torch.full((12,), -1)), "row_offsets"),
        (dict(row_offsets=torch.full((12,), 2**62)), "row_offsets"),
        (dict(row_offsets=torch.full((12,), 165)), "row_offsets"),
        (dict(bias=torch.ones(12)), "bias"),
        (dict(cols=31), "x"),
        (dict(scales=torch.ones(11, 1)), "values"),
        (dict(scales=torch.ones(11, 2), values=torch.ones(1000, dtype=torch.int8)), "scales"),
        (dict(scales=torch.ones(11, 2), values=torch.ones(1000, dtype=torch.int8), group_size=0), "group_size"),
    ],
)
def test_bad_input_names_the_argument(change, argument):
    values, bitmask, row_offsets, cols = tensors_of(BitmapWeight.compress(sparse(11, 30)))
    args = dict(x=torch.randn(2, 30), values=values, bitmask=bitmask, row_offsets=row_offsets, bias=None, cols=cols)
    said = f"bitmap_gemm: {argument}: expected .*, got "
    with pytest.raises((ValueError, RuntimeError), match=said) as compiled:
        hs.bitmap_gemm(**(args | change))
    with pytest.raises(ValueError, match=said) as by_reference:
        hs.bitmap_gemm.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, **(args | change))
    assert str(compiled.value).splitlines()[0] == str(by_reference.value)

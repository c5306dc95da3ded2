"""Bitmap weights: bits against numpy's packbits, values compared as integers, the format, damage, and the product."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitmap_judge as judge
import sparse_bitmask_fixture
from headstart.ops.bitmap import VALUE_DTYPES, BitmapWeight, bitmap_gemm
from headstart.reference import bitmap as reference
from tolerances import assert_close

ops = torch.ops.headstart
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def bits(x):
    return x.view(INTEGER[x.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def sparse(n, k, density=0.5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    return w.masked_fill(torch.rand(n, k, generator=generator) >= density, 0).to(dtype)


def tensors_of(w):
    return w.values, w.bitmask, w.row_offsets, w.shape[1]


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 12),
    k=st.integers(0, 80),
    density=st.sampled_from([0, 0.1, 0.5, 1]),
    dtype=st.sampled_from(VALUE_DTYPES),
    seed=st.integers(0, 99),
)
def test_round_trip_and_numpy(n, k, density, dtype, seed):
    # Random bit patterns: NaN payloads, subnormals, infinities and -0.0 among them.
    size = torch.empty(0, dtype=dtype).element_size()
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n, k * size), dtype=np.uint8).view(f"i{size}") * (rng.random((n, k)) < density)
    w = torch.from_numpy(np.ascontiguousarray(raw, dtype=f"i{size}")).view(dtype)
    values, bitmask, row_offsets = ops.bitmap_compress(w)
    packed = np.packbits(raw != 0, axis=-1, bitorder="little").reshape(n, -(-k // 8))
    assert np.array_equal(bitmask.numpy(), packed)
    assert row_offsets.tolist() == [0, *np.cumsum((raw != 0).sum(1)).tolist()]
    assert same_bits(values, torch.from_numpy(raw[raw != 0].astype(f"i{size}")).view(dtype))
    out = torch.full((n, k + 3), 1.0).to(dtype)[:, :k]  # strided rows, poisoned
    ops.bitmap_decompress.out(values, bitmask, row_offsets, k, out=out)
    assert same_bits(ops.bitmap_decompress(values, bitmask, row_offsets, k), w) and same_bits(out, w)
    BitmapWeight(values, bitmask, row_offsets, (n, k)).validate()


def test_negative_zero_and_nan_are_kept():
    w = torch.tensor([[0.0, -0.0, torch.nan, 1e-45, -torch.inf]])
    compressed = BitmapWeight.compress(w)
    assert len(compressed.values) == 4 and same_bits(compressed.decompress(), w)
    assert len(BitmapWeight.compress(w + 0.0).values) == 3


def test_permuted_input_and_many_chunks():
    w = sparse(70, 33).T
    whole = BitmapWeight.compress(w)
    assert same_bits(whole.decompress(), w.contiguous())
    # The reference walks rows in chunks of 2^22 elements; a wide weight takes several.
    wide = sparse(5, 2**20 + 5, 0.01)
    assert same_bits(BitmapWeight.compress(wide).decompress(), wide)


def test_rows_are_addressable():
    w = sparse(20, 45)
    c = BitmapWeight.compress(w)
    assert same_bits(ops.bitmap_decompress(c.values, c.bitmask[7:12], c.row_offsets[7:13], 45), w[7:12])
    q = BitmapWeight.compress(w, "int4", 16)
    part = ops.bitmap_decompress(
        q.values, q.bitmask[7:12], q.row_offsets[7:13], 45, scales=q.scales[7:12], group_size=16
    )
    assert same_bits(part, q.decompress()[7:12])


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 80),
    group_size=st.sampled_from([8, 13, 32, -1]),
    values=st.sampled_from(["int8", "int4"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_quantised_values(n, k, group_size, values, dtype, seed):
    w = sparse(n, k, dtype=dtype, seed=seed)
    c = BitmapWeight.compress(w, values, group_size).validate()
    dense = c.decompress()
    assert c.dtype == dtype and dense.dtype == dtype and c.nbytes > 0
    assert not dense[w == 0].any()
    # Half a step where nothing is clipped; the search may clip to half the range to lower the squared error.
    size = k if group_size == -1 else group_size
    levels = 127 if values == "int8" else 7
    for g in range(0, k, size):
        part, got = w[:, g : g + size].float(), dense[:, g : g + size].float()
        step = part.abs().amax(1, keepdim=True) / levels
        plain = (part - (part / step.clamp(min=1e-9)).round() * step).square().sum(1)
        rounding = (torch.finfo(dtype).eps * part).square().sum(1)
        assert ((got - part).square().sum(1) <= 1.01 * plain + 40 * rounding + 1e-9).all()


def test_sizes():
    """At 50 %: 9 bits an element in bf16, 5 in int8, 3 in int4, and offsets and scales besides."""
    w = sparse(64, 4096, dtype=torch.bfloat16)
    for values, want in (("same", 9), ("int8", 5), ("int4", 3)):
        c = BitmapWeight.compress(w, values, group_size=-1)
        payload = 8 * (c.values.nbytes + c.bitmask.nbytes) / w.numel()
        assert payload <= want + 0.05 and c.nbytes - c.values.nbytes - c.bitmask.nbytes <= 8 * 65 + 2 * 64


@pytest.mark.parametrize(("values", "group_size"), [("same", 128), ("int8", 32), ("int4", 13), ("int4", -1)])
@judge.by_dtype
def test_size_is_known_beforehand(dtype, values, group_size):
    for density in (0, 0.3, 1):
        w = sparse(33, 201, density, dtype)
        w[0, :7] = -0.0
        known, c = BitmapWeight.size(w, values, group_size), BitmapWeight.compress(w, values, group_size)
        dropped = 0 if values == "same" else int(w.count_nonzero()) - int(c.row_offsets[-1])
        assert dropped >= 0 and known - c.nbytes in (
            {"same": [0], "int8": [dropped]}.get(values) or [dropped // 2, -(-dropped // 2)]
        )
    full = sparse(64, 512, 1, dtype)
    assert BitmapWeight.size(full) > full.nbytes > BitmapWeight.size(sparse(64, 512, 0.5, dtype))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.lists(st.integers(0, 4), max_size=2),
    n=st.integers(1, 30),
    k=st.integers(1, 100),
    values=st.sampled_from(["same", "int8", "int4"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_gemm_against_float64(batch, n, k, values, dtype):
    w = BitmapWeight.compress(sparse(n, k, dtype=dtype), values, group_size=32)
    x, bias = torch.randn(*batch, k).to(dtype), torch.randn(n).to(dtype)
    out, true = bitmap_gemm(x, w, bias), judge.exact(w)
    assert out.dtype == dtype and out.shape == (*batch, n)
    by_torch = torch.nn.functional.linear(x, w.decompress(), bias)
    assert_close(out, x.double() @ true.T + bias.double(), by_torch)


# --- the CPU kernels, in every tier ---------------------------------------------------------------------------------

# N, K, density, and rows of x
SIZES = [
    (37, 200, 0.5, (1, 2, 3, 4, 5, 6, 7, 13, 70)),
    (1, 33, 0.5, (1, 9)),
    (19, 1, 0.5, (1, 3)),
    (16, 512, 0.0, (2, 8)),
    (5, 545, 0.7, (1, 4, 13)),
    (3, 1100, 1.0, (1, 2, 25)),
]
VALUES = [("same", 32, None), ("int8", 32, torch.float16), ("int8", -1, None), ("int4", 64, torch.bfloat16)]
VALUES += [("int4", 13, torch.float32), ("int8", 545, None), ("int4", 1, None)]


@judge.by_value_dtype
def test_kernels_compress(cpu_tier, dtype):
    for n, k, density in (*(size[:3] for size in SIZES), (0, 40, 1), (4, 0, 1), (2, 70000, 0.1)):
        w = judge.random_bits(n, k, density, dtype) if n and k else torch.empty(n, k, dtype=dtype)
        want = reference.compress(w)
        for view in (w, torch.cat([w, w], 1)[:, k:], w.T.contiguous().T):
            got = ops.bitmap_compress(view)
            assert all(same_bits(a, b) if a.dtype == dtype else torch.equal(a, b) for a, b in zip(got, want))


@judge.by_value_dtype
def test_kernels_decompress(cpu_tier, dtype):
    for n, k, density, _ in SIZES:
        judge.check_bits(n, k, density, dtype, offset=n % 3, stride=k + n % 2 * 5)
    # Large enough for streaming stores, where the output is aligned and where it is not.
    rows = 2**23 // (1024 * torch.empty(0, dtype=dtype).element_size()) + 3
    for k, offset in ((1024, 0), (1030, 1)):
        w = judge.random_bits(rows, k, 0.4, dtype)
        c = BitmapWeight(*reference.compress(w), (rows, k))
        out = torch.empty(rows * k + 64, dtype=dtype)
        skip = (-out.data_ptr() % 64) // out.element_size() + offset
        out = out[skip : skip + rows * k].view(rows, k)
        assert same_bits(c.decompress(out), w)


@judge.by_dtype
@pytest.mark.parametrize(("values", "group_size", "scale_dtype"), VALUES[1:])
def test_kernels_decompress_scaled(cpu_tier, dtype, values, group_size, scale_dtype):
    for n, k, density, _ in SIZES:
        judge.check_scaled(n, k, density, scale_dtype or dtype, values, group_size, offset=n % 3)


@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_kernels_take_slices_of_rows(cpu_tier, values):
    judge.check_slice(torch.float32, values)
    w = judge.random_weight(40, 300, 0.5, torch.bfloat16, values)
    scales = None if w.scales is None else w.scales[3:30]
    offsets = w.row_offsets[3:31]
    part = dataclasses.replace(w, bitmask=w.bitmask[3:30], row_offsets=offsets, scales=scales, shape=(27, 300))
    for m in (1, 9):
        x = torch.randn(m, 300).bfloat16()
        assert torch.equal(bitmap_gemm(x, part), bitmap_gemm(x, w)[:, 3:30])


@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_pad_bits_are_not_columns(cpu_tier, values):
    w = judge.random_weight(20, 300, 0.5, torch.float32, values)
    padded = w.bitmask.clone()
    padded[:-1, -1] |= 0xF0
    padded = dataclasses.replace(w, bitmask=padded)
    assert torch.equal(padded.decompress(), w.decompress())
    for m in (1, 9):
        x = torch.randn(m, 300)
        assert torch.equal(bitmap_gemm(x, padded), bitmap_gemm(x, w))


@judge.by_dtype
@pytest.mark.parametrize(("values", "group_size", "scale_dtype"), VALUES)
def test_kernels_multiply(cpu_tier, dtype, values, group_size, scale_dtype):
    for n, k, density, rows in SIZES:
        w = judge.random_weight(n, k, density, scale_dtype or dtype, values, group_size)
        w = dataclasses.replace(w, values=judge.surrounded(w.values, n % 3))
        for m in rows:
            x, bias = judge.rows_between_nan(m, k, dtype), torch.randn(n).to(dtype) if m % 2 else None
            trash = [torch.full((m, n), torch.nan, dtype=d) for d in (dtype, torch.float32)]
            del trash  # what the kernel is likely to be given for its output
            judge.check(x, w, bias)


@judge.by_dtype
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_kernels_read_every_weight(cpu_tier, dtype, values):
    """Scales that are powers of two, so that no product is rounded."""
    w = judge.random_weight(37, 300, 0.5, dtype, values)
    if w.scales is not None:
        w = dataclasses.replace(w, scales=(2.0 ** torch.randint(-3, 4, w.scales.shape)).to(dtype))
    want, picks = w.decompress(), torch.eye(300, dtype=dtype)
    for batch in (1, 2, 3, 4, 60):
        assert torch.equal(torch.cat([bitmap_gemm(x, w) for x in picks.split(batch)]).T, want)


@judge.by_dtype
@pytest.mark.parametrize(("values", "group_size", "scale_dtype"), VALUES)
def test_a_row_does_not_depend_on_the_batch_or_the_threads(cpu_tier, dtype, values, group_size, scale_dtype):
    w = judge.random_weight(53, 1100, 0.5, scale_dtype or dtype, values, group_size)
    x, bias = torch.randn(270, 1100).to(dtype), torch.randn(53).to(dtype)
    whole = bitmap_gemm(x, w, bias)
    for m in (1, 2, 3, 4, 5, 6, 7, 9, 64):
        assert torch.equal(torch.cat([bitmap_gemm(part, w, bias) for part in x[:70].split(m)]), whole[:70]), m
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(bitmap_gemm(x, w, bias), whole)
            assert torch.equal(bitmap_gemm(x[:1], w, bias), whole[:1])
    finally:
        torch.set_num_threads(threads)


@judge.by_dtype
def test_strides_and_what_is_not_finite(cpu_tier, dtype):
    judge.check_strides(dtype)
    for m in (1, 3, 8):
        judge.check_what_is_not_finite(dtype, m)


def test_empty_sizes(cpu_tier):
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
            assert torch.equal(bitmap_gemm(torch.empty(m, 0), w, bias), bias.expand(m, 3))
            assert not bitmap_gemm(torch.empty(m, 0), w).any()
        assert w.decompress().shape == (3, 0)
    w = BitmapWeight.compress(torch.empty(0, 40))
    assert bitmap_gemm(torch.randn(2, 40), w).shape == (2, 0) and w.decompress().shape == (0, 40)
    assert bitmap_gemm(torch.randn(2, 0, 40), BitmapWeight.compress(torch.ones(5, 40))).shape == (2, 0, 5)


# --- compressed-tensors ---------------------------------------------------------------------------------------------


def without_negative_zeros(w):
    """The library's mask is ``w != 0``, which leaves -0.0 out."""
    return torch.where(w == 0, torch.zeros_like(w), w)


def same_tensors(got, want):
    return got.keys() == want.keys() and all(
        got[name].shape == want[name].shape
        and (same_bits if want[name].dtype.is_floating_point else torch.equal)(got[name], want[name])
        for name in want
    )


@pytest.mark.parametrize("name", list(sparse_bitmask_fixture.dense_tensors()))
def test_the_library_s_own_bytes(name):
    """Against a file that compressed-tensors 0.14.0.1 made (sparse_bitmask_fixture.py)."""
    w = sparse_bitmask_fixture.dense_tensors()[name]
    stored = sparse_bitmask_fixture.stored(name)
    assert same_tensors(BitmapWeight.compress(without_negative_zeros(w)).to_compressed_tensors(), stored)
    assert same_bits(BitmapWeight.from_compressed_tensors(stored).decompress(), without_negative_zeros(w))


@pytest.mark.skipif(not sparse_bitmask_fixture.library_installed(), reason="needs compressed-tensors 0.14.0.1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_against_the_library(dtype):
    for n, k, density in ((1, 1, 1), (1, 100, 0.5), (70, 1, 0.5), (33, 77, 0.0), (33, 77, 1.0), (64, 4099, 0.3)):
        w = without_negative_zeros(judge.random_bits(n, k, density, dtype))
        stored = sparse_bitmask_fixture.compress(w)
        assert same_tensors(BitmapWeight.compress(w).to_compressed_tensors(), stored)
        assert same_bits(BitmapWeight.from_compressed_tensors(stored).decompress(), w)
        assert same_bits(sparse_bitmask_fixture.decompress(BitmapWeight.compress(w).to_compressed_tensors()), w)


@pytest.mark.parametrize("prefix", ["", "model.layers.0.mlp.up_proj.", "model.layers.0.mlp.up_proj.weight."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors(prefix, dtype):
    w = sparse(9, 21, dtype=dtype)
    w[4] = 0
    mask = w != 0
    stored = {
        "compressed": w[mask],
        "bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")),
        "shape": torch.tensor([9, 21]),
        "row_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)[:-1]]),
    }
    c = BitmapWeight.from_compressed_tensors({prefix + name: x for name, x in stored.items()})
    assert same_bits(c.decompress(), w)
    written = c.to_compressed_tensors()
    assert written.keys() == stored.keys() and all(torch.equal(written[name], stored[name]) for name in stored)


def damage(field, change):
    def apply(tensors):
        tensors[field] = change(tensors[field].clone())

    return field, apply


@pytest.mark.parametrize(
    ("field", "apply"),
    [
        damage("compressed", lambda x: x[:-1]),
        damage("compressed", lambda x: x.double()),
        damage("bitmask", lambda x: x.index_fill_(0, torch.tensor([2]), 0)),
        damage("bitmask", lambda x: x[:, :-1]),
        damage("bitmask", lambda x: x | (torch.arange(3) == 2) * torch.tensor(128, dtype=torch.uint8)),
        damage("row_offsets", lambda x: x.flip(0)),
        damage("row_offsets", lambda x: x + 1),
        damage("row_offsets", lambda x: x * 0),
        damage("row_offsets", lambda x: x.int()),
        damage("shape", lambda x: x[:1]),
        damage("shape", lambda x: -x),
    ],
)
def test_damaged_files_name_the_field(field, apply):
    tensors = BitmapWeight.compress(sparse(6, 21)).to_compressed_tensors()
    apply(tensors)
    # A count that disagrees may be the fault of any of the three; the first that shows it is named.
    named = {"compressed": "compressed|bitmask|row_offsets", "row_offsets": "row_offsets|bitmask"}.get(field, field)
    with pytest.raises(ValueError, match=f"from_compressed_tensors: ({named}): expected .*, got "):
        BitmapWeight.from_compressed_tensors(tensors)
    with pytest.raises(ValueError, match=f"from_compressed_tensors: {field}: expected a tensor of that name"):
        BitmapWeight.from_compressed_tensors({name: x for name, x in tensors.items() if name != field})


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(dtype, permuted):
    dense = sparse(11, 30, dtype=dtype)
    w, x = BitmapWeight.compress(dense), torch.randn(2, 3, 30).to(dtype)
    if permuted:
        dense, x = dense.T, x.transpose(0, 1)
    torch.library.opcheck(ops.bitmap_gemm.default, (x, *tensors_of(w)[:3], torch.ones(11).to(dtype)), dict(cols=30))
    if dtype != torch.float32:
        return
    torch.library.opcheck(ops.bitmap_compress.default, (dense,))
    torch.library.opcheck(ops.bitmap_decompress.default, tensors_of(w))
    out = torch.empty(30, 11).T.contiguous() if permuted else torch.empty(11, 40)[:, :30]
    torch.library.opcheck(ops.bitmap_decompress.out, tensors_of(w), dict(out=out))
    q = BitmapWeight.compress(sparse(11, 30), "int4", 16)
    scaled = dict(scales=q.scales, group_size=16)
    torch.library.opcheck(ops.bitmap_decompress.default, tensors_of(q), scaled)
    torch.library.opcheck(ops.bitmap_gemm.default, (x, *tensors_of(q)[:3]), dict(cols=30, **scaled))


def test_compile_dynamic():
    def run(x, values, bitmask, row_offsets, out):
        ops.bitmap_decompress.out(values, bitmask, row_offsets, x.shape[-1], out=out)
        return ops.bitmap_gemm(x, values, bitmask, row_offsets, cols=x.shape[-1]) + x @ out.T

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
        compiled = torch.compile(ops.bitmap_compress, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (3, 8):
            w = sparse(n, 20)
            assert all(torch.equal(a, b) for a, b in zip(compiled(w), ops.bitmap_compress(w), strict=True))


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
        ops.bitmap_gemm(**(args | change))
    with pytest.raises(ValueError, match=said) as by_reference:
        ops.bitmap_gemm.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, **(args | change))
    assert str(compiled.value).splitlines()[0] == str(by_reference.value)


def test_other_errors():
    w = BitmapWeight.compress(sparse(6, 21))

    def fails(message, function, *args, **kwargs):
        with pytest.raises((ValueError, RuntimeError), match=message):
            function(*args, **kwargs)

    fails(
        "compress: values: expected 'same', 'int8' or 'int4', got 'int2'", BitmapWeight.compress, sparse(2, 2), "int2"
    )
    fails("compress: w: expected float32 or", BitmapWeight.compress, torch.ones(2, 2).double())
    fails("compress: w: expected finite", BitmapWeight.compress, torch.full((2, 2), torch.nan), "int8")
    fails("bitmap_decompress: out: expected float32", w.decompress, torch.empty(6, 21).half())
    fails("bitmap_decompress: out: expected a contiguous last", w.decompress, torch.empty(21, 6).T)
    fails("bitmap_compress: w: expected", ops.bitmap_compress, torch.ones(3))
    fails("bitmap_gemm: weight: expected a BitmapWeight", bitmap_gemm, torch.ones(1, 21), w.values)
    fails("scales: expected None", BitmapWeight.compress(sparse(2, 8), "int8").to_compressed_tensors)
    fails("BitmapWeight: bitmask: expected 7 rows", BitmapWeight, w.values, w.bitmask, w.row_offsets, (7, 21))

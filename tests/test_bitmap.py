"""Bitmap weights: bits against numpy's packbits, values compared as integers, the format, damage, and the product."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.ops.bitmap import VALUE_DTYPES, BitmapWeight, bitmap_gemm
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


def exact(w):
    """The weight in float64: value times scale, not rounded."""
    if w.scales is None:
        return w.decompress().double()
    one = dataclasses.replace(w, scales=torch.ones_like(w.scales, dtype=torch.float32))
    group = w.shape[1] if w.group_size == -1 else w.group_size
    return one.decompress().double() * w.scales.double().repeat_interleave(group, 1)[:, : w.shape[1]]


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
    out, true = bitmap_gemm(x, w, bias), exact(w)
    assert out.dtype == dtype and out.shape == (*batch, n)
    by_torch = torch.nn.functional.linear(x, w.decompress(), bias)
    assert_close(out, x.double() @ true.T + bias.double(), by_torch)


# --- compressed-tensors ---------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=f"bitmap_gemm: {argument}: expected .*, got "):
        ops.bitmap_gemm(**(args | change))


def test_other_errors():
    w = BitmapWeight.compress(sparse(6, 21))

    def fails(message, function, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
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

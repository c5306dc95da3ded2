"""BitmapWeight: the layout, quantised values, sizes, and the format of compressed-tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparse_bitmask_fixture
from headstart.ops.bitmap import VALUE_DTYPES, BitmapWeight, bitmap_gemm
from judges.bitmap import DTYPES, by_dtype, random_bits, same_bits, sparse

ops = torch.ops.headstart


# --- the layout ------------------------------------------------------------------------------------------------------


def test_round_trip_and_numpy():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(
        n=st.integers(0, 12),
        k=st.integers(0, 80),
        density=st.sampled_from([0, 0.1, 0.5, 1]),
        dtype=st.sampled_from(VALUE_DTYPES),
        seed=st.integers(0, 99),
    )
    def run(n, k, density, dtype, seed):
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

    run()


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


# --- quantised values, and sizes -------------------------------------------------------------------------------------


def test_quantised_values():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(
        n=st.integers(1, 12),
        k=st.integers(1, 80),
        group_size=st.sampled_from([8, 13, 32, -1]),
        values=st.sampled_from(["int8", "int4"]),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 99),
    )
    def run(n, k, group_size, values, dtype, seed):
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

    run()


def test_sizes():
    """At 50 %: 9 bits an element in bf16, 5 in int8, 3 in int4, and offsets and scales besides."""
    w = sparse(64, 4096, dtype=torch.bfloat16)
    for values, want in (("same", 9), ("int8", 5), ("int4", 3)):
        c = BitmapWeight.compress(w, values, group_size=-1)
        payload = 8 * (c.values.nbytes + c.bitmask.nbytes) / w.numel()
        assert payload <= want + 0.05 and c.nbytes - c.values.nbytes - c.bitmask.nbytes <= 8 * 65 + 2 * 64


@pytest.mark.parametrize(("values", "group_size"), [("same", 128), ("int8", 32), ("int4", 13), ("int4", -1)])
@by_dtype
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
@by_dtype
def test_against_the_library(dtype):
    for n, k, density in ((1, 1, 1), (1, 100, 0.5), (70, 1, 0.5), (33, 77, 0.0), (33, 77, 1.0), (64, 4099, 0.3)):
        w = without_negative_zeros(random_bits(n, k, density, dtype))
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

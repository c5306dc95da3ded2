"""`BitmapLinear`: it computes what torch.nn.Linear computes with the decompressed weight, and behaves like one."""

import copy
import pickle

import pytest
import torch

import headstart
from headstart import BitmapLinear, BitmapWeight, Int4Linear
from tolerances import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["same", "int8", "int4"]


def make(n=40, k=100, values="same", group_size=32, bias=True, dtype=torch.float32):
    """A layer of half-empty rows, one empty and one full, and its weight and bias in float64."""
    w = torch.randn(n, k) * (torch.rand(n, k) < 0.5)
    w[0], w[-1] = 0, torch.rand(k) + 0.5
    linear = torch.nn.Linear(k, n, bias=bias).to(dtype)
    linear.weight.data = w.to(dtype)
    layer = BitmapLinear.from_linear(linear, values, group_size)
    true = layer.weight_bitmap.decompress().double()
    assert values != "same" or torch.equal(true, w.to(dtype).double())
    return layer, true, linear.bias.detach().double() if bias else 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_linear_layer(dtype, values, bias):
    layer, weight, b = make(values=values, bias=bias, dtype=dtype)
    for shape in ((1, 100), (2, 3, 100), (100,), (0, 100), (70, 100)):
        x = torch.randn(shape).to(dtype)
        out = layer(x)
        assert out.dtype == dtype and out.shape == (*shape[:-1], 40) and not out.requires_grad
        by_torch = torch.nn.functional.linear(x, weight.to(dtype), b.to(dtype) if bias else None)
        assert_close(out, x.double() @ weight.T + b, by_torch, "out")


@pytest.mark.parametrize("values", KINDS)
def test_weight_and_state_dict_come_back(values):
    layer, weight, _ = make(values=values)
    names = {"values", "bitmask", "row_offsets", "bias"} | ({"scales"} if values != "same" else set())
    state = layer.state_dict()
    assert state.keys() == names == dict(layer.named_parameters()).keys() and not list(layer.buffers())
    assert state["bitmask"].shape[0] == 40 and state["row_offsets"].shape == (41,)
    assert not any(p.requires_grad for p in layer.parameters())
    empty = BitmapLinear(100, 40, layer.nnz, values=values, group_size=layer.group_size)
    x = torch.randn(4, 100)
    assert not empty(x).any()
    empty.load_state_dict(state)
    assert torch.equal(empty(x), layer(x)) and empty.options() == layer.options()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.values.data_ptr() != layer.values.data_ptr()
    layer.check("here")
    torch.testing.assert_close(layer.weight_bitmap.decompress().double(), weight, rtol=0, atol=0)


@pytest.mark.parametrize("values", KINDS)
def test_from_linear_keeps_or_rounds_as_the_weight_does(values):
    linear = torch.nn.Linear(96, 10)
    layer = BitmapLinear.from_linear(linear, values, 32)
    want = BitmapWeight.compress(linear.weight.detach(), values, 32)
    assert torch.equal(layer.weight_bitmap.decompress(), want.decompress())
    assert torch.equal(layer.bias, linear.bias) and layer.bias.data_ptr() != linear.bias.data_ptr()
    assert layer.nnz == int(want.row_offsets[-1]) and layer.weight_bitmap.nbytes == want.nbytes


def test_takes_any_strides():
    layer, _, _ = make()
    x = torch.randn(100, 7).T
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("values", KINDS)
def test_compile(values):
    layer, _, _ = make(values=values)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 5):
        x = torch.randn(rows, 100)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16()])
def test_casts_what_a_product_takes_in_its_dtype(values, cast):
    layer, weight, b = make(values=values)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    cast(layer)
    for name, t in layer.state_dict().items():
        casts = name == "bias" or (name == "values" and values == "same")
        assert t.dtype == (torch.bfloat16 if casts else before[name].dtype)
        assert torch.equal(t, before[name].to(t.dtype))
    x = torch.randn(3, 100).bfloat16()
    w = weight.bfloat16() if values == "same" else weight
    by_torch = torch.nn.functional.linear(x, w.bfloat16(), layer.bias)
    assert_close(layer(x), x.double() @ w.double().T + layer.bias.double(), by_torch, "out")
    assert layer.to("meta").bitmask.is_meta


def test_autocast():
    layer, _, _ = make(dtype=torch.bfloat16)
    x = torch.randn(2, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))
    with pytest.raises((ValueError, RuntimeError), match="bitmap_gemm: values: expected float32"):
        layer(x)


def test_a_shard_of_the_rows_computes_its_rows():
    layer, _, _ = make(values="int8")
    x = torch.randn(3, 100)
    whole, part = layer(x), copy.deepcopy(layer)
    for name in ("bitmask", "scales", "bias"):
        setattr(part, name, torch.nn.Parameter(getattr(layer, name)[16:30], requires_grad=False))
    part.row_offsets = torch.nn.Parameter(layer.row_offsets[16:31], requires_grad=False)
    torch.testing.assert_close(part(x), whole[:, 16:30])


def test_says_what_it_is():
    layer = BitmapLinear(8, 4, 16, bias=False)
    assert repr(layer) == "BitmapLinear(in_features=8, out_features=4, bias=False, density=0.500, values=same)"
    layer = BitmapLinear(8, 4, 8, values="int4", group_size=4)
    said = "in_features=8, out_features=4, bias=True, density=0.250, values=int4, group_size=4"
    assert repr(layer) == f"BitmapLinear({said})"


def test_bad_input_names_the_argument():
    layer, _, _ = make()
    with pytest.raises(ValueError, match=r"BitmapLinear: bias: expected floating point \[40\], got float32 \[41\]"):
        BitmapLinear.from_weight(layer.weight_bitmap, torch.zeros(41))
    with pytest.raises(ValueError, match="BitmapLinear: values: expected 'same', 'int8' or 'int4', got 'int2'"):
        BitmapLinear(8, 8, 8, values="int2")
    with pytest.raises((ValueError, RuntimeError), match="bitmap_gemm: x: expected"):
        layer(torch.randn(2, 96))


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("bitmask", lambda t: t[3].fill_(255), "here: bitmask: expected"),
        ("row_offsets", lambda t: t[5:6].fill_(0), "here: row_offsets: expected offsets that do not fall"),
        ("row_offsets", lambda t: t[-1:].add_(1), "here: "),
        ("scales", lambda t: t.fill_(torch.inf), "here: scales: expected finite scales"),
    ],
)
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_check_names_what_is_damaged(values, field, change, message):
    layer, _, _ = make(values=values)
    change(getattr(layer, field))
    with pytest.raises(ValueError, match=message):
        layer.check("here")


def test_an_odd_int4_value_too_many_is_found():
    layer, _, _ = make(n=3, k=9, values="int4")
    layer.nnz += 1 if layer.nnz % 2 else -1  # what a config might say, with as many bytes
    with pytest.raises(ValueError, match=f"here: row_offsets: expected {layer.nnz} last"):
        layer.check("here")


def test_is_exported():
    assert headstart.BitmapLinear is BitmapLinear and {"BitmapLinear", "Int4Linear"} <= set(headstart.__all__)
    assert headstart.Int4Linear is Int4Linear

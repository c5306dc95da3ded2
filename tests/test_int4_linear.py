"""`Int4Linear`: it computes what torch.nn.Linear computes with the dequantised weight, and behaves like one."""

import copy
import pickle

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

from headstart import Int4Weight  # noqa: E402
from headstart.weights.int4_linear import Int4Linear  # noqa: E402
from tolerances import assert_close  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(n=200, k=288, group_size=32, symmetric=False, bias=True, act_order=False, dtype=torch.float32):
    """A layer, and its weight and bias in float64."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    scales = (torch.rand(n, groups) + 0.1).to(dtype)
    zeros = None if symmetric else torch.randint(0, 16, (n, groups), dtype=torch.uint8)
    weight = Int4Weight.from_codes(codes, scales, zeros, group_size=group_size)
    group = torch.arange(k) // size
    true = (codes.double() - (8 if symmetric else zeros.double()[:, group])) * scales.double()[:, group]
    if act_order:
        order = torch.randperm(k)
        weight = Int4Weight(
            *(getattr(weight, f) for f in ("packed", "scales", "zeros")), group_size, (n, k), order.int()
        )
        true = true[:, order.argsort()]
    b = torch.randn(n).to(dtype) if bias else None
    return Int4Linear.from_weight(weight, b), true, 0 if b is None else b.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("symmetric", "bias", "act_order"), [(False, True, False), (True, False, False)])
def test_is_the_linear_layer(dtype, group_size, symmetric, bias, act_order):
    layer, weight, b = make(200, 288, group_size, symmetric, bias, act_order, dtype)
    for shape in ((1, 288), (2, 3, 288), (288,), (0, 288), (70, 288)):
        x = torch.randn(shape).to(dtype)
        out = layer(x)
        assert out.dtype == dtype and out.shape == (*shape[:-1], 200) and not out.requires_grad
        by_torch = torch.nn.functional.linear(x, weight.to(dtype), b.to(dtype) if bias else None)
        assert_close(out, x.double() @ weight.T + b, by_torch, "out")


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    n=st.integers(1, 70),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64, 96, -1]),
    options=st.fixed_dictionaries(dict(symmetric=st.booleans(), bias=st.booleans(), act_order=st.booleans())),
    rows=st.lists(st.integers(0, 3), max_size=2),
    dtype=st.sampled_from(DTYPES),
)
def test_any_layer(n, groups, group_size, options, rows, dtype):
    k = groups * 33 if group_size == -1 else groups * group_size
    layer, weight, b = make(n, k, group_size, dtype=dtype, **options)
    x = torch.randn(*rows, k).to(dtype)
    out = layer(x)
    assert out.dtype == dtype and out.shape == (*rows, n)
    want = x.double() @ weight.T + b
    room = x.double().abs() @ weight.T.abs() + (b.abs() if options["bias"] else 0)
    assert ((out - want).abs() <= torch.finfo(dtype).eps * want.abs() + 1e-6 * room + 1e-30).all()
    copy = Int4Linear(k, n, layer.group_size, bias=options["bias"], symmetric=layer.zeros is None,
                      act_order=options["act_order"], dtype=dtype)  # fmt: skip
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy(x), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_act_order(dtype):
    layer, weight, b = make(33, 96, 32, act_order=True, dtype=dtype)
    x = torch.randn(5, 96).to(dtype)
    by_torch = torch.nn.functional.linear(x, weight.to(dtype), b.to(dtype))
    assert_close(layer(x), x.double() @ weight.T + b, by_torch, "out")


@pytest.mark.parametrize("act_order", [False, True])
def test_takes_any_strides(act_order):
    layer, _, _ = make(20, 64, act_order=act_order)
    x = torch.randn(64, 7).T
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_weight_and_state_dict_come_back(symmetric, act_order):
    layer, weight, _ = make(33, 96, symmetric=symmetric, act_order=act_order)
    torch.testing.assert_close(layer.weight_int4.dequantize(torch.float64), weight, rtol=1e-6, atol=1e-6)
    names = {"packed", "scales", "bias"}
    names |= set() if symmetric else {"zeros"}
    names |= {"permutation"} if act_order else set()
    state = layer.state_dict()
    assert state.keys() == names == dict(layer.named_parameters()).keys() and not list(layer.buffers())
    assert all(state[name].shape[0] == 3 for name in names - {"permutation", "bias"})  # panels of 16 rows
    assert not any(p.requires_grad for p in layer.parameters())
    empty = Int4Linear(96, 33, 32, symmetric=symmetric, act_order=act_order)
    x = torch.randn(4, 96)
    assert not empty(x).any()
    empty.load_state_dict(state)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_compile(act_order, bias):
    layer, _, _ = make(20, 64, act_order=act_order, bias=bias)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 5):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.double().half()])
def test_casts_leave_all_but_the_bias(cast):
    layer, weight, b = make(33, 96, dtype=torch.bfloat16, act_order=True)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    cast(layer)
    for name, t in layer.state_dict().items():
        assert t.dtype == (torch.float16 if name == "bias" else before[name].dtype)
        assert name == "bias" or torch.equal(t, before[name])
    x = torch.randn(3, 96).half()
    by_torch = torch.nn.functional.linear(x, weight.half(), b.half())
    assert_close(layer(x), x.double() @ weight.T + b, by_torch, "out")
    assert layer.to("meta").scales.dtype == torch.bfloat16


def test_autocast():
    layer, _, _ = make(20, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 64)).shape == (2, 20)


def test_copies_and_pickles():
    layer, _, _ = make(20, 64, act_order=True)
    x = torch.randn(2, 64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.packed.data_ptr() != layer.packed.data_ptr()


def test_says_what_it_is():
    layer, _, _ = make(20, 64, symmetric=True)
    said = "in_features=64, out_features=20, bias=True, group_size=32"
    assert repr(layer) == f"Int4Linear({said}, symmetric=True, act_order=False, minimums=False, bits=4)"


def test_a_shard_of_the_rows_computes_its_rows():
    layer, _, _ = make(48, 64)
    x = torch.randn(3, 64)
    whole = layer(x)
    part = copy.deepcopy(layer)
    for name, t in (("packed", layer.packed[1:]), ("scales", layer.scales[1:]), ("zeros", layer.zeros[1:])):
        setattr(part, name, torch.nn.Parameter(t, requires_grad=False))
    part.bias = torch.nn.Parameter(layer.bias[16:], requires_grad=False)
    assert torch.equal(part(x), whole[:, 16:])


def test_bad_input_names_the_argument():
    layer, _, _ = make(20, 64)
    with pytest.raises(ValueError, match=r"Int4Linear: bias: expected floating point \[20\], got float32 \[21\]"):
        Int4Linear.from_weight(layer.weight_int4, torch.zeros(21))
    with pytest.raises((ValueError, RuntimeError), match="int4_gemm: packed: expected"):
        layer(torch.randn(2, 96))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(codes=torch.full((4, 64), 16, dtype=torch.uint8)), "codes: expected values 0 to 15, got 16"),
        (dict(codes=torch.zeros(4, 64)), r"codes: expected uint8 \[N, K\], got float32"),
        (dict(codes=torch.zeros(0, 64, dtype=torch.uint8)), "codes: expected at least one row and column"),
        (dict(zeros=torch.full((4, 2), 200, dtype=torch.uint8)), "zeros: expected values 0 to 15, got 200"),
        (dict(zeros=torch.zeros(4, 2)), r"zeros: expected uint8 \[4, 2\], got float32"),
        (dict(zeros=torch.zeros(4, 1, dtype=torch.uint8)), r"zeros: expected uint8 \[4, 2\], got uint8 \[4, 1\]"),
        (dict(scales=torch.ones(4, 3)), r"scales: expected .* \[4, 2\], got float32 \[4, 3\]"),
        (dict(group_size=24), "group_size: expected a multiple of 32"),
    ],
)
def test_from_codes_checks_what_users_give(change, message):
    args = dict(codes=torch.zeros(4, 64, dtype=torch.uint8), scales=torch.ones(4, 2), zeros=None, group_size=32)
    Int4Weight.from_codes(**args)
    with pytest.raises(ValueError, match=f"Int4Weight.from_codes: {message}"):
        Int4Weight.from_codes(**(args | change))

"""A patched gated MLP computes its layers in one go only while nobody would notice: every call looks anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

transformers = pytest.importorskip("transformers")

from headstart.model.patch import patch, unpatch  # noqa: E402
from headstart.weights import upcast  # noqa: E402
from models import make, tokens  # noqa: E402


class Adapter(nn.Module):
    """What an adapter library puts in the place of a layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) * 0


class Weight(nn.Parameter):
    """What a quantisation library puts in the place of a weight: products are its own business."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out * 0 if function is torch.nn.functional.linear else out


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def ablate(module, args, out):
    return out * 0


def twice(module, args):
    return (2 * args[0],)


def hooked(name, register, *arguments):
    """A change of the MLP that is undone by removing a hook."""

    def change(mlp, monkeypatch):
        return getattr(getattr(mlp, name), register)(*arguments).remove

    return change


def replaced(name, make_new):
    def change(mlp, monkeypatch):
        old = getattr(mlp, name)
        setattr(mlp, name, make_new(old))
        return lambda: setattr(mlp, name, old)

    return change


def globally(register, hook):
    def change(mlp, monkeypatch):
        only_down = lambda module, *rest: hook(module, *rest) if module is mlp.down_proj else None  # noqa: E731
        return getattr(nn.modules.module, register)(only_down).remove

    return change


def own_forward(mlp, monkeypatch):
    before = mlp.up_proj.forward
    own = vars(mlp.up_proj).get("forward")
    mlp.up_proj.forward = lambda x: before(x) * 0
    return lambda: delattr(mlp.up_proj, "forward") if own is None else setattr(mlp.up_proj, "forward", own)


def own_forward_of_the_activation(mlp, monkeypatch):
    mlp.act_fn.forward = lambda x: x * 0
    return lambda: delattr(mlp.act_fn, "forward")


def parametrised(mlp, monkeypatch):
    parametrize.register_parametrization(mlp.gate_proj, "weight", Doubled(), unsafe=True)
    return lambda: parametrize.remove_parametrizations(mlp.gate_proj, "weight", leave_parametrized=False)


def other_weight(mlp, monkeypatch):
    old = mlp.up_proj.weight
    mlp.up_proj.weight = Weight(old.detach().clone(), requires_grad=False)
    return lambda: setattr(mlp.up_proj, "weight", old)


def other_class_forward(mlp, monkeypatch):
    kind, own = type(mlp), type(mlp).forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) * 0)
    return monkeypatch.undo


def other_linear_forward(mlp, monkeypatch):
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: own(self, x) * 0)
    return monkeypatch.undo


CHANGES = {
    "forward hook": hooked("down_proj", "register_forward_hook", ablate),
    "forward pre-hook": hooked("gate_proj", "register_forward_pre_hook", twice),
    "hook of all modules": globally("register_module_forward_hook", ablate),
    "pre-hook of all modules": globally("register_module_forward_pre_hook", twice),
    "hook on the activation": hooked("act_fn", "register_forward_hook", ablate),
    "adapter": replaced("up_proj", Adapter),
    "another layer": replaced(
        "up_proj", lambda old: nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype)
    ),
    "another activation": replaced("act_fn", lambda old: nn.ReLU()),
    "a layer's own forward": own_forward,
    "the activation's own forward": own_forward_of_the_activation,
    "parametrisation": parametrised,
    "another kind of weight": other_weight,
    "the class's forward": other_class_forward,
    "the forward of all linear layers": other_linear_forward,
}


@pytest.fixture
def fused(monkeypatch):
    """How often MLPs were computed in one go."""
    calls, own = [], upcast.upcast_gated_mlp
    monkeypatch.setattr(upcast, "upcast_gated_mlp", lambda *args: calls.append(1) or own(*args))
    return calls


def small(dtype=torch.bfloat16):
    model = make(num_hidden_layers=1).to(dtype).requires_grad_(False)
    return model, model.model.layers[0].mlp


def rows():
    return torch.randn(2, 80, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)


def close(got, want):
    return (got - want).float().norm() <= 0.02 * want.float().norm()


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_after_patching_takes_effect_and_can_be_taken_back(change, fused, monkeypatch):
    model, mlp = small()
    x, plain = rows(), mlp(rows())
    with monkeypatch.context() as changes:
        torch.manual_seed(0)
        undo = CHANGES[change](mlp, changes)
        want = mlp(x)
        undo()
    assert not close(want, plain)  # the change is one that shows
    patch(model, linear="fp32")
    fused.clear()
    assert close(mlp(x), plain) and len(fused) == 1
    with monkeypatch.context() as changes:
        torch.manual_seed(0)
        undo = CHANGES[change](mlp, changes)
        got = mlp(x)
        undo()
    assert close(got, want) and len(fused) == 1
    assert close(mlp(x), plain) and len(fused) == 2


def test_hooks_see_what_they_see_without_headstart(fused):
    model, mlp = small()
    seen = {}
    patch(model, linear="fp32")
    for layer in (mlp.gate_proj, mlp.down_proj, mlp.act_fn):
        layer.register_forward_hook(lambda module, args, out: seen.__setitem__(module, (args[0].shape, out.dtype)))
    fused.clear()
    mlp(rows())
    assert fused == []
    shapes = {mlp.gate_proj: (2, 80, 64), mlp.down_proj: (2, 80, 96), mlp.act_fn: (2, 80, 96)}
    assert seen == {module: (torch.Size(shape), torch.bfloat16) for module, shape in shapes.items()}


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_run(register, fused):
    model, mlp = small()
    patch(model, linear="fp32")
    fused.clear()
    gradients = []
    getattr(mlp.up_proj, register)(lambda module, *grads: gradients.append(module))
    mlp.down_proj.weight.requires_grad_(True)
    mlp(rows().requires_grad_()).sum().backward()
    assert gradients == [mlp.up_proj] and fused == []


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_weight_that_is_trained_gets_its_gradient(name, fused):
    model, mlp = small()
    patch(model, linear="fp32")
    fused.clear()
    getattr(mlp, name).weight.requires_grad_(True)
    mlp(rows()).sum().backward()
    assert getattr(mlp, name).weight.grad.abs().max() > 0 and fused == []


def test_hooks_that_are_there_before_see_no_made_up_rows(fused):
    model, mlp = small()
    seen = []
    handle = mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    patch(model, linear="fp32")
    assert seen == []
    mlp(rows())
    assert seen == [(2, 80, 96)] and fused == []
    handle.remove()
    patch(model, linear="fp32")
    fused.clear()
    mlp(rows())
    assert len(seen) == 1 and len(fused) == 1


def test_a_copy_looks_at_its_own_layers(fused):
    model, mlp = small()
    twin = copy.deepcopy(patch(model, linear="fp32")).model.layers[0].mlp
    mlp.down_proj.register_forward_hook(ablate)
    fused.clear()
    assert twin(rows()).abs().max() > 0 and len(fused) == 1
    assert mlp(rows()).abs().max() == 0 and len(fused) == 1
    unpatch(model)
    assert "_headstart_mlp" not in vars(mlp)


@pytest.mark.parametrize("mode", ["auto", "fp32", "model"])
def test_a_whole_model_runs_every_hook(mode):
    model, _ = small()
    patch(model, "dense", linear=mode)
    ran = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: ran.append(module))
    with torch.no_grad():
        model(tokens())
    assert set(ran) == set(layers) and len(ran) == len(layers)

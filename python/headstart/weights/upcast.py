"""Linear layers in half precision on CPUs that compute it slowly.

A CPU without bf16 or fp16 dot products runs a half-precision GEMM at a fraction of its float32 rate (50 against 240
GFLOP/s on two AVX-512 cores). In a prefill, where one weight serves many rows, converting weight and input costs a few
per cent, so the product is computed in float32 and rounded once: faster, and more accurate. Decoding, with its
few rows, is bound by reading the weight and keeps the model's own path.

A gated MLP, ``down(act(gate(x)) * up(x))``, is computed in one go, tile of rows by tile of rows: what is between its
layers stays in float32 and in the cache, where layer by layer it would be rounded, written and read four times.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.modules import module as module_state

MODES = ("auto", "fp32", "model")

# Fewer rows than this do not repay the conversion of the weight.
MIN_ROWS = 64
# Temporaries are bounded by tiles of this many float32 elements (64 MiB each).
TILE_ELEMENTS = 2**24
TILE_ROWS = 1024
# Of a gated MLP: few enough that what is between its layers stays in the cache.
MLP_ROWS = 1024

GATED = ("gate_proj", "up_proj", "down_proj")
# What torch.nn.Module.__call__ looks at, for a module and for all modules, before it runs the forward alone.
HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
CALL, LINEAR_FORWARD = torch.nn.Module.__call__, torch.nn.Linear.forward
# A subclass of these may compute a product in a way of its own.
PLAIN = (torch.Tensor, torch.nn.Parameter)


class Gated(NamedTuple):
    """A gated MLP as it was when it was given the forward below."""

    forward: Callable
    act: Callable
    layers: list[torch.nn.Linear]


def attach_all(model: torch.nn.Module, mode: str) -> None:
    """Gives every plain linear layer and every gated MLP of a model the forwards below."""
    for module in model.modules():
        attach(module, mode)
    for module in model.modules():
        attach_mlp(module)


def detach_all(model: torch.nn.Module) -> None:
    for module in model.modules():
        detach(module)


def attach(module: torch.nn.Module, mode: str) -> None:
    """Gives a plain linear layer the forward below; a layer whose forward was replaced is left alone."""
    if type(module) is torch.nn.Linear and "forward" not in vars(module):
        module._headstart_linear = mode
        module.forward = functools.partial(_forward, module)


def attach_mlp(module: torch.nn.Module) -> None:
    """Gives a gated MLP the forward below, if its layers have the one above and it computes what we think it does.

    Random rows show what it computes, so a layer that carries a hook keeps the module's own forward: the hook would
    see them.
    """
    children = [vars(module)["_modules"].get(name) for name in GATED]
    if "forward" in vars(module) or not callable(getattr(module, "act_fn", None)) or None in children:
        return
    module._headstart_mlp = Gated(type(module).forward, module.act_fn, children)
    if _computes_by_itself(module) and _is_gated(module):
        module.forward = functools.partial(_mlp_forward, module)
    else:
        del module._headstart_mlp


def detach(module: torch.nn.Module) -> None:
    for name in ("_headstart_linear", "_headstart_mlp"):
        vars(module).pop(name, None)
    if _has_our_forward(module):  # a hook put over ours later stays, and finds no mode under it
        del module.forward


def _has_our_forward(module: torch.nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func in (_forward, _mlp_forward)


def _forward(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_compiling() and _has_rows(module, x) and _upcasts(module, x):
        return upcast_linear(x, module.weight, module.bias)
    return type(module).forward(module, x)


def _mlp_forward(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_compiling() and not module.training and _computes_by_itself(module):
        layers = [module.gate_proj, module.up_proj, module.down_proj]
        if _has_rows(layers[0], x) and all(_upcasts(layer, x) for layer in layers):
            return upcast_gated_mlp(x, module)
    return type(module).forward(module, x)


def _computes_by_itself(module: torch.nn.Module) -> bool:
    """Whether a gated MLP may be computed without calling its layers: they are what they were when it was attached,
    and nobody waits for their calls. Anything may have changed since then, so every call asks."""
    before, children = vars(module).get("_headstart_mlp"), vars(module)["_modules"]
    return (
        before is not None
        and type(module).forward is before.forward
        and module.act_fn is before.act
        and all(children.get(name) is layer for name, layer in zip(GATED, before.layers))
        and all(_has_our_forward(layer) and vars(layer)["forward"].args == (layer,) for layer in before.layers)
        and not any(_is_observed(layer) for layer in before.layers)
        and not _is_observed(before.act)
        and "forward" not in getattr(before.act, "__dict__", ())
    )


def _is_observed(layer) -> bool:
    """Whether calling a layer does more than its forward: hooks of its own or of all modules, or a compiled call."""
    if torch.nn.Module.__call__ is not CALL or any(getattr(module_state, f"_global_{kind}", None) for kind in HOOKS):
        return True
    own = vars(layer) if isinstance(layer, torch.nn.Module) else {}
    return own.get("_compiled_call_impl") is not None or any(own.get(f"_{kind}") for kind in HOOKS)


def _has_rows(layer: torch.nn.Linear, x: torch.Tensor) -> bool:
    return type(x) in PLAIN and x.numel() >= MIN_ROWS * layer.in_features


def _upcasts(layer: torch.nn.Linear, x: torch.Tensor) -> bool:
    mode = vars(layer).get("_headstart_linear")
    # A parametrised layer has a class of its own; tools replace the forward of all linear layers.
    if mode is None or type(layer) is not torch.nn.Linear or torch.nn.Linear.forward is not LINEAR_FORWARD:
        return False
    weight, bias = layer.weight, layer.bias
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        weight.dtype in (torch.bfloat16, torch.float16)
        and all(type(tensor) in PLAIN and tensor.dtype == weight.dtype for tensor in given)
        and weight.device.type == "cpu"
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
        and not torch.is_autocast_enabled("cpu")
        and (mode == "fp32" or upcast_pays(weight.dtype))
    )


@torch.inference_mode()
def _is_gated(module: torch.nn.Module) -> bool:
    """Whether a module's forward is the gated MLP that its layers' names suggest, seen on a few random rows."""
    weight = module.gate_proj.weight
    if weight.device.type != "cpu":
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[1], generator=generator).to(weight.dtype)
    try:
        want = type(module).forward(module, x)
    except Exception:  # it takes other arguments
        return False
    if not isinstance(want, torch.Tensor) or want.shape != (4, module.down_proj.weight.shape[0]):
        return False
    got = upcast_gated_mlp(x, module)
    tolerance = 0.05 if weight.dtype == torch.bfloat16 else 0.01
    return bool((got - want).float().norm() <= tolerance * want.float().norm())


def upcast_gated_mlp(x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """``down(act(gate(x)) * up(x))`` computed in float32 and rounded once to x's dtype."""
    layers = (module.gate_proj, module.up_proj, module.down_proj)
    gate, up, down = ((layer.weight.float(), None if layer.bias is None else layer.bias.float()) for layer in layers)
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape[0], module.down_proj.out_features)
    for tile, into in zip(rows.split(MLP_ROWS), out.split(MLP_ROWS), strict=True):
        tile = tile.float()
        into.copy_(F.linear(module.act_fn(F.linear(tile, *gate)).mul_(F.linear(tile, *up)), *down))
    return out.view(*x.shape[:-1], out.shape[-1])


def upcast_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` computed in float32 and rounded to x's dtype, in tiles of bounded size."""
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape[0], weight.shape[0])
    tile_columns = max(1, TILE_ELEMENTS // weight.shape[1])
    for column in range(0, weight.shape[0], tile_columns):
        columns = slice(column, column + tile_columns)
        tile = weight[columns].float()
        tile_bias = None if bias is None else bias[columns].float()
        tile_rows = max(MIN_ROWS, min(TILE_ROWS, TILE_ELEMENTS // tile.shape[0]))
        for row in range(0, rows.shape[0], tile_rows):
            out[row : row + tile_rows, columns] = F.linear(rows[row : row + tile_rows].float(), tile, tile_bias)
    return out.view(*x.shape[:-1], weight.shape[0])


@functools.cache
def upcast_pays(dtype: torch.dtype) -> bool:
    """Whether this CPU is faster that way: measured once a process, in some 20 ms."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 576, generator=generator).to(dtype)
    weight = torch.randn(1536, 576, generator=generator).to(dtype)
    return _seconds(upcast_linear, x, weight) < 0.9 * _seconds(F.linear, x, weight)


def _seconds(function, *args) -> float:
    function(*args)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - start)
    return min(times)

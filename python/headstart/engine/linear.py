"""Linear layers in half precision on CPUs that compute it slowly.

A CPU without bf16 or fp16 dot products runs a half-precision GEMM at a fraction of its float32 rate (50 against 240
GFLOP/s on two AVX-512 cores). In a prefill, where one weight serves many rows, converting weight and input costs a few
per cent, so the product is computed in float32 and rounded once: faster, and more accurate. Decoding, with its
few rows, is bound by reading the weight and keeps the model's own path.
"""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F

MODES = ("auto", "fp32", "model")

# Fewer rows than this do not repay the conversion of the weight.
MIN_ROWS = 64
# Temporaries are bounded by tiles of this many float32 elements (64 MiB each).
TILE_ELEMENTS = 2**24
TILE_ROWS = 2048


def attach(module: torch.nn.Linear, mode: str) -> None:
    """Gives a plain linear layer the forward below; a layer whose forward was replaced is left alone."""
    if type(module) is torch.nn.Linear and "forward" not in vars(module):
        module._headstart_linear = mode
        module.forward = functools.partial(_forward, module)


def detach(module: torch.nn.Module) -> None:
    vars(module).pop("_headstart_linear", None)
    forward = vars(module).get("forward")  # a hook put over ours later stays, and finds no mode under it
    if isinstance(forward, functools.partial) and forward.func is _forward:
        del module.forward


def _forward(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    weight, mode = module.weight, vars(module).get("_headstart_linear")
    if (
        mode is not None
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and weight.device.type == "cpu"
        and x.numel() >= MIN_ROWS * module.in_features
        and not (torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad))
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and (mode == "fp32" or upcast_pays(weight.dtype))
    ):
        return upcast_linear(x, weight, module.bias)
    return torch.nn.Linear.forward(module, x)


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

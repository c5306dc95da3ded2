"""How far a kernel may be from the truth: one rule, and the floor under it for every dtype.

The truth is the same definition computed in float64. A kernel's error may be at most twice that of the same
computation done by plain torch in the input's dtype. Where torch happens to be exact, the bar is the floor: some
rounding steps of the output's dtype, at the output's size.
"""

from __future__ import annotations

import torch

FACTOR = 2.0
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest absolute difference; inf where one side is NaN or infinite and the other is not the same."""
    actual, exact = actual.double(), exact.double()
    if actual.shape != exact.shape:
        raise AssertionError(f"expected shape {list(exact.shape)}, got {list(actual.shape)}")
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (actual - exact).abs()).nan_to_num(nan=float("inf"))
    return float(difference.max()) if difference.numel() else 0.0


def assert_close(actual: torch.Tensor, exact: torch.Tensor, torch_result: torch.Tensor, what: str = "result") -> None:
    """Asserts the rule above; `torch_result` is plain torch's answer in the input's dtype."""
    finite = exact[exact.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 1.0
    bar = max(FACTOR * error(torch_result, exact), FLOOR[torch_result.dtype] * max(size, 1e-30))
    got = error(actual, exact)
    assert got <= bar, f"{what}: error {got:.3g}, allowed {bar:.3g} (torch itself: {error(torch_result, exact):.3g})"

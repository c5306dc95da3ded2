"""Input checks shared by all operators: every message names the argument, what was expected and what was got.

`csrc/torch/checks.h` makes the same checks with the same words for those who call a compiled kernel through torch.ops.
The checks look only at dtypes, shapes, strides and devices, never at data. So they cost no synchronisation and work
under `torch.compile`. The CPU kernels check data, for example that ids are in range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .._expect import expect, fail

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def describe(x: torch.Tensor) -> str:
    """The dtype and shape as text, e.g. ``int64 [1, 8, 63, 12]``."""
    return f"{str(x.dtype).removeprefix('torch.')} [{', '.join(str(s) for s in x.shape)}]"


def tensor(
    op: str,
    argument: str,
    x: torch.Tensor,
    dtypes: Sequence[torch.dtype] | torch.dtype,
    shape: Sequence[int | str],
    like: torch.Tensor | None = None,
) -> None:
    """Checks dtype and shape, and that x is on the device of `like`. A string in `shape` stands for any size."""
    if not isinstance(x, torch.Tensor):
        fail(op, argument, "a tensor", type(x).__name__)
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    same = x.dim() == len(shape) and all(isinstance(want, str) or got == want for got, want in zip(x.shape, shape))
    if x.dtype not in dtypes or not same:
        wanted = f"{dtype_names(dtypes)} [{', '.join(str(s) for s in shape)}]"
        fail(op, argument, wanted, describe(x))
    if like is not None and x.device != like.device:
        fail(op, argument, f"a tensor on {like.device}", f"one on {x.device}")


def contiguous_last(op: str, argument: str, x: torch.Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        fail(op, argument, "a contiguous last dimension (stride 1)", f"stride {x.stride(-1)}")


def head_dim(op: str, d: int) -> None:
    expect(d % 8 == 0 and 8 <= d <= 256, op, "q", "a head dim that is a multiple of 8 up to 256", d)


def finite(op: str, argument: str, value: float) -> None:
    expect(math.isfinite(value), op, argument, "a finite number", value)


def block_size(op: str, argument: str, value: int) -> None:
    expect(value in (64, 128), op, argument, "64 or 128", value)


def query_key(op: str, q: torch.Tensor, k: torch.Tensor, *, causal: bool = True) -> None:
    """Checks q [B, Hq, Nq, D] and k [B, Hkv, Nk, D], which every attention operator takes."""
    tensor(op, "q", q, FLOAT_DTYPES, ("B", "Hq", "Nq", "D"))
    b, hq, nq, d = q.shape
    tensor(op, "k", k, q.dtype, (b, "Hkv", "Nk", d), like=q)
    head_dim(op, d)
    hkv, nk = k.shape[1], k.shape[2]
    expect(hkv > 0 and hq % hkv == 0, op, "k", f"a number of heads that divides q's {hq}", hkv)
    if causal:
        expect(nq <= nk, op, "q", f"no more queries than the {nk} keys (causal)", nq)
    contiguous_last(op, "q", q)
    contiguous_last(op, "k", k)


def kv_start(op: str, start: torch.Tensor | None, batch: int, like: torch.Tensor) -> None:
    if start is not None:
        tensor(op, "kv_start", start, torch.int32, (batch,), like=like)

"""The Triton kernels of the index builders, without a GPU: their choices through the interpreter, held to the same truth
as the CPU kernels (`test_prefill_index.py`), and their machine code for sm_80 and sm_90.
"""

from __future__ import annotations

import math

import pytest
import torch

import headstart
import test_prefill_index as cpu
from headstart import _library
from headstart.reference import prefill_index as reference
from shapes import BUILDERS as SHAPES
from shapes import Shape
from triton_testing import (
    SHARED_MEMORY,
    compile_launch,
    compiled,
    interpreted,
    resources,
    run_in_the_interpreter,
    surrounded,
)

pytest.importorskip("triton", reason="triton is not installed")
OPERATORS = ("vertical_slash_index", "block_topk_index", "adaptive_block_index")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


@compiled
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch, interpreter, poisoned):
    """`headstart.*_index` call the Triton kernels, interpreted."""
    from headstart.ops import prefill_index as ops

    for name in OPERATORS:
        monkeypatch.setattr(ops, f"_{name}", _library.triton_kernels[name])


def inputs(shape: Shape, dtype: torch.dtype, size: float = 1.0) -> list[torch.Tensor]:
    """q and k between NaN tokens."""
    heads = (shape.heads_q, shape.nq), (shape.heads_kv, shape.nk)
    return [surrounded(shape.batch, h, n, shape.head_dim, dtype=dtype).mul_(size) for h, n in heads]


# --- choices ---------------------------------------------------------------------------------------------------------

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
WIDE = [
    (Shape(1, 2, 1, 130, 200, 40), FLOAT16),
    (Shape(1, 2, 1, 130, 200, 128), BFLOAT16),
    (Shape(1, 1, 1, 70, 200, 256), BFLOAT16),
    (Shape(1, 1, 1, 200, 300, 96, block_q=128, block_k=128), FLOAT16),
]
by_head_dim = pytest.mark.parametrize("shape, dtype", WIDE, ids=lambda x: str(x).removeprefix("torch."))


@interpreted
@by_shape
def test_every_builder(shape, builders):
    q, k = inputs(shape, FLOAT32)
    cpu.check_vertical_slash(shape, q, k)
    cpu.check_topk(shape, q, k)
    cpu.check_adaptive(shape, 4 * q, k)


@interpreted
@by_head_dim
def test_head_dims_and_dtypes(shape, dtype, builders):
    q, k = inputs(shape, dtype)
    cpu.check_vertical_slash(shape, q, k)
    cpu.check_topk(shape, q, k)
    cpu.check_adaptive(shape, 4 * q, k, stride=16)

"""Tensors that compressed-tensors 0.14.0.1, the last release with "sparse-bitmask", has compressed, in a file.

Where that release is installed: ``python tests/sparse_bitmask_fixture.py`` writes the file again.
"""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FILE = Path(__file__).parent / "data" / "sparse_bitmask.safetensors"
VERSION = "0.14.0.1"
INTEGER = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@functools.cache
def dense_tensors() -> dict[str, torch.Tensor]:
    """By name: each dtype, columns that are and are not a multiple of 8, empty and full rows, one row, odd values."""
    tensors = {}
    for dtype, integer in INTEGER.items():
        info = torch.finfo(dtype)
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, info.tiny, info.smallest_normal / 2, info.max])
        special = special.to(dtype)
        special[0] = (special[:1].view(integer) | 5).view(dtype)[0]  # a NaN with a payload
        for n, k in ((6, 21), (5, 32), (1, 13)):
            places = torch.arange(n * k).view(n, k)
            w = ((places * 37 % 101 - 50) / 8).to(dtype).masked_fill(places * 29 % 7 < 3, 0)
            w[-1, : len(special)] = special
            if n > 1:
                w[1], w[2] = 0, torch.arange(1, k + 1)
            tensors[f"{str(dtype).removeprefix('torch.')}_{n}x{k}"] = w
    return tensors


def library_installed() -> bool:
    try:
        return importlib.metadata.version("compressed-tensors") == VERSION
    except importlib.metadata.PackageNotFoundError:
        return False


def compress(w: torch.Tensor) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor

    named = BitmaskTensor.from_dense(w).dict("layer")
    return {name.removeprefix("layer."): x for name, x in named.items()}


def decompress(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor

    return BitmaskTensor(**tensors).decompress()


def stored(name: str) -> dict[str, torch.Tensor]:
    """What the library made of one of `dense_tensors`."""
    return {key.removeprefix(f"{name}."): x for key, x in load_file(FILE).items() if key.startswith(f"{name}.")}


if __name__ == "__main__":
    assert library_installed(), f"needs compressed-tensors {VERSION}"
    FILE.parent.mkdir(exist_ok=True)
    made = {f"{name}.{key}": x for name, w in dense_tensors().items() for key, x in compress(w).items()}
    save_file(made, FILE, metadata={"made_by": f"compressed-tensors {VERSION}"})

"""Reading one module's tensors out of a checkpoint's dictionary."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import _checks


def entry(op: str, tensors: Mapping[str, torch.Tensor], field: str, *, required: bool = True) -> torch.Tensor | None:
    """The tensor whose name is `field` or ends in ``.<field>``, or None if there is none and it is not `required`.

    Raises a ValueError if there is more than one such tensor, or if there is none and it is `required`.
    """
    names = [name for name in tensors if name == field or name.endswith(f".{field}")]
    _checks.expect(len(names) <= 1, op, field, "one such tensor (pass one module's at a time)", sorted(names))
    if not names:
        if required:
            _checks.fail(op, field, "a tensor of that name", f"only {sorted(tensors)}")
        return None
    return tensors[names[0]]


def shape(op: str, tensors: Mapping[str, torch.Tensor], field: str) -> tuple[int, int]:
    """The (rows, columns) that a checkpoint stores as a tensor of two integers."""
    stored = entry(op, tensors, field)
    _checks.tensor(op, field, stored, (torch.int64, torch.int32), (2,))
    rows, columns = stored.tolist()
    _checks.expect(rows > 0 and columns > 0, op, field, "two positive integers", [rows, columns])
    return rows, columns

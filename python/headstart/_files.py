"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike, save: Callable[[Path], object]) -> None:
    """Calls `save` with a temporary name beside `path`, and renames what it wrote."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole_folder(path: str | os.PathLike, save: Callable[[Path], object]) -> None:
    """Calls `save` with an empty folder beside `path`, and puts it in the place of what was at `path`."""
    path = Path(path)
    partial, before = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("partial", "before"))
    try:
        partial.mkdir(parents=True)
        save(partial)
        if path.exists():
            os.replace(path, before)
        os.replace(partial, path)
    finally:
        if before.exists() and not path.exists():
            os.replace(before, path)
        for left in (partial, before):
            shutil.rmtree(left, ignore_errors=True)

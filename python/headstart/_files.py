"""Writes files and folders so that they appear whole or not at all.

A file or folder has a temporary name, `.NAME.<random>.partial`, until it is complete. The name is random, and a call
claims it by creating it. A process id would not be unique, because every container has a process 1, and threads share
an id. A call removes only what it created itself, and the file or folder that the result replaces. A run that is killed
leaves its temporary file or folder behind. Later runs neither use nor remove it.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._expect import checker

LONGEST_NAME = 200  # a temporary name repeats at most this number of bytes of a name; file systems allow 255 in total


def write_whole(path: str | os.PathLike, save: Callable[[Path], object]) -> None:
    """Calls `save` with a temporary file beside `path`, and then renames this file to `path`."""
    path = _resolved(path)
    partial = _claim(path, "partial", _create_file)
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole_folder(path: str | os.PathLike, save: Callable[[Path], object]) -> None:
    """Calls `save` with an empty folder beside `path`, and then replaces the folder at `path` with it.

    If several writers do this at once, the folder of the last one stays.
    """
    path = _resolved(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _claim(path, "partial", os.mkdir)
    try:
        save(partial)
        _replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _resolved(path: str | os.PathLike) -> Path:
    """The path, absolute and with links resolved. `save` may change the working directory, and a link stays a link."""
    return Path(path).resolve()


def _claim(path: Path, kind: str, create: Callable[[Path], object]) -> Path:
    name = os.fsdecode(os.fsencode(path.name)[:LONGEST_NAME])
    while True:
        claimed = path.with_name(f".{name}.{secrets.token_hex(8)}.{kind}")
        try:
            create(claimed)
        except FileExistsError:
            continue
        return claimed


def _create_file(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # with the permissions of an ordinary file


def _replace_folder(new: Path, path: Path) -> None:
    while not _moved(new, path):
        before = _claim(path, "before", os.mkdir)
        try:
            os.rename(path, before)
        except FileNotFoundError:  # another writer has just moved it away
            before.rmdir()
            continue
        try:
            placed = _moved(new, path)
        except BaseException:
            os.rename(before, path)
            raise
        shutil.rmtree(before, ignore_errors=True)
        if placed:
            return


def _moved(folder: Path, path: Path) -> bool:
    """Renames a folder to `path`. False if another folder with content is there."""
    try:
        os.rename(folder, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises a ValueError that names the file if it does not contain one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    checker(path)(isinstance(content, dict), "the file", "a JSON object", content)
    return content

"""Texts that every Python carries, for demonstrations and searches without a download: prose and source code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

# The help texts open with a list of tables; they are prose from about this token on (of SmolLM2's tokenizer).
FIRST_TOKEN = {"help texts": 300, "source code": 0}
SOURCES = ("argparse", "_pydecimal", "typing", "tarfile")


def sample_texts() -> dict[str, str]:
    """Python's help topics, and the source of some modules of its standard library."""
    import pydoc_data.topics

    files = [Path(importlib.util.find_spec(name).origin) for name in SOURCES]
    return {
        "help texts": "\n".join(pydoc_data.topics.topics.values()),
        "source code": "".join(file.read_text(encoding="utf-8") for file in files),
    }


def read_text(path: Path) -> str:
    """A UTF-8 file with some text in it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from None
    if not text.strip():
        raise ValueError(f"{path}: expected a text, got an empty file")
    return text


def token_ids(tokenizer, text: str | None = None, sample: str = "help texts") -> torch.Tensor:
    """int64 [n]: a text, or one of the samples without what comes before its first whole sentence."""
    words, first = (sample_texts()[sample], FIRST_TOKEN[sample]) if text is None else (text, 0)
    return tokenizer(words, return_tensors="pt").input_ids[0, first:].long()

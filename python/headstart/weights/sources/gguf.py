"""A GGUF file. transformers reads it, and makes plain weights of it."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from .source import Checkpoint, Source


class Gguf(Source):
    BY_TRANSFORMERS = True
    NOT_STREAMED = (
        "a GGUF file",
        "weights are streamed from safetensors as they lie there: save the model with save_pretrained, and load that "
        "folder",
    )
    strict = False  # such files have tensors that a model computes itself, such as rope_freqs

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.gguf is not None

    def arguments(self, dtype: torch.dtype | None) -> dict[str, Any]:
        return {
            "gguf_file": self.checkpoint.gguf,
            "config": self.config,  # or the file's header would be read once more
            "quantization_config": transformers.GgufConfig(dequantize=True),
            "dtype": dtype or torch.bfloat16,
        }

"""What opens and runs: cases of the tests, from which `python tests/supported.py` makes docs/models.md.

The tests that read these tables check every line, and `test_supported.py` checks the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parent.parent / "docs/models.md"
WINDOW = 48
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


class Family(NamedTuple):
    """A family of models: sizes of a small one, and what it brings that others do not."""

    sizes: dict
    brings: str


# All layers run on headstart's kernels (test_model_families.py).
FAMILIES = {
    "Llama": Family({}, "grouped heads"),
    "Qwen2": Family(
        dict(use_sliding_window=True, sliding_window=WINDOW, layer_types=MIXED), "biases, windows in some layers"
    ),
    "Qwen3": Family(dict(head_dim=32), "norms on queries and keys, a head dim of its own"),
    "Mistral": Family(dict(sliding_window=WINDOW), "a sliding window in all layers"),
    "Phi3": Family(dict(sliding_window=WINDOW), "one projection for queries, keys and values; a sliding window"),
    "Gemma3Text": Family(
        dict(head_dim=256, query_pre_attn_scalar=256, sliding_window=WINDOW, layer_types=MIXED),
        "head dim 256, norms on queries and keys, windows in some layers",
    ),
    "Glm": Family(dict(head_dim=16, partial_rotary_factor=0.5), "rotation of half of the dims"),
    "Cohere2": Family(
        dict(sliding_window=WINDOW, layer_types=MIXED), "windows in some layers, no rotation in the others"
    ),
    "Olmo3": Family(dict(sliding_window=WINDOW, layer_types=MIXED), "norms after attention, windows in some layers"),
}


class Fallback(NamedTuple):
    """A family whose layers run the model's own attention: sizes, why, and the word of the warning that says so."""

    sizes: dict
    reason: str
    warning: str


# The model's own attention runs, and a warning says so once (test_patch.py).
OWN_ATTENTION = {
    "Gemma2": Fallback(
        dict(head_dim=16, attn_logit_softcapping=5.0, sliding_window=4096), "soft-capping of the logits", "softcap"
    ),
    "GptOss": Fallback(
        dict(head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=4096), "attention sinks", "s_aux"
    ),
}


class Packed(NamedTuple):
    """Int4 layers of another maker: the format, what `int4_formats.write` writes, and its words for the page."""

    method: str
    options: dict
    what: str


# Opened with the same codes and scales (test_int4_checkpoints.py).
GGUF_ARCHITECTURES = ("llama", "llama, tied", "qwen2", "qwen3", "gemma2")
GGUF_KINDS = ("Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0")

INT4_FORMATS = [
    Packed("awq", dict(), "zero points"),
    Packed("awq", dict(symmetric=True), "all zero points 8"),
    Packed("gptq", dict(), "version 1"),
    Packed("gptq", dict(version=2), "version 2"),
    Packed("gptq", dict(version=2, symmetric=True), "version 2, symmetric"),
    Packed("gptq", dict(act_order=True), "act-order"),
    Packed("gptq", dict(act_order=True, symmetric=True), "act-order, symmetric"),
    Packed("compressed-tensors", dict(), "pack-quantized, zero points"),
    Packed("compressed-tensors", dict(symmetric=True), "pack-quantized, symmetric"),
    Packed("compressed-tensors", dict(act_order=True), "pack-quantized, act-order"),
]

# Values of headstart's own bitmap layers (test_bitmap_checkpoints.py); "same" are the model's, in 16 or 32 bits.
BITMAP_VALUES = ("same", "int8", "int4")


HEAD = """# What opens and runs

Made by `python tests/supported.py` from the cases of the tests: each line of a table is a test that passes.

## Families of models

`headstart.patch` puts all attention layers of these families on headstart's kernels. The tests read single prompts,
batches with left padding, and chunks over a cache; they generate greedily, with beams and with a static cache. With a
plan that selects every key, the results are those of the model's own attention.

| family | what it brings |
|---|---|
"""
FALLBACKS = """
In these families the model's own attention runs, and a warning says so once. Their linear layers can still be packed.

| family | why |
|---|---|
"""
FORMATS = """
Another family is patched too, if transformers lets its attention be chosen; the tests do not have it.

## Formats of checkpoints

`headstart.load` opens folders and files of these formats. Int4 layers keep the codes and scales of the file.

| format | kinds in the tests |
|---|---|
"""
TAIL = """
The group size of int4 is a multiple of 32, or a whole row. Other settings are refused, by file and field.
"""


def page() -> str:
    return (
        HEAD
        + _rows((name.removesuffix("Text"), family.brings) for name, family in FAMILIES.items())
        + FALLBACKS
        + _rows((name, family.reason) for name, family in OWN_ATTENTION.items())
        + FORMATS
        + _rows(_formats())
        + TAIL
    )


def _formats() -> Iterator[tuple[str, str]]:
    for method in dict.fromkeys(packed.method for packed in INT4_FORMATS):
        yield f"{method}, 4 bits", "; ".join(packed.what for packed in INT4_FORMATS if packed.method == method)
    yield "compressed-tensors, sparse-bitmask", "all linear layers compressed; all weights compressed"
    yield "headstart's own, int4", "of `headstart quantize`, or of `save_pretrained`"
    yield (
        "headstart's own, bitmap",
        f"of `headstart prune`, or of `save_pretrained`; values: {', '.join(BITMAP_VALUES)}",
    )
    names = ", ".join(name for name in GGUF_ARCHITECTURES if "," not in name)
    kept = f"weights in {', '.join(GGUF_KINDS)} stay packed, other kinds become plain"
    yield "GGUF", f"architectures in the tests: {names}; {kept}"
    yield "plain", "a folder that transformers writes, in one file or in shards"


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

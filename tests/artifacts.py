"""Tiny models in folders, what makes artifacts of them, and the judge of an artifact's layout."""

from __future__ import annotations

import json

import torch
import transformers

import headstart
from headstart.weights.files import PADDING, PAGE
from models import SIZES, make

WORDS = [f"w{i}" for i in range(2, SIZES["vocab_size"])]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1} | {w: i + 2 for i, w in enumerate(WORDS)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>")


def tiny_folder(folder, **sizes):
    """A tiny model in float32 with a tokenizer in ``in``; beside it a text of 600 tokens, each a word."""
    make(**sizes).save_pretrained(folder / "in", max_shard_size="100KB")
    tokenizer().save_pretrained(folder / "in")
    ids = torch.randint(2, SIZES["vocab_size"], (600,), generator=torch.Generator().manual_seed(5))
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    return folder


def run_prune(folder, out="out", **options):
    options = dict(texts=[folder / "text.txt"], tokens=100, windows=3) | options
    return headstart.prune(folder / "in", folder / out, **options)


def spans(folder):
    """The names in the file and where their data begin and end, in the file's order."""
    with open(folder / "model.safetensors", "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    found = {name: [8 + length + offset for offset in x["data_offsets"]] for name, x in header.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def check_layout(folder, layers, prefix="model.layers."):
    """What is in no layer comes first; each layer is one piece of whole pages."""
    found = spans(folder)
    runs = []  # (layer or None, first byte, end)
    for name, (first, end) in found.items():
        layer = int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None
        if name.startswith(PADDING):
            runs[-1] = (runs[-1][0], runs[-1][1], end)
        elif runs and runs[-1][0] == layer:
            assert first == runs[-1][2]
            runs[-1] = (layer, runs[-1][1], end)
        else:
            runs.append((layer, first, end))
    assert [layer for layer, _, _ in runs] == [None, *range(layers)]
    assert all(first % PAGE == 0 and end % PAGE == 0 for _, first, end in runs)
    assert all(a[2] == b[1] for a, b in zip(runs, runs[1:]))
    assert runs[-1][2] == (folder / "model.safetensors").stat().st_size
    return found

"""All that the reports of `headstart inspect` show, from a plan and from what was recorded while a model read."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...attention.patterns import MEASURED, HeadPattern
from ...attention.plan import PrefillPlan
from ...attention.recording import attended, visible_blocks
from ..console import spread

if TYPE_CHECKING:
    from ...attention.recording import Recorded

# Past this many characters of attended blocks, a page keeps those of the chosen heads only.
BLOCKS_LIMIT = 4_000_000
OWN = HeadPattern("own", ())  # a layer that ran the model's own attention


def collect(
    plan: PrefillPlan,
    name: str | None,
    layers: int,
    heads: int,
    *,
    recorded: Mapping[int, Recorded] | None = None,
    reading: dict[str, Any] | None = None,
    chosen: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """All that a report shows, JSON-able.

    ``cells[layer][head]`` has ``pattern``, a position in ``patterns``; ``density``, as read, else as the plan has it;
    the plan's ``score`` and ``error``, and after reading ``plan_density``; and ``blocks``, a position in ``blocks``.
    What is not known is missing. ``blocks`` holds what `unpack` reads, and ``chosen`` the heads to draw.
    """
    numbers: dict[HeadPattern, int] = {}
    cells = []
    for layer in range(layers):
        entry = None if recorded is None else recorded.get(layer)
        densities = [1.0] if entry is None else entry.index.head_density(entry.nq, entry.nk).tolist()
        row = []
        for head, pattern in enumerate(plan.heads(layer, heads)):
            planned = {name: value for name in MEASURED if (value := getattr(pattern, name)) is not None}
            if recorded is None:
                if pattern.name == "dense":
                    planned["density"] = 1.0
            else:
                if "density" in planned:
                    planned["plan_density"] = planned["density"]
                planned["density"] = densities[head * len(densities) // heads]
                pattern = pattern if entry else OWN
            row.append({"pattern": numbers.setdefault(pattern, len(numbers)), **planned})
        cells.append(row)
    patterns = [{"name": pattern.name, "params": dict(pattern.params)} for pattern in numbers]
    content = {
        "title": "",
        "layers": layers,
        "heads": heads,
        "plan": name,
        "provenance": list(lines(plan.provenance or {})),
        "model": None if plan.model is None else dict(plan.model),
        "reading": reading,
        "patterns": patterns,
        "cells": cells,
        **_summary(cells, patterns),
        "blocks": [],
        "chosen": [list(head) for head in chosen],
    }
    if recorded is None:
        known = content["density"] is not None
        content["title"] = f"{name}: mean density {content['density']:.3f}" if known else str(name)
    else:
        content["title"] = f"{reading['model']} reads {reading['tokens']:,} tokens at density {content['density']:.3f}"
        content["chosen"] = content["chosen"] or [list(head) for head in _telling_heads(content)]
        _add_blocks(content, recorded)
    return content


def _summary(cells: list[list[dict]], patterns: list[dict]) -> dict[str, Any]:
    """The mean density of all heads and, by pattern, how many there are and the means of what is known of them all."""

    def mean(of: list[dict], name: str) -> float | None:
        return math.fsum(cell[name] for cell in of) / len(of) if all(name in cell for cell in of) else None

    everyone = [cell for row in cells for cell in row]
    groups: dict[str, list[dict]] = {}
    for cell in everyone:
        groups.setdefault(patterns[cell["pattern"]]["name"], []).append(cell)
    summary = [
        {"pattern": name, "heads": len(group), "density": mean(group, "density"), "error": mean(group, "error")}
        for name, group in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    return {"density": mean(everyone, "density"), "error": mean(everyone, "error"), "summary": summary}


def _telling_heads(content: dict[str, Any]) -> list[tuple[int, int]]:
    """Of each sparse pattern the sparsest, the densest, the median, and more if there is one pattern only."""
    groups: dict[str, dict[float, tuple[int, int]]] = {}
    for layer, row in enumerate(content["cells"]):
        for head, cell in enumerate(row):
            name = content["patterns"][cell["pattern"]]["name"]
            if name != OWN.name:  # heads of one density look alike: one is enough
                groups.setdefault(name, {}).setdefault(cell["density"], (layer, head))
    sparse = {name: group for name, group in groups.items() if name != "dense"} or groups
    count = 5 if len(sparse) == 1 else 3
    return [head for group in sparse.values() for _, head in spread(sorted(group.items()), count)]


def _add_blocks(content: dict[str, Any], recorded: Mapping[int, Recorded]) -> None:
    """Fills in ``blocks``, and where each head's are."""
    if not recorded:
        return
    heads, first = content["heads"], next(iter(recorded.values()))
    visible = visible_blocks(first.nq, first.nk, first.index.block_q, first.index.block_k)
    content["reading"] |= {"block_q": first.index.block_q, "block_k": first.index.block_k}
    content["reading"] |= {"visible": visible.sum(-1).tolist()}
    held = sum(entry.index.block_count.shape[1] for entry in recorded.values())
    keep_all = held * int(visible.sum()) / 6 <= BLOCKS_LIMIT
    for layer, entry in recorded.items():
        blocks, columns = attended(entry)
        places: dict[int, int] = {}
        for head, cell in enumerate(content["cells"][layer]):
            if keep_all or [layer, head] in content["chosen"]:
                shared = head * len(blocks) // heads
                if shared not in places:
                    places[shared] = len(content["blocks"])
                    content["blocks"].append(
                        pack(blocks[shared], None if columns is None else columns[shared], visible)
                    )
                cell["blocks"] = places[shared]


def pack(blocks: torch.Tensor, columns: torch.Tensor | None, visible: torch.Tensor) -> dict[str, str]:
    """A head's attended blocks, bool [query blocks, key blocks], as base64.

    ``bits`` has a bit for each visible block, row by row, the lowest bit of a byte first; ``columns``, if the head has
    any, a byte for each key block (of one row for all, or of every row): the share that single keys attend, up to 255.
    """
    bits = np.packbits(blocks.cpu().numpy()[visible.numpy()], bitorder="little")
    packed = {"bits": base64.b64encode(bits.tobytes()).decode()}
    if columns is not None:
        share = (columns * 255).round().to(torch.uint8).cpu().numpy()
        packed["columns"] = base64.b64encode(share.tobytes()).decode()
    return packed


def unpack(packed: Mapping[str, str], visible: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(bool [query blocks, key blocks], the attended share of each key block, float32 of the same shape) of `pack`."""
    rows, key_blocks = len(visible), max(visible)
    seen = np.arange(key_blocks) < np.array(visible)[:, None]
    bits = np.frombuffer(base64.b64decode(packed["bits"]), np.uint8)
    blocks = np.zeros((rows, key_blocks), bool)
    blocks[seen] = np.unpackbits(bits, count=int(seen.sum()), bitorder="little")
    share = blocks.astype(np.float32)
    if "columns" in packed:
        columns = np.frombuffer(base64.b64decode(packed["columns"]), np.uint8).reshape(-1, key_blocks)
        share = np.maximum(share, seen * columns.astype(np.float32) / 255)
    return blocks, share


def lines(content: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """A nested object as lines of (name, text)."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from lines(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in content):
        for i, item in enumerate(content):
            yield from lines(item, f"{name}[{i}]")
    elif content is not None:
        yield name, ", ".join(map(str, content)) if isinstance(content, (list, tuple)) else str(content)

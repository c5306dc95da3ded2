"""The folder of a fixed context: context.safetensors and context.json.

The tensors of layer i have names ``layers.i.<field>``. Loading maps them and does not copy them. The JSON file has the
fingerprint of the model and of the tokens, the rotary embedding, and a CRC-32 of every tensor.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._expect import checker
from .._files import read_json_object, write_whole_folder
from ..ops.centroid_lookup import KeyClusters
from .layer import BLOCK, LEVELS, PARENT_GRID, SHARES, LayerContext, Rope

FORMAT = "headstart.context"
VERSION = 2
TENSORS, DESCRIPTION = "context.safetensors", "context.json"
CLUSTER_FIELDS = ("centroids", "cluster_offsets", "order")
PARENT_FIELDS = ("parent_centroids", "parent_offsets")
LAYER_FIELDS = ("keys", "values", "queries", "scores", "errors")
PARENT_SCORES = ("parent_scores", "child_scores")


def save(folder: str | os.PathLike, layers: Sequence[LayerContext], rope: Rope | None, **description) -> None:
    """Writes a context's folder, whole or not at all.

    `description` has the other fields of `Context`: the model, the tokens, their hash and the settings.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / DESCRIPTION).exists())):
        raise ValueError(f"Context.save: folder: expected a new folder, an empty one or a context's, got {folder}")
    tensors = {f"layers.{i}.{name}": x.contiguous() for i, layer in enumerate(layers) for name, x in _fields(layer)}
    content = {
        "format": FORMAT,
        "version": VERSION,
        **description,
        "rope": None if rope is None else asdict(rope),
        "layers": len(layers),
        "parents": layers[0].parent_scores is not None,
        "checksums": {name: _checksum(x) for name, x in tensors.items()},
    }

    def write(partial: Path) -> None:
        save_file(tensors, partial / TENSORS)
        (partial / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    write_whole_folder(folder, write)


def _fields(layer: LayerContext) -> list[tuple[str, torch.Tensor]]:
    own = [(name, getattr(layer, name)) for name in (*LAYER_FIELDS, *PARENT_SCORES)]
    clusters = [(name, getattr(layer.clusters, name)) for name in (*CLUSTER_FIELDS, *PARENT_FIELDS)]
    return [(name, x) for name, x in own + clusters if x is not None]


def _checksum(x: torch.Tensor) -> int:
    return zlib.crc32(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def load(folder: str | os.PathLike, *, verify: bool) -> dict[str, Any]:
    """Reads a folder, and returns the arguments that `save` got. With `verify`, it compares the checksums.

    Raises a ValueError or a FileNotFoundError that names the damaged or missing file or field.
    """
    folder = Path(folder)
    for name in (DESCRIPTION, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"Context.load: folder: expected a folder with {name}, got {folder}")
    content = _read_description(folder / DESCRIPTION)
    path = folder / TENSORS
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != content["checksums"].keys():
                odd = sorted(names ^ content["checksums"].keys())[0]
                raise ValueError(f"{path}: {odd}: expected the tensors that {DESCRIPTION} lists")
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    if verify:
        for name, x in tensors.items():
            if _checksum(x) != content["checksums"][name]:
                raise ValueError(f"{path}: {name}: expected the checksum that {DESCRIPTION} has; the data are damaged")
    layers = []
    for i in range(content["layers"]):
        try:
            layers.append(_layer(tensors, f"layers.{i}.", content))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: layers.{i}: {error}") from None
    rope = content["rope"]
    rope = None if rope is None else Rope(tuple(rope["inv_freq"]), rope["interleaved"])
    description = {name: content[name] for name in ("model", "tokens", "token_hash", "settings")}
    return {"layers": tuple(layers), "rope": rope, **description}


def _read_description(path: Path) -> dict[str, Any]:
    content = read_json_object(path)
    expect = checker(path)
    expect(content.get("format") == FORMAT, "format", repr(FORMAT), content.get("format"))
    expect(content.get("version") == VERSION, "version", str(VERSION), content.get("version"))
    for name, kind, words in (
        ("model", dict, "an object"),
        ("tokens", int, "an integer"),
        ("token_hash", str, "a string"),
        ("settings", dict, "an object"),
        ("layers", int, "an integer"),
        ("parents", bool, "true or false"),
        ("checksums", dict, "an object"),
    ):
        expect(type(content.get(name)) is kind, name, words, content.get(name))
    expect(content["layers"] >= 1, "layers", "at least 1", content["layers"])
    rope = content.get("rope", "nothing")
    good = rope is None or (
        isinstance(rope, dict)
        and type(rope.get("interleaved")) is bool
        and isinstance(rope.get("inv_freq"), list)
        and all(type(x) in (int, float) for x in rope["inv_freq"])
    )
    expect(good, "rope", "null, or inv_freq and interleaved", rope)
    return content


def _layer(tensors: dict[str, torch.Tensor], prefix: str, content: dict[str, Any]) -> LayerContext:
    def get(name: str, *shape: int | None) -> torch.Tensor:
        x = tensors.get(prefix + name)
        if x is None:
            raise ValueError(f"{name}: expected a tensor, which {DESCRIPTION} does not list")
        if shape and (x.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, x.shape))):
            raise ValueError(f"{name}: expected {['any' if n is None else n for n in shape]}, got {list(x.shape)}")
        return x

    names = CLUSTER_FIELDS + (PARENT_FIELDS if content["parents"] else ())
    clusters = KeyClusters(**{name: get(name) for name in names}).validate("KeyClusters")
    heads, m = clusters.order.shape
    d, n = clusters.centroids.shape[2], content["tokens"]
    if m % BLOCK or m > n:
        raise ValueError(f"order: expected a multiple of {BLOCK} keys, at most {n}, got {m}")
    extra = {}
    if content["parents"]:
        extra["parent_scores"] = get("parent_scores", heads, LEVELS)
        extra["child_scores"] = get("child_scores", len(PARENT_GRID), heads, LEVELS)
    keys, values = get("keys", heads, n, d), get("values", heads, n, None)
    scores, errors = get("scores", heads, LEVELS), get("errors", heads, len(SHARES))
    return LayerContext(keys, values, clusters, get("queries", None, None, d), scores, errors, **extra)

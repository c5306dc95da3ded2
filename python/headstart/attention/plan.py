"""A prefill plan: which sparse pattern each attention head uses when a prompt is read.

A plan has one pattern for all heads, or a default and other patterns for some heads of some layers, which a search
finds. Its file is JSON. This module also reads and writes MInference's pattern files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .._expect import expect_value
from .._files import write_whole
from ..ops.sparse_attention import BlockIndex
from .index import pattern_index, stitch
from .patterns import MEASURED, PATTERNS, HeadPattern, PlanError

FORMAT = "headstart.prefill_plan"
VERSION = 1
FINGERPRINT = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class PrefillPlan:
    """The pattern of every head of a model.

    - ``default``: the pattern of every head that ``layers`` does not list.
    - ``layers``: ``layers[i][h]`` is the pattern of head h in layer i.
    - ``model``: the fingerprint of a model, or None. A plan with a fingerprint is accepted for this model only.
    - ``provenance``: how a search found the plan: the machine, the texts, the versions, the budget.
    """

    default: HeadPattern
    layers: tuple[Mapping[int, HeadPattern], ...] = ()
    model: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = field(default=None, compare=False)

    @classmethod
    def uniform(cls, pattern: str = "adaptive", **params) -> PrefillPlan:
        """A plan with one pattern for all heads.

        The patterns are dense, a_shape(sink, local), vertical_slash(vertical_size, slash_size), block_topk(top_k) and
        adaptive(threshold, stride). `patterns.py` lists all options of each. Raises a ValueError if the pattern or an
        option is wrong.
        """
        return cls(HeadPattern.of(pattern, **params))

    def for_model(self, model) -> PrefillPlan:
        """The same plan, tied to a transformers model."""
        return replace(self, model=fingerprint(model.config.get_text_config()))

    def heads(self, layer: int, num_heads: int) -> list[HeadPattern]:
        """The patterns of the heads of a layer."""
        listed = self.layers[layer] if layer < len(self.layers) else {}
        return [listed.get(head, self.default) for head in range(num_heads)]

    @property
    def is_dense(self) -> bool:
        """Whether all patterns of the plan are dense."""
        listed = [pattern for layer in self.layers for pattern in layer.values()]
        return all(pattern.name == "dense" for pattern in [self.default, *listed])

    def check(self, model: Mapping[str, Any]) -> None:
        """Raises a ValueError, which names what differs, if the plan is not for the model with this fingerprint."""
        differing = [
            f"{name}: expected {self.model[name]!r}, got {model[name]!r}"
            for name in FINGERPRINT
            if self.model is not None and name in self.model and self.model[name] != model[name]
        ]
        if self.layers and len(self.layers) != model["num_hidden_layers"]:
            differing.append(f"layers: expected {len(self.layers)}, got {model['num_hidden_layers']}")
        largest = max((head for layer in self.layers for head in layer), default=0)
        if largest >= model["num_attention_heads"]:
            differing.append(f"heads: expected more than {largest}, got {model['num_attention_heads']}")
        if differing:
            raise ValueError(f"PrefillPlan: the plan is for another model: {'; '.join(differing)}")

    def index(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        *,
        kv_start: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> BlockIndex:
        """The index of a layer: the keys that its queries attend.

        Args:
            q, k: queries [B, Hq, Nq, D] and keys [B, Hkv, Nk, D], as in the index builders (`ops/prefill_index.py`).
            kv_start: int32 [B], the first real key of each sequence of a left-padded batch.
            scale: 1 / sqrt(D) if None.
        """
        patterns = self.heads(layer, q.shape[1])
        families: dict[HeadPattern, list[int]] = {}
        for head, pattern in enumerate(patterns):
            families.setdefault(pattern.family, []).append(head)
        if len(families) == 1:
            return pattern_index(patterns, q, k, kv_start, scale)
        group = q.shape[1] // k.shape[1]
        parts = [
            (
                heads,
                pattern_index(
                    [patterns[h] for h in heads], q[:, heads], k[:, [h // group for h in heads]], kv_start, scale
                ),
            )
            for heads in families.values()
        ]
        return stitch(parts, q.shape[0])

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan as JSON. The file appears whole or not at all."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": None if self.model is None else dict(self.model),
            "provenance": None if self.provenance is None else dict(self.provenance),
            "default": _pattern_to_json(self.default),
            "layers": [{str(head): _pattern_to_json(p) for head, p in layer.items()} for layer in self.layers],
        }
        _write_json(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike) -> PrefillPlan:
        """Reads a file that `save` wrote.

        Raises a ValueError that names the file and the field if the file is damaged, and a FileNotFoundError if there
        is no file.
        """
        content = _read_json("PrefillPlan.load", path)
        if isinstance(content, list):
            raise ValueError(f"{path}: a list, as in MInference's files: read it with PrefillPlan.from_minference")
        expect_value(isinstance(content, dict), path, "the file", "a JSON object", content)
        expect_value(content.get("format") == FORMAT, path, "format", repr(FORMAT), content.get("format"))
        expect_value(content.get("version") == VERSION, path, "version", str(VERSION), content.get("version"))
        model, layers, provenance = (content.get(name) for name in ("model", "layers", "provenance"))
        expect_value(model is None or isinstance(model, dict), path, "model", "an object or null", model)
        for name, value in (model or {}).items():
            expect_value(name in FINGERPRINT, path, "model", f"the fields {', '.join(FINGERPRINT)}", name)
            wanted = str if name == "model_type" else int
            expect_value(type(value) is wanted, path, f"model.{name}", wanted.__name__, value)
        good = provenance is None or isinstance(provenance, dict)
        expect_value(good, path, "provenance", "an object or null", provenance)
        return cls(
            _pattern_from_json(path, "default", content.get("default")),
            _layers_from_json(path, "layers", layers, _pattern_from_json),
            model,
            provenance,
        )

    @classmethod
    def from_minference(cls, path: str | os.PathLike) -> PrefillPlan:
        """Reads MInference's file: a list over layers of {head: [type, number, number, score]}.

        The types are vertical_and_slash (the numbers are columns and diagonals), stream_llm (sink and local) and
        block_sparse (blocks a row, and 1; MInference's own kernel always takes 100 blocks). As in MInference, a head
        that is not listed is vertical-slash with 1,000 columns and 6,096 diagonals. The errors are those of `load`.
        """
        layers = _read_json("PrefillPlan.from_minference", path)
        return cls(_MINFERENCE_DEFAULT, _layers_from_json(path, "layers", layers, _pattern_from_minference))

    def to_minference(self, path: str | os.PathLike) -> None:
        """Writes MInference's file.

        The file has no place for some options (sink, local, last_q), which are left out. It has no adaptive or dense
        pattern: a plan with one raises a ValueError that names the layer and the head. A plan that does not know its
        numbers of layers and heads also raises a ValueError; `for_model` adds them.
        """
        if self.model is not None:
            count, heads = self.model["num_hidden_layers"], self.model["num_attention_heads"]
            layers = [dict(enumerate(self.heads(layer, heads))) for layer in range(count)]
        elif self.layers and self.default == _MINFERENCE_DEFAULT:
            layers = self.layers
        else:
            raise ValueError(
                "PrefillPlan.to_minference: plan: expected one that knows its numbers of layers and heads "
                "(plan.for_model(model)), got one for any model"
            )
        _write_json(
            path,
            [
                {str(h): _pattern_to_minference(f"layers[{i}][{h}]", p) for h, p in x.items()}
                for i, x in enumerate(layers)
            ],
        )


def plan_of(op: str, prefill: str | os.PathLike | PrefillPlan) -> PrefillPlan:
    """The plan that a user gave: a plan itself, the name of a pattern, or the path of a plan's file."""
    if isinstance(prefill, PrefillPlan):
        return prefill
    if isinstance(prefill, str) and prefill in PATTERNS:
        return PrefillPlan.uniform(prefill)
    if isinstance(prefill, os.PathLike) or (isinstance(prefill, str) and (Path(prefill).suffix or os.sep in prefill)):
        return PrefillPlan.load(prefill)
    expected = f"one of {', '.join(PATTERNS)}, a PrefillPlan, or the path of one"
    raise ValueError(f"{op}: prefill: expected {expected}, got {prefill!r}")


def fingerprint(config) -> dict[str, Any]:
    """The fields of a transformers (text) config that identify a model for a plan."""
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


# --- files ---------------------------------------------------------------------------------------------------------

_MINFERENCE_DEFAULT = HeadPattern.of("vertical_slash", vertical_size=1000, slash_size=6096)


def _read_json(op: str, path: str | os.PathLike) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{op}: path: expected a file, got {str(path)!r}, which is not one")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None


def _write_json(path: str | os.PathLike, content: Any) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _layers_from_json(path, field: str, layers: Any, parse: Callable) -> tuple[dict[int, HeadPattern], ...]:
    expect_value(isinstance(layers, list), path, field, "a list over layers", layers)
    parsed = []
    for i, layer in enumerate(layers):
        expect_value(isinstance(layer, dict), path, f"{field}[{i}]", "an object with a pattern for each head", layer)
        for head in layer:
            expect_value(head.isascii() and head.isdigit(), path, f"{field}[{i}]", "head numbers", head)
        parsed.append({int(head): parse(path, f"{field}[{i}][{head}]", p) for head, p in layer.items()})
    return tuple(parsed)


def _pattern_to_json(pattern: HeadPattern) -> dict[str, Any]:
    measured = {name: getattr(pattern, name) for name in MEASURED}
    return {"pattern": pattern.name, **dict(pattern.params)} | {n: x for n, x in measured.items() if x is not None}


def _pattern_from_json(path, field: str, content: Any) -> HeadPattern:
    expect_value(isinstance(content, dict), path, field, "an object", content)
    expect_value("pattern" in content, path, f"{field}.pattern", f"one of {', '.join(PATTERNS)}", None)
    return _checked(path, field, content)


def _checked(path, field: str, content: dict[str, Any]) -> HeadPattern:
    for name, parameter in MEASURED.items():
        value = content.get(name)
        expect_value(parameter.accepts(value), path, f"{field}.{name}", parameter.expected, value)
    try:
        return HeadPattern.of(**content)
    except PlanError as error:
        raise ValueError(f"{path}: {field}.{error.field}: expected {error.expected}, got {error.got!r}") from None


_MINFERENCE = {
    "vertical_and_slash": ("vertical_slash", "vertical_size", "slash_size"),
    "stream_llm": ("a_shape", "sink", "local"),
    "block_sparse": ("block_topk", "top_k", None),
}


def _pattern_from_minference(path, field: str, content: Any) -> HeadPattern:
    expect_value(isinstance(content, list) and len(content) == 4, path, field, "[type, number, number, score]", content)
    kind, first, second, score = content
    known = isinstance(kind, str) and kind in _MINFERENCE
    expect_value(known, path, f"{field}[0]", f"one of {', '.join(_MINFERENCE)}", kind)
    pattern, first_name, second_name = _MINFERENCE[kind]
    numbers = {first_name: first} | ({second_name: second} if second_name else {"sink": 0, "local": 0})
    return _checked(path, field, {"pattern": pattern, **numbers, "score": score})


def _pattern_to_minference(field: str, pattern: HeadPattern) -> list:
    for kind, (name, first, second) in _MINFERENCE.items():
        if pattern.name == name:
            params = dict(pattern.params)
            return [
                kind,
                params[first],
                params[second] if second else 1,
                1.0 if pattern.score is None else pattern.score,
            ]
    known = ", ".join(name for name, _, _ in _MINFERENCE.values())
    raise ValueError(f"PrefillPlan.to_minference: {field}: expected one of {known}, got {pattern.name!r}")

"""Which sparse pattern every attention head uses in prefill: the plan, its file, and the index it leads to.

A plan is one pattern for all heads, or a default and exceptions by layer and head, as an offline search finds them.
Its file is JSON; MInference's pattern files are read and written too.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .._expect import expect_value
from .._files import write_whole
from ..ops.prefill_index import a_shape_index, adaptive_block_index, block_topk_index, vertical_slash_index
from ..ops.sparse_attention import BlockIndex

FORMAT = "headstart.prefill_plan"
VERSION = 1
FINGERPRINT = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class _Parameter:
    default: Any
    expected: str
    accepts: Callable[[Any], bool]


def _tokens(default: int, least: int = 1) -> _Parameter:
    return _Parameter(default, f"an integer, at least {least}", lambda x: type(x) is int and x >= least)


_cap = _Parameter(None, "an integer, at least 1, or none", lambda x: x is None or (type(x) is int and x >= 1))
_share = _Parameter(0.93, "a number above 0 and up to 1", lambda x: type(x) in (int, float) and 0 < x <= 1)
_stride = _Parameter(16, "4, 8, 16 or 32", lambda x: type(x) is int and x in (4, 8, 16, 32))

# The defaults keep between a fifth and 35 % of the attention of SmolLM2-135M at 8,192 tokens
# (docs/measurements/attention.md has the curve that adaptive's threshold was chosen from).
PATTERNS: dict[str, dict[str, _Parameter]] = {
    "dense": {},
    "a_shape": {"sink": _tokens(128, 0), "local": _tokens(1024, 0)},
    "vertical_slash": {
        "vertical_size": _tokens(1000),
        "slash_size": _tokens(1024),
        "last_q": _tokens(64),
        "sink": _tokens(30, 0),
        "local": _tokens(100, 0),
    },
    "block_topk": {"top_k": _tokens(24), "sink": _tokens(1, 0), "local": _tokens(1, 0)},
    "adaptive": {
        "threshold": _share,
        "stride": _stride,
        "sink": _tokens(1, 0),
        "local": _tokens(1, 0),
        "max_blocks": _cap,
        "samples": _Parameter(4, "an integer from 0 to 64", lambda x: type(x) is int and 0 <= x <= 64),
    },
}


def _measured(expected: str, least: float, most: float) -> _Parameter:
    return _Parameter(None, expected, lambda x: x is None or (type(x) in (int, float) and least <= x <= most))


# Of a head's pattern, by a search.
MEASURED: dict[str, _Parameter] = {
    "score": _measured("a finite number", -sys.float_info.max, sys.float_info.max),
    "error": _measured("a finite number, at least 0", 0, sys.float_info.max),
    "density": _measured("a number from 0 to 1", 0, 1),
}


class PlanError(ValueError):
    """A value that a plan cannot have; `field` says where."""

    def __init__(self, field: str, expected: str, got: object):
        super().__init__(f"PrefillPlan: {field}: expected {expected}, got {got!r}")
        self.field, self.expected, self.got = field, expected, got


@dataclass(frozen=True)
class HeadPattern:
    """One head's pattern: ``HeadPattern.of("a_shape", sink=64)``; what is not given has its default.

    What a search measured goes with it and plays no part in what is computed: ``score`` (MInference's files have one),
    ``error``, the relative error of the head's output, and ``density``, the share of the attention that it computes.
    """

    name: str
    params: tuple[tuple[str, Any], ...]
    score: float | None = field(default=None, compare=False)
    error: float | None = field(default=None, compare=False)
    density: float | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        pattern: str,
        *,
        score: float | None = None,
        error: float | None = None,
        density: float | None = None,
        **params,
    ) -> HeadPattern:
        if not isinstance(pattern, str) or pattern not in PATTERNS:
            raise PlanError("pattern", f"one of {', '.join(PATTERNS)}", pattern)
        known = PATTERNS[pattern]
        for name, value in params.items():
            if name not in known:
                raise PlanError(name, f"a parameter of {pattern} ({', '.join(known) or 'it has none'})", name)
            if not known[name].accepts(value):
                raise PlanError(name, known[name].expected, value)
        return cls(
            pattern, tuple((name, params.get(name, p.default)) for name, p in known.items()), score, error, density
        )

    @property
    def family(self) -> HeadPattern:
        """Heads of one family are built in one call: the pattern, less what may differ from head to head."""
        return HeadPattern.of("adaptive", **dict(self.params) | {"threshold": 1}) if self.name == "adaptive" else self


@dataclass(frozen=True)
class PrefillPlan:
    """The pattern of every head of a model.

    ``layers[i][h]`` is the pattern of head h in layer i; a head that is not listed has ``default``. ``model``, where
    given, is the fingerprint of the model that the plan is for, and a plan is only accepted for that model.
    ``provenance`` says where a searched plan comes from: the machine, the texts, the versions, the budget.
    """

    default: HeadPattern
    layers: tuple[Mapping[int, HeadPattern], ...] = ()
    model: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = field(default=None, compare=False)

    @classmethod
    def uniform(cls, pattern: str = "adaptive", **params) -> PrefillPlan:
        """One pattern for all heads: dense, a_shape(sink, local), vertical_slash(vertical_size, slash_size),
        block_topk(top_k) or adaptive(threshold, stride), each also with the other options of its index builder."""
        return cls(HeadPattern.of(pattern, **params))

    def for_model(self, model) -> PrefillPlan:
        """The same plan, tied to a transformers model."""
        return replace(self, model=fingerprint(model.config.get_text_config()))

    def heads(self, layer: int, num_heads: int) -> list[HeadPattern]:
        listed = self.layers[layer] if layer < len(self.layers) else {}
        return [listed.get(head, self.default) for head in range(num_heads)]

    @property
    def is_dense(self) -> bool:
        listed = [pattern for layer in self.layers for pattern in layer.values()]
        return all(pattern.name == "dense" for pattern in [self.default, *listed])

    def check(self, model: Mapping[str, Any]) -> None:
        """Raises ValueError, naming what differs, if the plan is not for the model with this fingerprint."""
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
        """The keys that a layer's queries [B, Hq, Nq, D] attend among its keys [B, Hkv, Nk, D]."""
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
        """Writes the plan as JSON; the file appears whole or not at all."""
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
        """Reads what `save` wrote; a damaged file is a ValueError that names the file and the field."""
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

        Types and numbers are vertical_and_slash (columns, diagonals), stream_llm (sink, local) and block_sparse
        (blocks a row, and 1; MInference's own kernel always takes 100 blocks). As in MInference, a head that is not
        listed is vertical-slash with 1,000 columns and 6,096 diagonals.
        """
        layers = _read_json("PrefillPlan.from_minference", path)
        return cls(_MINFERENCE_DEFAULT, _layers_from_json(path, "layers", layers, _pattern_from_minference))

    def to_minference(self, path: str | os.PathLike) -> None:
        """Writes MInference's file. Options that it has no place for (sink, local, last_q) are left out; a pattern
        that it does not know (adaptive, dense) is a ValueError that names the layer and the head."""
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


def fingerprint(config) -> dict[str, Any]:
    """What a plan must agree on with a model, from a transformers (text) config."""
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


# --- indices -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def full_index(nq: int, nk: int, device: torch.device) -> BlockIndex:
    """Every key block that causality lets a query block see; one head and one batch, for all."""
    rows, blocks = -(-nq // 64), -(-nk // 64)
    last_query = torch.arange(1, rows + 1, device=device).mul(64).clamp(max=nq) - 1
    count = ((last_query + nk - nq) // 64 + 1).to(torch.int32)
    ids = torch.arange(blocks, dtype=torch.int32, device=device)
    return BlockIndex(count[None, None], ids.expand(1, 1, rows, blocks))


@functools.lru_cache(maxsize=16)
def _shared_a_shape(nq: int, nk: int, sink: int, local: int, device: torch.device) -> BlockIndex:
    return a_shape_index(nq, nk, sink=sink, local=local, device=device)


def window_index(nq: int, nk: int, window: int, device: torch.device) -> BlockIndex:
    """Every key block that a sliding window lets a query block see; one head and one batch, for all."""
    return _shared_a_shape(nq, nk, 0, window, device)


def pattern_index(patterns: Sequence[HeadPattern], q, k, kv_start, scale) -> BlockIndex:
    """The index of heads of one family: patterns of one name that differ in their thresholds alone."""
    name, params = patterns[0].name, dict(patterns[0].params)
    nq, nk = q.shape[2], k.shape[2]
    if name == "dense":
        return full_index(nq, nk, q.device)
    if name == "a_shape" and kv_start is None:
        return _shared_a_shape(nq, nk, params["sink"], params["local"], q.device)
    if name == "a_shape":
        return a_shape_index(nq, nk, **params, kv_start=kv_start)
    if name == "vertical_slash":
        return vertical_slash_index(q, k, **params, kv_start=kv_start, scale=scale)
    if name == "block_topk":
        return block_topk_index(q, k, **params, kv_start=kv_start)
    thresholds = [dict(pattern.params)["threshold"] for pattern in patterns]
    if len(set(thresholds)) > 1:
        params["head_threshold"] = torch.tensor(thresholds, dtype=torch.float32, device=q.device)
    return adaptive_block_index(q, k, **params, kv_start=kv_start, scale=scale)


def stitch(parts: Sequence[tuple[Sequence[int], BlockIndex]], batch: int) -> BlockIndex:
    """One index from those of disjoint groups of heads, each given with the heads it is for."""
    order = torch.tensor([head for heads, _ in parts for head in heads]).argsort().tolist()
    capacity = max(index.block_index.shape[-1] for _, index in parts)
    counts = [index.block_count.expand(batch, len(heads), -1) for heads, index in parts]
    blocks = [
        F.pad(index.block_index, (0, capacity - index.block_index.shape[-1])).expand(batch, len(heads), -1, -1)
        for heads, index in parts
    ]
    columns = [(index.column_count, index.column_index) for _, index in parts]
    given = [ids for _, ids in columns if ids is not None]
    column_count = column_index = None
    if given:
        rows, width = max(ids.shape[2] for ids in given), max(ids.shape[3] for ids in given)
        column_counts, column_ids = [], []
        for (heads, index), (count, ids) in zip(parts, columns, strict=True):
            if ids is None:
                count = index.block_count.new_zeros(1, 1, 1)
                ids = index.block_index.new_zeros(1, 1, 1, 0)
            column_counts.append(count.expand(batch, len(heads), rows))
            column_ids.append(F.pad(ids, (0, width - ids.shape[3])).expand(batch, len(heads), rows, -1))
        column_count = torch.cat(column_counts, 1)[:, order]
        column_index = torch.cat(column_ids, 1)[:, order]
    return BlockIndex(torch.cat(counts, 1)[:, order], torch.cat(blocks, 1)[:, order], column_count, column_index)


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

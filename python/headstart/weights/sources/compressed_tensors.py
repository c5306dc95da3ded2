"""int4 checkpoints of compressed-tensors, in its format "pack-quantized"."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch

from ...ops.int4_gemm import Int4Weight
from .packed import Int4Source, Read

NO_MATCH = 3


class CompressedTensors(Int4Source):
    METHOD = "compressed-tensors"
    FIELDS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    OPTIONAL = ("weight_zero_point", "weight_g_idx")
    MARKS = {"weight_packed": "compressed-tensors"}

    def check(self) -> None:
        get, expect = self.settings.get, self.expect
        groups = get("config_groups")
        expect(isinstance(groups, dict) and len(groups) > 0, "config_groups", "at least one group", groups)
        for key in ("kv_cache_scheme", "transform_config"):
            expect(not get(key), key, "none", get(key))
        sparsity = (get("sparsity_config") or {}).get("format", "dense")
        expect(sparsity == "dense", "sparsity_config: format", "'dense'", sparsity)
        self._groups, self._ignore = groups, get("ignore") or []

    def plan(self, layer: str, fields: Collection[str]) -> Read:
        ignored = any(matches(layer, pattern) for pattern in self._ignore)
        self.expect(not ignored, "ignore", f"no name of {layer}", self._ignore)
        ranks = {name: _rank(layer, group.get("targets") or []) for name, group in self._groups.items()}
        group = min(ranks, key=ranks.get)
        named = ranks[group] < NO_MATCH
        self.expect(named, "config_groups", f"a group whose targets name {layer}", list(self._groups))
        size, symmetric, ordered = self._scheme(f"config_groups: {group}: ", self._groups[group])
        for field, needed in (("weight_zero_point", not symmetric), ("weight_g_idx", ordered)):
            if needed and field not in fields:
                raise ValueError(f"{field}: expected a tensor, as config_groups: {group} says; no file has it")
        return partial(_read, size)

    def _scheme(self, where: str, group: Mapping[str, Any]) -> tuple[int, bool, bool]:
        """(group size, symmetric, act-order) of a config group that a layer is in."""
        weights, expect = group.get("weights") or {}, self.expect
        kind = group.get("format") or self.settings.get("format")  # the config's may be "mixed-precision"
        expect(kind == "pack-quantized", f"{where}format", "'pack-quantized'", kind)
        where_weights = f"{where}weights: "
        expect(weights.get("num_bits") == 4, f"{where_weights}num_bits", "4", weights.get("num_bits"))
        expect(weights.get("type", "int") == "int", f"{where_weights}type", "'int'", weights.get("type"))
        strategy, order = weights.get("strategy"), weights.get("actorder")
        expect(strategy in ("group", "channel"), f"{where_weights}strategy", "'group' or 'channel'", strategy)
        good = order in (None, "group", "dynamic", "weight", "static")
        expect(good, f"{where_weights}actorder", "null, 'group' (or 'dynamic') or 'weight' (or 'static')", order)
        activations = group.get("input_activations")
        expect(not activations, f"{where}input_activations", "none", activations)
        size = -1 if strategy == "channel" else weights.get("group_size")
        self.expect_group_size(f"{where_weights}group_size", size)
        return size, bool(weights.get("symmetric", True)), order in ("group", "dynamic")


def _read(group_size: int, tensors: dict[str, torch.Tensor]) -> Int4Weight:
    return Int4Weight.from_compressed_tensors(tensors, group_size)


def _rank(name: str, targets: list[str]) -> int:
    """How closely a group's targets name a layer: in compressed-tensors a name goes before a pattern before a class."""
    if name in targets:
        return 0
    if any(target.startswith("re:") and matches(name, target) for target in targets):
        return 1
    return 2 if "Linear" in targets else NO_MATCH


def matches(name: str, pattern: str) -> bool:
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern in (name, "Linear")

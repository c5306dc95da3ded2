"""Int4 checkpoints of other makers, one layer at a time: AWQ, GPTQ and compressed-tensors, with codes as they are.

A layer is quantised if the files have its quantised tensors; lists of exceptions in the config must not contradict
that. Every field of the config that changes what the tensors mean is read, or refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._checkpoint_files import CheckpointFiles
from ..ops.int4_gemm import Int4Weight
from .quantizer import Waiting, submodule, tied_weights

FIELDS = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
}
OPTIONAL = ("g_idx", "weight_zero_point", "weight_g_idx")
METHODS = tuple(FIELDS)
# From a layer's name in the checkpoint and the fields that it has there, what reads its tensors.
Plan = Callable[[str, Collection[str]], Callable[[dict[str, torch.Tensor]], Int4Weight]]
Expect = Callable[[bool, str, str, object], None]


class Int4Checkpoint:
    """A folder's quantised layers, as the quantiser's source (`quantizer.py`).

    Args:
        folder: of safetensors files.
        quantization: the ``quantization_config`` of its config.json; its ``quant_method`` is one of `METHODS`.

    Raises:
        ValueError or FileNotFoundError: naming the file and the field or tensor.
    """

    def __init__(self, folder: str | Path, quantization: Mapping[str, Any]):
        method, self._config = quantization["quant_method"], Path(folder) / "config.json"
        plan = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}[method]
        plan = plan(dict(quantization), self._expect)
        self.files = CheckpointFiles(folder)
        self._fields: dict[str, list[str]] = {}  # by layer
        for name in self.files.names():
            layer, _, field = name.rpartition(".")
            if field in FIELDS[method]:
                self._fields.setdefault(layer, []).append(field)
        if not self._fields:
            raise ValueError(f"{folder}: expected {FIELDS[method][0]} tensors, as the config says {method!r}, got none")
        self._read = {}
        for layer, fields in self._fields.items():
            try:
                for field in FIELDS[method]:
                    if field not in fields and field not in OPTIONAL:
                        raise ValueError(f"{field}: expected a tensor beside {', '.join(fields)}; no file has it")
                self._read[layer] = plan(layer, fields)
            except ValueError as error:
                raise ValueError(f"{self._where(layer)}: {error}") from None

    def _expect(self, good: bool, field: str, expected: str, got: object) -> None:
        if not good:
            raise ValueError(f"{self._config}: quantization_config: {field}: expected {expected}, got {got!r}")

    def _where(self, layer: str) -> str:
        return f"{self.files.path(f'{layer}.{self._fields[layer][0]}')}: {layer}"

    def plain(self, model: nn.Module, rename: Callable[[str], str]) -> dict[str, Any]:
        """What transformers loads: the tensors that do not belong to an int4 layer, unread."""
        taken = {f"{layer}.{field}" for layer, fields in self._fields.items() for field in (*fields, "bias")}
        return {name: self.files.slice(name) for name in self.files.names() if name not in taken}

    def modules(self, model: nn.Module, rename: Callable[[str], str]) -> dict[str, str]:
        """The names of the int4 layers in the model and in the checkpoint."""
        found = {}
        for layer in self._fields:
            name = rename(f"{layer}.weight").removesuffix(".weight")
            if not isinstance(submodule(model, name), nn.Linear):
                raise ValueError(
                    f"{self._where(layer)}: expected a linear layer of {type(model).__name__}, which has none of this "
                    f"name (in the model it would be {name}; experts that transformers fuses are not read)"
                )
            if f"{name}.weight" in tied_weights(model):
                raise ValueError(
                    f"{self._where(layer)}: expected a plain weight, since it is tied to another, got an int4 one; if "
                    f'the two are apart in this checkpoint, write "tie_word_embeddings": false into {self._config}'
                )
            found[name] = layer
        return found

    def read(self, name: str, layer: Waiting) -> tuple[Int4Weight, torch.Tensor | None]:
        """The weight and the bias of the layer of that name in the checkpoint; `layer` has the sizes that they have."""
        try:
            weight = self._read[name]({f: self.files.tensor(f"{name}.{f}") for f in self._fields[name]})
            want = layer.out_features, layer.in_features
            if weight.shape != want:
                got = list(weight.shape)
                raise ValueError(f"{self._fields[name][0]}: expected a weight of {list(want)}, got one of {got}")
            return weight, read_bias(self.files, name, layer)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{self._where(name)}: {error}") from None

    def __deepcopy__(self, memo) -> Int4Checkpoint:
        return self  # transformers copies configs, and what hangs on them


def read_bias(files: CheckpointFiles, name: str, layer: Waiting) -> torch.Tensor | None:
    stored = files.tensor(f"{name}.bias") if f"{name}.bias" in files else None
    if layer.has_bias:
        if stored is None or stored.shape != (layer.out_features,):
            got = "none" if stored is None else list(stored.shape)
            raise ValueError(f"bias: expected [{layer.out_features}], got {got}")
        return stored.to(layer.dtype)
    if stored is not None and stored.count_nonzero() > 0:  # GPTQ's tools write zeros for layers without a bias
        raise ValueError("bias: expected none, as the model has none, or zeros")
    return None


# --- formats: what the config says, and from it what reads a layer --------------------------------------------------


def _awq(config: dict[str, Any], expect: Expect) -> Plan:
    bits, size = (config.get(new, config.get(old)) for new, old in (("bits", "w_bit"), ("group_size", "q_group_size")))
    version = next((config[key] for key in ("version", "format", "checkpoint_format") if config.get(key)), None)
    if config.get("backend") == "llm-awq":
        version = "llm-awq"
    expect(bits == 4, "bits", "4", bits)
    _expect_size(expect, "group_size", size)
    cure = '\'gemm\' (convert it with AutoAWQ, or write "version": "gemm" if its qweight is [in, out / 8])'
    expect(str(version).lower() == "gemm", "version", cure, version)
    expect(config.get("zero_point", True) is True, "zero_point", "true", config.get("zero_point"))
    return lambda name, fields: lambda tensors: Int4Weight.from_awq(**tensors, group_size=size)


def _gptq(config: dict[str, Any], expect: Expect) -> Plan:
    kind = config.get("checkpoint_format")
    cure = (
        "'gptq' (zero points stored minus one: AutoGPTQ, and most files without this field) or 'gptq_v2' (stored as "
        'they are); write the one that made the file, such as "checkpoint_format": "gptq", into config.json'
    )
    expect(kind in ("gptq", "gptq_v2"), "checkpoint_format", cure, kind)
    expect(config.get("pack_dtype", "int32") == "int32", "pack_dtype", "'int32'", config.get("pack_dtype"))
    rules = config.get("dynamic") or {}
    expect(isinstance(rules, dict), "dynamic", "an object of patterns", rules)

    def plan(name, fields):
        options, where = config, ""
        for pattern, changes in rules.items():  # GPTQModel takes the first that matches; "-:" leaves layers plain
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
                good = not pattern.startswith("-:")
                expect(good, f"dynamic: {pattern}", "a pattern of plain layers", f"{name}, which is quantised")
                options, where = config | changes, f"dynamic: {pattern}: "
                break
        expect(options.get("bits") == 4, f"{where}bits", "4", options.get("bits"))
        size = options.get("group_size")
        _expect_size(expect, f"{where}group_size", size)
        return partial(_from_gptq, size, 1 if kind == "gptq" else 2)

    return plan


def _from_gptq(group_size: int, version: int, tensors: dict[str, torch.Tensor]) -> Int4Weight:
    return Int4Weight.from_gptq(**tensors, group_size=group_size, version=version)


def _compressed_tensors(config: dict[str, Any], expect: Expect) -> Plan:
    groups, ignore = config.get("config_groups"), config.get("ignore") or []
    expect(isinstance(groups, dict) and len(groups) > 0, "config_groups", "at least one group", groups)
    for key in ("kv_cache_scheme", "transform_config"):
        expect(not config.get(key), key, "none", config.get(key))
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    expect(sparsity == "dense", "sparsity_config: format", "'dense'", sparsity)

    def plan(name, fields):
        expect(not any(matches(name, pattern) for pattern in ignore), "ignore", f"no name of {name}", ignore)
        ranks = {group: _rank(name, groups[group].get("targets") or []) for group in groups}
        group = min(ranks, key=ranks.get)
        expect(ranks[group] < NO_MATCH, "config_groups", f"a group whose targets name {name}", list(groups))
        kind = groups[group].get("format") or config.get("format")  # the config's may be "mixed-precision"
        size, symmetric, ordered = _scheme(f"config_groups: {group}: ", groups[group], kind, expect)
        for field, needed in (("weight_zero_point", not symmetric), ("weight_g_idx", ordered)):
            if needed and field not in fields:
                raise ValueError(f"{field}: expected a tensor, as config_groups: {group} says; no file has it")
        return lambda tensors: Int4Weight.from_compressed_tensors(tensors, size)

    return plan


def _scheme(where: str, group: dict[str, Any], kind: str | None, expect: Expect) -> tuple[int, bool, bool]:
    """(group size, symmetric, act-order) of a config group that a layer is in."""
    weights = group.get("weights") or {}
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
    _expect_size(expect, f"{where_weights}group_size", size)
    return size, bool(weights.get("symmetric", True)), order in ("group", "dynamic")


NO_MATCH = 3


def _rank(name: str, targets: list[str]) -> int:
    """How closely a group's targets name a layer: in compressed-tensors a name goes before a pattern before a class."""
    if name in targets:
        return 0
    if any(target.startswith("re:") and matches(name, target) for target in targets):
        return 1
    return 2 if "Linear" in targets else NO_MATCH


def matches(name: str, pattern: str) -> bool:
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern in (name, "Linear")


def _expect_size(expect: Expect, field: str, size: object) -> None:
    good = type(size) is int and (size == -1 or (size > 0 and size % 32 == 0))
    expect(good, field, "a multiple of 32, or -1 (a whole row)", size)

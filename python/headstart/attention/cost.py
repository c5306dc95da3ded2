"""Predicts how long a layer's attention takes on this CPU, and which path is the fastest.

There are three paths: the model's own SDPA, headstart's kernel on all blocks, and headstart's kernel on the blocks of
an index, which must be built first. The time of each is a sum of a few non-negative terms, for example

    seconds = fixed + pair · heads · pairs + pair_dim · heads · pairs · head_dim + key_dim · kv_heads · keys · head_dim

`headstart tune` (`tune.py`) fits the coefficients to timings of the machine, and writes them to a file. If this machine
has no file, the coefficients come from `default_costs/`, which were measured in the same way on another machine, and
`anchor.py` scales them to this one. This module measures nothing. If a file cannot be used, there is a warning and
never an error, because a forward may be the first to read the file.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import _library
from .._environment import cpu_model
from .._expect import checker
from .._files import read_json_object
from .density import density
from .patterns import HeadPattern
from .plan import PrefillPlan

FORMAT = "headstart.tune"
VERSION = 1
ENVIRONMENT_VARIABLE = "HEADSTART_TUNE"
DEFAULTS = Path(__file__).parent / "default_costs"
DEFAULT_THREADS = 2

# A sparse index loses a little of the attention. It is chosen only if the fastest exact path takes longer by more than
# this share.
SPARSE_MARGIN = 0.25
# With at most this number of query rows for the same keys, the CPU kernel reads keys in place (kFewRows in
# sparse_attention_decode.h).
FEW_ROWS = 16


class Call(NamedTuple):
    """The shape of one attention call."""

    batch: int
    heads: int
    kv_heads: int
    nq: int
    nk: int
    head_dim: int
    dtype: torch.dtype
    masked_keys: int = 0  # the keys that SDPA computes if it needs a mask of all pairs; 0 if it needs none

    @property
    def pairs(self) -> float:
        """The (query, key) pairs of one head that causality allows."""
        return self.nq * (self.nk - (self.nq - 1) / 2)


# --- terms: the amounts that make up a kind of work ------------------------------------------------------------------


def sdpa_terms(call: Call) -> tuple[str, dict[str, float]]:
    """The model's own SDPA. With a mask, it computes all pairs. The keys are repeated for each query head."""
    rows, keys = call.batch * call.heads, call.masked_keys or call.nk
    if call.nq == 1:
        return "sdpa_decode", {"fixed": 1, "key_dim": rows * keys * call.head_dim}
    pairs = call.nq * keys if call.masked_keys else call.pairs
    terms = {
        "fixed": 1,
        "pair": rows * pairs,
        "pair_dim": rows * pairs * call.head_dim,
        "key_dim": rows * keys * call.head_dim,
    }
    return ("sdpa_masked" if call.masked_keys else "sdpa"), terms


def kernel_terms(call: Call, share: float = 1.0, columns: float = 0) -> tuple[str, dict[str, float]]:
    """headstart's kernel on a share of the pairs. `columns` is the number of single keys of all heads together."""
    rows, pairs = call.batch * call.heads, call.pairs * share
    key_dim = call.batch * call.kv_heads * call.nk * call.head_dim
    if share == 1 and call.nq * (call.heads // call.kv_heads) <= FEW_ROWS:
        return "kernel_few", {"fixed": 1, "pair_dim": rows * pairs * call.head_dim, "key_dim": key_dim}
    terms = {
        "fixed": 1,
        "pair": rows * pairs,
        "pair_dim": rows * pairs * call.head_dim,
        "query_dim": rows * call.nq * call.head_dim,
        "key_dim": key_dim,
        "column_dim": call.batch * columns * call.head_dim,
    }
    return "kernel", terms


def index_terms(pattern: HeadPattern, call: Call) -> tuple[str, dict[str, float]]:
    """The index of `call.heads` heads of one pattern."""
    params, rows = dict(pattern.params), call.batch * call.heads
    linear = rows * (call.nq + call.nk) * call.head_dim
    blocks = rows * call.pairs / 64**2
    if pattern.name in ("dense", "a_shape"):
        return "a_shape", {"fixed": 1}  # depends only on the length, so all layers share it
    if pattern.name == "adaptive":
        products = rows * call.pairs * (1 / params["stride"] + params["samples"] / 64) * call.head_dim
        return "adaptive", {"fixed": 1, "linear": linear, "products": products, "blocks": blocks}
    if pattern.name == "vertical_slash":
        sampled = rows * min(params["last_q"], call.nq) * call.nk * call.head_dim
        return "vertical_slash", {"fixed": 1, "linear": sampled, "blocks": blocks}
    return "block_topk", {"fixed": 1, "linear": linear, "blocks": blocks}


def stitch_terms(call: Call) -> tuple[str, dict[str, float]]:
    """The extra work for heads of several families in one layer: copying queries and keys, and combining indices."""
    rows = call.batch * call.heads
    linear = rows * (call.nq + call.nk) * call.head_dim
    return "stitch", {"fixed": 1, "linear": linear, "blocks": rows * call.pairs / 64**2}


INDEX_KINDS = ("a_shape", "vertical_slash", "block_topk", "adaptive", "stitch")
_PREFILL = Call(1, 1, 1, 64, 64, 64, torch.float32)
TERMS: dict[str, tuple[str, ...]] = {
    kind: tuple(terms)
    for kind, terms in (
        sdpa_terms(_PREFILL),
        sdpa_terms(_PREFILL._replace(masked_keys=64)),
        sdpa_terms(_PREFILL._replace(nq=1)),
        kernel_terms(_PREFILL),
        kernel_terms(_PREFILL._replace(nq=1)),
        *(index_terms(HeadPattern.of(name), _PREFILL) for name in INDEX_KINDS[:-1]),
        stitch_terms(_PREFILL),
    )
}


# --- the model -------------------------------------------------------------------------------------------------------

Coefficients = Mapping[str, Mapping[str, Mapping[str, float]]]  # dtype, kind, term


@dataclass(frozen=True, eq=False)
class Costs:
    """Coefficients in seconds by dtype, kind of work and term, and how well they fit the timings."""

    machine: Mapping[str, Any]
    coefficients: Coefficients
    residuals: Mapping[str, Mapping[str, Mapping[str, float]]]
    date: str
    source: str  # says where they come from

    def seconds(self, dtype: torch.dtype, kind: str, terms: Mapping[str, float]) -> float:
        """The predicted seconds of work of a kind.

        If a dtype was not timed, headstart's own work is assumed to take as long as in bfloat16. The result for SDPA is
        then infinite.
        """
        by_kind = self.coefficients.get(dtype_name(dtype))
        if by_kind is None:
            if kind.startswith("sdpa"):
                return math.inf
            by_kind = self.coefficients["bfloat16"]
        given = by_kind[kind]
        return sum(given[name] * amount for name, amount in terms.items())

    def sdpa(self, call: Call) -> float:
        return self.seconds(call.dtype, *sdpa_terms(call))

    def dense(self, call: Call) -> float:
        return self.seconds(call.dtype, *kernel_terms(call))

    def sparse(self, call: Call, plan: PrefillPlan, layer: int) -> float:
        """Seconds for the index and the attention of a layer, at the estimated density of its patterns."""
        patterns = plan.heads(layer, call.heads)
        tokens = (plan.provenance or {}).get("tokens")
        tokens = tokens if type(tokens) is int and tokens > 0 else None
        share = sum(_density(pattern, call.nq, call.nk, tokens, pattern.density) for pattern in patterns) / call.heads
        columns = sum(min(dict(p.params)["vertical_size"], call.nk) for p in patterns if p.name == "vertical_slash")
        attention = kernel_terms(call, min(share, 1 - 1e-9), columns)
        return self.index(call, patterns) + self.seconds(call.dtype, *attention)

    def index(self, call: Call, patterns: list[HeadPattern]) -> float:
        families: dict[HeadPattern, int] = {}
        for pattern in patterns:
            families[pattern.family] = families.get(pattern.family, 0) + 1
        if len(families) == 1:
            return self.seconds(call.dtype, *index_terms(patterns[0], call))
        total = self.seconds(call.dtype, *stitch_terms(call))
        for family, heads in families.items():
            part = call._replace(heads=heads, kv_heads=heads)
            total += self.seconds(call.dtype, *index_terms(family, part))
        return total

    def fastest(self, call: Call, plan: PrefillPlan, layer: int, *, own: str | None, sparse: bool) -> str:
        """The fastest path: "sparse", "dense" or "own".

        Args:
            own: the attention implementation that the model had before. Only the cost of "sdpa" is known.
            sparse: whether the sparse path is allowed.
        """
        dense = self.dense(call)
        theirs = self.sdpa(call) if own == "sdpa" else math.inf
        if sparse and self.sparse(call, plan, layer) * (1 + SPARSE_MARGIN) < min(dense, theirs):
            return "sparse"
        return "own" if theirs < dense else "dense"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def _density(pattern: HeadPattern, nq: int, nk: int, tokens: int | None, measured: float | None) -> float:
    """`density`, cached. `measured` is `pattern.density`, an argument because patterns that differ in it are equal."""
    return density(pattern, nq, nk, tokens)


# --- the file --------------------------------------------------------------------------------------------------------


def tune_path() -> Path:
    """The file of `headstart tune`: HEADSTART_TUNE, or tune.json in headstart's folder of the user's cache."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or ""
    # The XDG base directory specification says that a relative path is ignored.
    folder = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~")) / ".cache"
    return folder / "headstart" / "tune.json"


def machine_key() -> dict[str, Any]:
    """The machine and the software for which a measurement is valid."""
    return {
        "cpu": cpu_model(),
        "tier": _library.cpu_tier(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": "cpu",
    }


def to_json(costs: Costs) -> str:
    content = {"format": FORMAT, "version": VERSION, "date": costs.date, "machine": costs.machine}
    content |= {"coefficients": costs.coefficients, "residuals": costs.residuals}
    return json.dumps(content, indent=1) + "\n"


def read(path: Path) -> Costs:
    """Reads what `to_json` made. A damaged file is a ValueError that names the file and the field."""
    content = read_json_object(path)
    expect = checker(path)
    expect(content.get("format") == FORMAT, "format", repr(FORMAT), content.get("format"))
    expect(content.get("version") == VERSION, "version", str(VERSION), content.get("version"))
    for name in ("machine", "coefficients", "residuals"):
        expect(isinstance(content.get(name), dict), name, "an object", content.get(name))
    expect(type(content.get("date")) is str, "date", "a string", content.get("date"))
    expect("bfloat16" in content["coefficients"], "coefficients.bfloat16", "an object", None)
    for section, names in (("coefficients", TERMS), ("residuals", dict.fromkeys(TERMS, ("median", "largest")))):
        for dtype, kinds in content[section].items():
            expect(isinstance(kinds, dict), f"{section}.{dtype}", "an object", kinds)
            for kind, fields in names.items():
                expect(isinstance(kinds.get(kind), dict), f"{section}.{dtype}.{kind}", "an object", kinds.get(kind))
                for name in fields:
                    value, field = kinds[kind].get(name), f"{section}.{dtype}.{kind}.{name}"
                    number = type(value) in (int, float) and 0 <= value < math.inf
                    expect(number, field, "a finite number, at least 0", value)
    return Costs(*(content[name] for name in ("machine", "coefficients", "residuals", "date")), source=str(path))


def load(path: Path, machine: Mapping[str, Any]) -> Costs:
    """Like `read`, but a file from another machine or from other software is also a ValueError."""
    costs = read(path)
    for name, here in machine.items():
        if costs.machine.get(name) != here:
            raise ValueError(f"{path}: machine.{name}: expected {here!r}, got {costs.machine.get(name)!r}")
    return costs


@functools.cache
def defaults(tier: str | None, threads: int) -> Costs:
    """The default coefficients of a tier, measured with two threads on an AVX-512 machine.

    All terms except the fixed ones are assumed to be inversely proportional to the number of threads.
    """
    name = next((name for name in ("avx512", "avx2") if (tier or "").startswith(name)), "generic")
    costs = read(DEFAULTS / f"{name}.json")
    scale = DEFAULT_THREADS / threads
    coefficients = {
        dtype: {
            kind: {term: value * (1 if term == "fixed" else scale) for term, value in terms.items()}
            for kind, terms in kinds.items()
        }
        for dtype, kinds in costs.coefficients.items()
    }
    return Costs(costs.machine, coefficients, costs.residuals, costs.date, f"headstart's defaults for {name}")


_in_use: dict[tuple, Costs] = {}


def in_use() -> Costs:
    """The coefficients in use: those of the file if it is from this machine, otherwise the defaults, not yet scaled.

    If the file cannot be used, one warning says why.
    """
    path, threads, tier = tune_path(), torch.get_num_threads(), _library.cpu_tier()
    key = (path, threads, tier)
    if key not in _in_use:
        _in_use[key] = defaults(tier, threads)
        try:
            if path.exists():
                _in_use[key] = load(path, machine_key())
            elif os.environ.get(ENVIRONMENT_VARIABLE):
                raise ValueError(f"{path}: {ENVIRONMENT_VARIABLE} names it, but it does not exist")
        except (OSError, ValueError) as error:
            warnings.warn(
                f"headstart: the measurement of this machine is not used: {error}. Defaults decide which attention "
                "runs. Cure: `headstart tune` measures this machine anew.",
                RuntimeWarning,
                stacklevel=2,
            )
    return _in_use[key]


def forget() -> None:
    """Makes the next `in_use` read the file again."""
    _in_use.clear()


# --- where the fastest path changes ----------------------------------------------------------------------------------


def crossovers(costs: Costs, call: Call, plan: PrefillPlan, layer: int = 0) -> Iterator[tuple[int, str]]:
    """The lengths, up to 131,072, at which a whole prompt takes another path: (length, path)."""
    before = None
    for eighths in range(8 * 4, 8 * 17 + 1):
        n = round(2 ** (eighths / 8))
        path = costs.fastest(call._replace(nq=n, nk=n), plan, layer, own="sdpa", sparse=n >= 64)
        if path != before:
            yield n, path
        before = path

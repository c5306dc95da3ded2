"""The pattern search: measures on real texts which pattern each attention head should use to read prompts.

The model reads windows of the texts once, with dense attention. In every layer, each candidate pattern computes the
attention of the layer's queries, keys and values. Two numbers are kept for each head and candidate:

- its *error*: how much the pattern changes what the head adds to the residual stream,
  ``mean over tokens of |(out_pattern - out_dense) W_o|² / |residual stream|²`` (square root in the plan);
- its *cost*, in units of this machine's dense attention: the density, plus the time to build the index.

The errors of different heads are assumed to be independent, so the squared error of a plan is the sum over its heads.
One Lagrange multiplier gives the best plan for a budget: every head takes the candidate with the least ``error² +
multiplier · cost``.

In MInference 1.0 (arXiv 2407.02490, section 3.2 and algorithm 4), the search uses one prompt, and looks at each head
separately, at one fixed cost.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._environment import environment
from .._expect import expect
from .._files import write_whole
from ..ops.sparse_attention import sparse_attention
from .index import full_index, pattern_index, window_index
from .patterns import HeadPattern
from .plan import PrefillPlan, fingerprint

FORMAT = "headstart.prefill_search"
VERSION = 1
NAME = "headstart_search"
OP = "search_prefill_plan"

# Candidates without a threshold get budgets for about these shares of dense attention.
SHARES = (0.05, 0.1, 0.2, 0.35)
THRESHOLDS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.985)
# Costs are rounded to this share of dense attention, so that noise in the timings does not choose the plan.
COST_STEP = 0.005
# The rounding of long sums may exceed a budget by this factor.
ROUNDING = 1 + 1e-9


def candidates(tokens: int) -> list[HeadPattern]:
    """The candidate patterns for texts of `tokens` tokens.

    They are dense, adaptive with several thresholds, and A-shape, vertical-slash and block top-k. The budgets of the
    last three give about `SHARES` of the pairs.
    """
    keys = tokens / 2  # the number of keys that a query sees on average
    found = [HeadPattern.of("dense")]
    found += [HeadPattern.of("adaptive", threshold=threshold) for threshold in THRESHOLDS]
    for share in SHARES:
        budget = max(128, round(share * keys / 64) * 64)
        found += [
            HeadPattern.of("a_shape", sink=64, local=budget - 64),
            HeadPattern.of("vertical_slash", vertical_size=budget // 2, slash_size=max(64, budget // 2)),
            HeadPattern.of("vertical_slash", vertical_size=max(64, budget // 8), slash_size=budget * 7 // 8),
            HeadPattern.of("block_topk", top_k=budget // 64),
        ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Measured:
    """The measurements of one layer in one window, by candidate and head."""

    error: torch.Tensor  # squared, float64 [candidates, heads]
    density: torch.Tensor  # float64 [candidates, heads]
    index_seconds: torch.Tensor  # float64 [candidates], to build the index of all heads
    seconds: torch.Tensor  # float64 [candidates], for the attention of all heads


def search_prefill_plan(
    model: torch.nn.Module,
    texts: Mapping[str, torch.Tensor],
    *,
    max_error: float | None = None,
    density: float | None = None,
    tokens: int = 8192,
    windows: int = 1,
    seed: int = 0,
    patterns: Sequence[HeadPattern] | None = None,
    measurements: str | os.PathLike | None = None,
    advance: Callable[[], None] = lambda: None,
) -> PrefillPlan:
    """Measures every candidate pattern of every head on windows of some texts, and returns the best plan for a budget.

    Give exactly one budget. With `max_error` E, the plan is the cheapest one whose error is at most E. The error of a
    plan is the relative change of the residual stream, as root mean square over the layers::

        error² = 1/L · sum over layers, heads of  mean over tokens |(out_pattern - out_dense) W_o|² / |residual|²

    With `density` d, the plan is the most accurate one that computes at most the share d of the attention. The model is
    not changed.

    Args:
        model: a transformers model whose attention goes through AttentionInterface.
        texts: token ids, int64 [n], by name.
        tokens: the length of a window, at most that of the shortest text.
        windows: the number of windows of each text. The text is cut into this number of equal parts, and `seed` chooses
            the place of one window in each part.
        seed: see `windows`.
        patterns: the candidates; `candidates(tokens)` if None. If dense is not one of them, it may be impossible to
            meet a budget.
        measurements: a file that keeps the measurements, layer by layer. An interrupted search continues from it, and
            another budget for the same search needs no new measurement.
        advance: called after every layer of every window, `windows · len(texts) · layers` times.

    A sliding window shorter than `tokens` is already a sparse pattern, so layers with one are left out of the plan.

    Returns:
        A `PrefillPlan` tied to the model, with every head's error and density, and `provenance`.

    Raises:
        ValueError: if a budget is out of range or cannot be met, a text is too short, or the file of measurements is
            damaged or belongs to another search. The error names it.
    """
    op = "search_prefill_plan"
    if (max_error is None) == (density is None):
        raise ValueError(f"{op}: budget: expected max_error or density, got {'neither' if density is None else 'both'}")
    expect(max_error is None or (math.isfinite(max_error) and max_error >= 0), OP, "max_error", "at least 0", max_error)
    expect(density is None or 0 < density <= 1, OP, "density", "a share of the attention, above 0 and up to 1", density)
    expect(type(tokens) is int and tokens >= 256, OP, "tokens", "an integer, at least 256", tokens)
    expect(type(windows) is int and windows >= 1, OP, "windows", "an integer, at least 1", windows)
    expect(len(texts) > 0, OP, "texts", "at least one text", 0)
    for name, ids in texts.items():
        expect(ids.dim() == 1 and ids.dtype == torch.int64, OP, f"texts[{name!r}]", "token ids, int64 [n]", ids.dtype)
        expect(len(ids) >= tokens, OP, f"texts[{name!r}]", f"at least {tokens} tokens (a window's length)", len(ids))
    patterns = candidates(tokens) if patterns is None else list(patterns)
    expect(len(patterns) > 0, OP, "patterns", "at least one candidate", 0)

    starts = {name: _starts(len(ids), tokens, windows, seed) for name, ids in texts.items()}
    identity = {
        "format": FORMAT,
        "version": VERSION,
        "model": fingerprint(model.config.get_text_config()),
        "weights": _digest_of_weights(model),
        "texts": {name: {"sha256": _digest(ids), "starts": starts[name]} for name, ids in texts.items()},
        "tokens": tokens,
        "patterns": [[p.name, dict(p.params)] for p in patterns],
    }
    record = _Record.open(measurements, identity)
    for name, ids in texts.items():
        for start in starts[name]:
            _measure_window(model, ids[start : start + tokens], f"{name}@{start}", patterns, record, advance)

    searched, error, share, cost = record.totals(patterns)
    choice = choose(error, cost, share, max_error=max_error, density=density)
    layers = [{} for _ in range(identity["model"]["num_hidden_layers"])]
    for row, layer in enumerate(searched):
        layers[layer] = {
            head: HeadPattern.of(
                patterns[c].name,
                **dict(patterns[c].params),
                error=error[row, c, head].sqrt().item(),
                density=share[row, c, head].item(),
            )
            for head, c in enumerate(choice[row].tolist())
        }
    picked = [x.gather(1, choice[:, None]).squeeze(1) for x in (error, share, cost)]
    provenance = {
        "machine": environment(),
        "texts": identity["texts"],
        "tokens": tokens,
        "seed": seed,
        "budget": {"max_error": max_error} if density is None else {"density": density},
        "error": (picked[0].sum() / len(searched)).sqrt().item(),
        "density": picked[1].mean().item(),
        "cost": picked[2].mean().item(),
    }
    return PrefillPlan(HeadPattern.of("adaptive"), tuple(layers), identity["model"], provenance)


def choose(
    error: torch.Tensor,
    cost: torch.Tensor,
    share: torch.Tensor,
    *,
    max_error: float | None = None,
    density: float | None = None,
) -> torch.Tensor:
    """Chooses the candidate of every head, int64 [layers, heads].

    With `max_error`, the choice is the cheapest one within this error. With `density`, it is the most accurate one
    within this density. `error` (squared), `cost` and `share` (the densities) are [layers, candidates, heads].
    """

    def pick(multiplier: float) -> torch.Tensor:
        return (error + multiplier * (cost if density is None else share)).argmin(1)

    def total(x: torch.Tensor, choice: torch.Tensor) -> float:
        return x.gather(1, choice[:, None]).sum().item()

    layers, _, heads = error.shape
    if density is None:
        accurate, goal = pick(0.0), max_error**2 * layers * ROUNDING
        low, high = 0.0, 1.0
        within = lambda choice: total(error, choice) <= goal  # noqa: E731
        expect(
            within(accurate),
            OP,
            "max_error",
            f"at least {(total(error, accurate) / layers) ** 0.5:.3g}, the error of the most accurate candidates",
            max_error,
        )
        while within(pick(high)) and high < 1e12:
            low, high = high, high * 4
    else:
        goal = density * layers * heads * ROUNDING
        low, high = 0.0, 1.0
        within = lambda choice: total(share, choice) > goal  # noqa: E731
        if not within(pick(0.0)):
            return pick(0.0)
        while within(pick(high)):
            expect(high < 1e12, OP, "density", "one that some candidates meet", density)
            low, high = high, high * 4
    # `within` holds at low and not at high.
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(pick(middle)) else (low, middle)
    return pick(low if density is None else high)


# --- measuring -----------------------------------------------------------------------------------------------------


def _measure_window(model, ids, window, patterns, record, advance) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    from .view import view_of

    decoder = view_of(model.base_model)
    layers = {}  # attention modules by layer index, with the module whose input is the residual stream
    names = dict(decoder.named_modules())
    for name, module in names.items():
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
            layers[module.layer_idx] = (module, names[name.rpartition(".")[0]])
    expect(len(layers) > 0, OP, "model", "one whose attention goes through AttentionInterface", type(model).__name__)
    nk = len(ids)
    windows = {layer: getattr(module, "sliding_window", None) or nk for layer, (module, _) in layers.items()}
    wanted = [layer for layer, size in windows.items() if size >= nk]
    expect(len(wanted) > 0, OP, "tokens", f"at most {max(windows.values())}, as all layers have a sliding window", nk)
    if all(record.has(window, layer) for layer in wanted):
        for _ in layers:
            advance()
        return
    residual: dict[torch.nn.Module, torch.Tensor] = {}

    def remember(module, arguments, keywords):
        stream = arguments[0] if arguments else keywords["hidden_states"]
        residual[module] = stream[0].float().square().sum(-1)

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        layer = module.layer_idx
        if layer not in wanted:
            index = window_index(nk, nk, windows[layer], query.device)
            dense, _ = sparse_attention(query, key, value, index, scale=scaling, window=windows[layer])
        else:
            dense, _ = sparse_attention(query, key, value, full_index(nk, nk, query.device), scale=scaling)
        if layer in wanted and not record.has(window, layer):
            stream = residual[layers[layer][1]]
            record.add(window, layer, _measure_layer(module, query, key, value, scaling, dense, stream, patterns))
        residual.clear()
        advance()
        return dense.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, _run_search)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # one sequence, causal
    decoder.config.get_text_config()._attn_implementation = {"": NAME}
    for module, parent in layers.values():
        module._headstart_search = attend
        parent.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.inference_mode():
        decoder(ids[None].to(model.device), use_cache=False)
    missing = [layer for layer in wanted if not record.has(window, layer)]
    expect(
        not missing, OP, "model", "attention that goes through AttentionInterface in every layer", f"{missing} without"
    )


def _measure_layer(module, query, key, value, scaling, dense, stream, patterns) -> Measured:
    heads, nq, head_dim = query.shape[1:]
    projection = _output_projection(module, heads, head_dim)
    tokens = slice(nq // 8, None)  # the first rows see few keys and are dense under any pattern
    weight = 1 / stream[tokens].clamp(min=1e-12)
    rows = []
    for pattern in patterns:
        start = time.perf_counter()
        index = pattern_index([pattern] * heads, query, key, None, scaling)
        built = time.perf_counter()
        out, _ = sparse_attention(query, key, value, index, scale=scaling)
        done = time.perf_counter()
        change = (out[0, :, tokens] - dense[0, :, tokens]).float()
        change = ((change @ projection) * change).sum(-1).clamp(min=0) * weight
        share = index.head_density(nq, nq).double().expand(heads)
        rows.append((change.mean(-1).double(), share, built - start, done - built))
    error, share, index_seconds, seconds = zip(*rows, strict=True)
    times = (torch.tensor(x, dtype=torch.float64) for x in (index_seconds, seconds))
    return Measured(torch.stack(error).cpu(), torch.stack(share).cpu(), *times)


def _output_projection(module: torch.nn.Module, heads: int, head_dim: int) -> torch.Tensor:
    """W_oᵀ W_o of every head, float32 [heads, D, D], since |x W_o|² = x (W_oᵀ W_o) xᵀ. Without W_o, the identity."""
    for name in ("o_proj", "out_proj", "dense", "c_proj", "wo"):
        weight = getattr(getattr(module, name, None), "weight", None)
        if weight is not None and weight.shape[1] == heads * head_dim:
            parts = weight.float().view(-1, heads, head_dim).transpose(0, 1)
            return parts.mT @ parts
    return torch.eye(head_dim, device=next(module.parameters()).device).expand(heads, -1, -1)


def _run_search(module: torch.nn.Module, *args, **kwargs):
    """The attention that transformers calls under NAME. `_measure_window` stores the function on its view's modules."""
    return module._headstart_search(module, *args, **kwargs)


# --- what was measured ---------------------------------------------------------------------------------------------


class _Record:
    """Measurements by window and layer. If there is a path, each layer is written to it."""

    def __init__(self, path: Path | None, identity: dict[str, Any]):
        self.path, self.identity = path, identity
        self.measured: dict[str, dict[int, Measured]] = {}

    @classmethod
    def open(cls, path: str | os.PathLike | None, identity: dict[str, Any]) -> _Record:
        record = cls(None if path is None else Path(path), identity)
        if record.path is None or not record.path.exists():
            return record
        cure = "delete it to measure anew"
        try:
            content = json.loads(record.path.read_text(encoding="utf-8"))
            found = content.pop("measured")
            differing = [name for name, value in identity.items() if content.get(name) != value]
            if not differing:
                for window, layers in found.items():
                    record.measured[window] = {int(i): _measured(x) for i, x in layers.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a file of measurements ({error}); {cure}") from None
        if differing:
            raise ValueError(f"{path}: {differing[0]}: expected that of this search, got another; {cure}")
        shape = (len(identity["patterns"]), identity["model"]["num_attention_heads"])
        for window, layers in record.measured.items():
            for layer, x in layers.items():
                if x.error.shape != shape or x.density.shape != shape:
                    got = list(x.error.shape)
                    raise ValueError(f"{path}: {window}[{layer}]: expected {list(shape)} numbers, got {got}; {cure}")
        return record

    def has(self, window: str, layer: int) -> bool:
        return layer in self.measured.get(window, ())

    def add(self, window: str, layer: int, measured: Measured) -> None:
        self.measured.setdefault(window, {})[layer] = measured
        if self.path is None:
            return
        layers = {w: {i: _to_json(x) for i, x in found.items()} for w, found in self.measured.items()}
        content = json.dumps(self.identity | {"measured": layers})
        write_whole(self.path, lambda partial: partial.write_text(content, encoding="utf-8"))

    def totals(self, patterns: Sequence[HeadPattern]) -> tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]:
        """The numbers of the searched layers, and the means of squared error, density and cost over all windows.

        The means are float64 [layers, candidates, heads].
        """
        searched = sorted(next(iter(self.measured.values())))
        windows = [[x for _, x in sorted(layers.items())] for layers in self.measured.values()]
        error, share, index_seconds, seconds = (
            torch.stack([torch.stack([getattr(x, name) for x in layers]) for layers in windows]).mean(0)
            for name in ("error", "density", "index_seconds", "seconds")
        )
        # The seconds of one head's dense attention, estimated from all timings.
        dense_seconds = seconds.sum() / share.sum()
        overhead = index_seconds.median(0).values / share.shape[2] / dense_seconds
        for c, pattern in enumerate(patterns):  # these indices do not depend on the queries, so all layers share them
            if pattern.name in ("dense", "a_shape"):
                overhead[c] = 0.0
        overhead = (overhead / COST_STEP).round() * COST_STEP
        return searched, error, share, share + overhead[None, :, None]


def _to_json(x: Measured) -> dict[str, Any]:
    return {name: getattr(x, name).tolist() for name in Measured.__dataclass_fields__}


def _measured(content: dict[str, Any]) -> Measured:
    return Measured(*(torch.tensor(content[n], dtype=torch.float64) for n in Measured.__dataclass_fields__))


def _starts(length: int, tokens: int, windows: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    room = length - tokens
    parts = [(room * i // windows, room * (i + 1) // windows) for i in range(windows)]
    return [torch.randint(low, high + 1, (), generator=generator).item() for low, high in parts]


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]


def _digest_of_weights(model: torch.nn.Module) -> str:
    """A digest of a few numbers of every parameter, enough to distinguish checkpoints."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        few = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu()
        digest.update(name.encode() + few.numpy().tobytes())
    return digest.hexdigest()[:16]

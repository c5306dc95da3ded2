"""A fixed context that many questions share. It is read once and clustered. A question looks up the keys that it needs.

    context = Context.build(model, ids)            # or Context.load(folder)
    cache = context.cache(density=0.2)
    model.generate(question, past_key_values=cache)
    cache.reset()                                   # the next question

The context's tokens have the positions -N to -1. So a question begins at position 0. For `generate` it is an ordinary
prompt with its own mask, padding and length. This is exact, because rotary embeddings depend only on differences of
positions. A layer attends the context by `centroid_lookup` and `sparse_attention`. All rows of a batch share the
context's keys and values. The layer attends the question densely. `merge_attention` combines both.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..attention.attach import attach, is_attached, unpatched_view
from ..attention.forward import ContextKeys, attachment, modeling_attribute
from ..attention.index import full_index
from ..attention.plan import fingerprint, plan_of
from ..attention.recording import record_queries
from ..ops import _checks
from ..ops.centroid_lookup import centroid_lookup, centroid_top_p
from ..ops.sparse_attention import BlockIndex, merge_attention, sparse_attention
from ..weights import upcast
from . import file as context_file
from .layer import BLOCK, BUDGETS, WINDOW, LayerContext, Rope, arrange, concat_layers, thresholds

DEFAULT_DENSITY = 0.2
SELECTIONS = ("threshold", "top_k", "top_p")
# If the keys of a layer have fewer values than this (heads · tokens · head dim), the whole context is attended, because
# a lookup takes longer than attending all keys. This was measured (docs/measurements/context.md, "A fixed context").
BREAK_EVEN = 2**20


@dataclass(frozen=True)
class Context:
    """The clustered keys and values of a text, for every layer of a model.

    - ``layers``: a `LayerContext` for each layer.
    - ``model``: the fingerprint of the model that read the text, and a checksum of some of its weights.
    - ``tokens``: the number of tokens.
    - ``token_hash``: SHA-256 of the token ids as little-endian int64. For a context made by `concat`, it is SHA-256 of
      the parts' hashes.
    - ``rope``: how the model rotates keys by their position. None if this is unknown; then `concat` cannot work.
    - ``settings``: the arguments that made the clusters.
    """

    layers: tuple[LayerContext, ...]
    model: dict[str, Any]
    tokens: int
    token_hash: str
    rope: Rope | None
    settings: dict[str, Any]

    @classmethod
    @torch.inference_mode()
    def build(
        cls,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        clusters: float = 0.05,
        parents: float | None = None,
        *,
        prefill: str = "adaptive",
        seed: int = 0,
        advance: Callable[[], object] = lambda: None,
    ) -> Context:
        """Reads input_ids [1, N] once and clusters every layer's keys.

        Args:
            model: a transformers model with rotary embeddings, whose layers attend all earlier tokens. A patched model
                reads with the plan of its patch. Any other model reads with the attention that `prefill` names. The
                model is not changed, and other threads may run it at the same time.
            input_ids: int64 or int32 [1, N], at least 64 tokens.
            clusters: the number of clusters, as a share of the keys.
            parents: the number of clusters of a second level above them, as a share of the keys. None means one level.
            prefill: as in `headstart.patch`.
            seed: for the clustering. The same seed gives the same context.
            advance: called when a layer reads the text, and after the layer is clustered.

        Raises:
            ValueError: an argument is wrong, or the model does not work with a context. The error says why.
        """
        op = "Context.build"
        _checks.tensor(op, "input_ids", input_ids, (torch.int64, torch.int32), (1, "N"))
        tokens = input_ids.shape[1]
        _checks.expect(tokens >= BLOCK, op, "input_ids", f"at least {BLOCK} tokens", tokens)
        for name, share in (("clusters", clusters), ("parents", parents)):
            good = share is None and name == "parents" or type(share) in (int, float) and 0 < share <= 1
            _checks.expect(good, op, name, "a share above 0 and up to 1", share)
        _checks.expect(
            parents is None or parents <= clusters, op, "parents", "no larger a share than clusters", parents
        )
        _check_model(op, model)
        reader = model.base_model
        if not is_attached(reader):
            reader = unpatched_view(reader)
            attach(op, reader, plan_of(op, prefill))
            upcast.attach_all(reader, "auto")
        cache, queries = _read(reader, input_ids.to(model.device), advance)
        layers = []
        for i, layer in enumerate(cache.layers):
            _checks.expect(
                i in queries, op, "model", "attention that headstart runs in every layer", f"none in layer {i}"
            )
            layers.append(arrange(layer.keys[0], layer.values[0], queries[i][0], clusters, parents, seed))
            layer.keys = layer.values = None
            advance()
        return cls(
            tuple(layers),
            model_fingerprint(model),
            tokens,
            hashlib.sha256(input_ids.to("cpu", torch.int64).numpy().astype("<i8").tobytes()).hexdigest(),
            find_rope(model),
            {"clusters": clusters, "parents": parents, "seed": seed},
        )

    @classmethod
    @torch.inference_mode()
    def concat(cls, contexts: Sequence[Context]) -> Context:
        """Joins several contexts, one after another, without reading their texts again.

        Keys and centroids are rotated to their new positions. The clusters stay the same. The thresholds are those of
        the last context.

        When a later text was read, it did not attend the earlier ones (as in TurboRAG, Lu et al., 2024, arXiv
        2410.07590). A text that was cut in two lost 0.07 nats a token on source code, and nothing on help texts
        (docs/measurements/context.md, "A fixed context").

        Raises:
            ValueError: the contexts are of different models, or it is unknown how the model rotates its keys.
        """
        op, contexts = "Context.concat", list(contexts)
        _checks.expect(len(contexts) > 0, op, "contexts", "at least one", 0)
        first = contexts[0]
        for i, context in enumerate(contexts):
            _checks.expect(isinstance(context, Context), op, f"contexts[{i}]", "a Context", type(context).__name__)
            _checks.expect(context.model == first.model, op, f"contexts[{i}]", f"one of {first.model}", context.model)
            _checks.expect(context.rope == first.rope, op, f"contexts[{i}]", "the same rotary embedding", "another")
        if len(contexts) == 1:
            return first
        _checks.expect(
            first.rope is not None, op, "contexts", "a model whose rotary embedding is known", first.model["model_type"]
        )
        layers = [concat_layers(chunks, first.rope) for chunks in zip(*(c.layers for c in contexts), strict=True)]
        hashes = "".join(context.token_hash for context in contexts)
        return cls(
            tuple(layers),
            first.model,
            sum(context.tokens for context in contexts),
            hashlib.sha256(hashes.encode()).hexdigest(),
            first.rope,
            {"chunks": [context.settings | {"tokens": context.tokens} for context in contexts]},
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a folder with context.safetensors and context.json, whole or not at all.

        Raises a ValueError if the folder exists and is neither empty nor the folder of a context.
        """
        context_file.save(folder, **vars(self))

    @classmethod
    def load(cls, folder: str | os.PathLike, *, verify: bool = True) -> Context:
        """Opens a folder that `save` wrote.

        The tensors are mapped, not copied. With `verify`, they are read once, and their checksums are compared.

        Raises:
            ValueError or FileNotFoundError: a file or a field is damaged or missing. The error names it.
        """
        return cls(**context_file.load(folder, verify=verify))

    def cache(
        self,
        batch_size: int = 1,
        density: float = DEFAULT_DENSITY,
        *,
        selection: str = "threshold",
        mass: float | None = None,
        budget: str = "measured",
        hierarchical: bool | None = None,
    ) -> ContextCache:
        """A cache to pass as `past_key_values` to a patched model. It holds this context and a batch of questions.

        Args:
            batch_size: the number of questions. `generate` may use several rows for each.
            density: the share of the clustered keys that a query attends, above 0 and up to 1. It is a mean over
                layers, heads and the calibrating queries. With 1, queries attend all keys. Sinks and the last keys are
                always attended.
            selection: "threshold" takes the clusters whose score is above a threshold. "top_k" takes the same number of
                keys for every query. "top_p" takes the fewest clusters that have the share `mass` of a query's
                attention; it does not use the density.
            mass: for "top_p" only, above 0 and up to 1.
            budget: how the heads share the attended keys. "measured" has the least error for the calibrating queries.
                "equal" gives all heads the same share, as top-k always does. "global" has one threshold for all layers
                and heads.
            hierarchical: whether to look up parents first, and then only the children of the kept parents. None means
                true if there are parents and `selection` is not "top_p".

        Raises:
            ValueError: an argument is wrong. The message names it, what was expected and what was got.
        """
        return ContextCache(self, batch_size, density, selection, mass, budget, hierarchical)

    @property
    def bytes(self) -> int:
        """The size of the keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


# --- the model -------------------------------------------------------------------------------------------------


def _check_model(op: str, model: torch.nn.Module) -> None:
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {parameters.get("rope_type")} | {p.get("rope_type") for p in parameters.values() if isinstance(p, dict)}
    rotary = kinds - {None}
    _checks.expect(bool(rotary), op, "model", "rotary embeddings, whose positions may begin anywhere", "none")
    moving = rotary & {"dynamic", "longrope"}
    _checks.expect(not moving, op, "model", "rotary embeddings that do not depend on the length", ", ".join(moving))
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = kinds - {"full_attention"} or getattr(config, "sliding_window", None) and "sliding_window"
    uses = getattr(config, "layer_types", None) or getattr(config, "use_sliding_window", True)
    _checks.expect(not (sliding and uses), op, "model", "layers that attend everything before", sliding)


def model_fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    config = model.config.get_text_config()
    return fingerprint(config) | {"dtype": str(model.dtype).removeprefix("torch."), "weights": _weights_checksum(model)}


def _weights_checksum(model: torch.nn.Module) -> int:
    """The CRC-32 of the first row of each weight."""
    crc = 0
    for parameter in model.base_model.parameters():
        row = parameter.detach().flatten()[: parameter.shape[-1]].cpu().contiguous()
        crc = zlib.crc32(row.view(torch.uint8).numpy().data, crc)
    return crc


def find_rope(model: torch.nn.Module) -> Rope | None:
    """How the model rotates its keys, or None if this is unknown. The model rotates an example to find out."""
    rotary = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor)]
    functions = (
        modeling_attribute(module, "apply_rotary_pos_emb") for module in model.modules() if hasattr(module, "layer_idx")
    )
    turn = next((function for function in functions if function is not None), None)
    if len(rotary) != 1 or turn is None:
        return None
    inv_freq = rotary[0].inv_freq.float()
    head_dim = fingerprint(model.config.get_text_config())["head_dim"]
    k = torch.randn(1, 1, 1, head_dim, generator=torch.Generator().manual_seed(0)).to(inv_freq.device)
    scale = getattr(rotary[0], "attention_scaling", 1.0)

    def key_at(position: int) -> torch.Tensor:
        cos, sin = rotary[0](k, torch.tensor([[position]], device=k.device))
        return turn(k, k, cos, sin)[1]

    try:
        here, there = key_at(3), key_at(-14)
    except Exception:  # the function takes other arguments
        return None
    for interleaved in (False, True):
        rope = Rope(tuple(inv_freq.tolist()), interleaved)
        if 2 * len(rope.inv_freq) <= head_dim and torch.allclose(
            rope.shift(here, -17), there, atol=1e-4 * max(scale, 1)
        ):
            return rope
    return None


def _read(model, input_ids, advance) -> tuple[DynamicCache, dict[int, torch.Tensor]]:
    """Reads input_ids [1, N] at the positions -N to -1.

    Returns the cache with the keys and values, and the queries of the last window by layer.
    """
    positions = torch.arange(-input_ids.shape[1], 0, device=input_ids.device)[None]
    cache = DynamicCache()
    layers = [module for module in model.modules() if attachment(module) is not None]
    with record_queries(layers, WINDOW, advance) as queries:
        model(input_ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache, queries


# --- the cache -------------------------------------------------------------------------------------------------------


class ContextLayer(DynamicLayer):
    """One layer of the cache: the context, which stays, and the questions' part, which grows and can be reset."""

    def __init__(self, layer: LayerContext, cache: ContextCache, threshold, parent_threshold):
        super().__init__()
        self.context, self.cache = layer, cache
        self.threshold, self.parent_threshold = threshold, parent_threshold
        self.tokens = layer.keys.shape[1]

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return ContextKeys(keys, self), values

    def attend(self, config, q, k, v, scale: float | None, kv_start: torch.Tensor | None):
        """The attention of q [B, Hq, Nq, D] over the context and over the question's k and v [B, Hkv, Nk, D].

        It attends the context by lookup, and the question causally. Returns the output [B, Hq, Nq, D], and the index of
        the attended part of the context.
        """
        _expect_model(self.cache.context, config)
        nq, nk = q.shape[2], k.shape[2]
        own, own_lse = sparse_attention(q, k, v, full_index(nq, nk, q.device), scale=scale, kv_start=kv_start)
        index = _index(self, q, scale)
        keys, values = (x.expand(q.shape[0], *x.shape) for x in (self.context.keys, self.context.values))
        fixed, fixed_lse = sparse_attention(q, keys, values, index, causal=False, scale=scale)
        return merge_attention(fixed, fixed_lse, own, own_lse)[0], index


class ContextCache(Cache):
    """A `Context` as a transformers cache. `Context.cache` makes it."""

    def __init__(self, context, batch_size, density, selection, mass, budget, hierarchical):
        op, has_parents = "Context.cache", context.layers[0].parent_scores is not None
        _checks.expect(type(batch_size) is int and batch_size >= 1, op, "batch_size", "a positive integer", batch_size)
        good = type(density) in (int, float) and 0 < density <= 1
        _checks.expect(good, op, "density", "a share above 0 and up to 1", density)
        _checks.expect(selection in SELECTIONS, op, "selection", f"one of {', '.join(SELECTIONS)}", selection)
        _checks.expect(budget in BUDGETS, op, "budget", f"one of {', '.join(BUDGETS)}", budget)
        good = type(mass) in (int, float) and 0 < mass <= 1 if selection == "top_p" else mass is None
        wanted = "a share above 0 and up to 1" if selection == "top_p" else 'None, but for selection="top_p"'
        _checks.expect(good, op, "mass", wanted, mass)
        hierarchical = has_parents and selection != "top_p" if hierarchical is None else hierarchical
        _checks.expect(has_parents or not hierarchical, op, "hierarchical", "False, since there are no parents", True)
        self.context, self.questions, self.density, self.selection = context, batch_size, density, selection
        self.mass, self.hierarchical = mass, hierarchical
        self.dense = density == 1 or context.layers[0].keys.numel() < BREAK_EVEN
        super().__init__(layers=[ContextLayer(*each) for each in self._layers(budget)])

    def _layers(self, budget: str):
        layers = self.context.layers
        if self.selection == "top_k":
            budget = "equal"
        limits = thresholds(layers, self.density, budget, self.hierarchical)
        for layer, (own, parents) in zip(layers, limits, strict=True):
            own = torch.zeros_like(own) if self.selection == "top_k" else own.exp().contiguous()
            yield layer, self, own, None if parents is None else parents.exp().contiguous()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        rows = key_states.shape[0]
        if rows % self.questions:
            raise ValueError(
                f"ContextCache: expected a batch of {self.questions}, as Context.cache was told, or a multiple of it "
                f"(beams), got {rows}"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _expect_model(context: Context, config) -> None:
    theirs = fingerprint(config)
    mine = {name: context.model.get(name) for name in theirs}
    if mine != theirs:
        raise ValueError(f"ContextCache: expected the model that the context was built with, {mine}, got {theirs}")


# --- the attended part ------------------------------------------------------------------------------------------------


def _index(layer: ContextLayer, q: torch.Tensor, scale: float | None) -> BlockIndex:
    context, cache, rows, keys = layer.context, layer.cache, -(-q.shape[2] // BLOCK), layer.tokens
    if cache.dense:
        return BlockIndex(*_blocks(0, keys, rows, q.device))
    if cache.selection == "top_p":
        columns = centroid_top_p(q, context.flat_clusters, cache.mass, scale=scale, block_q=BLOCK)
    else:
        columns = centroid_lookup(
            q,
            context.clusters if cache.hierarchical else context.flat_clusters,
            layer.threshold,
            scale=scale,
            block_q=BLOCK,
            parent_threshold=layer.parent_threshold,
            max_columns=max(1, round(cache.density * context.clustered)) if cache.selection == "top_k" else None,
        )
    count, ids = _blocks(context.clustered, keys, rows, q.device)
    shape = columns[0].shape
    return BlockIndex(count.expand(shape), ids.expand(*shape, ids.shape[-1]), *columns)


@functools.lru_cache(maxsize=64)
def _blocks(first: int, end: int, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [1, 1, rows] and ids [1, 1, rows, T] of the blocks from key `first` (a multiple of 64) to key `end`."""
    ids = torch.arange(first // BLOCK, -(-end // BLOCK), dtype=torch.int32, device=device)
    return torch.full((1, 1, rows), len(ids), dtype=torch.int32, device=device), ids.repeat(1, 1, rows, 1)

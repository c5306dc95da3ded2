"""Pruning of a whole model to a share of zeros in every row, one decoder layer at a time, by magnitude or by Wanda.

Both remove the weights of the smallest score in each row (output) of each linear layer::

    magnitude   |w[n, k]|
    wanda       |w[n, k]| · ‖x[:, k]‖₂       over the inputs x [tokens, K] that the layer has for sample texts

Wanda: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695), section 3.
Rows are compared within themselves for either, so all are equally dense. Nothing is retrained. The inputs of a layer
are those that the layers before it give *after* their pruning; to measure what all of it costs, held-out texts go
through the model twice at once, as it was and pruned, so that the model is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.bitmap import BitmapWeight
from .bitmap_linear import BitmapLinear
from .names import decoder_layers

METHODS = ("magnitude", "wanda")
# What makes the tensor that a layer then computes with: of the layer's name, and its pruned weight [N, K].
Pack = Callable[[str, torch.Tensor], torch.Tensor]


class Change(NamedTuple):
    """The mean loss of a text's second half, in nats a token."""

    before: float
    after: float


def prune_weight(w: torch.Tensor, sparsity: float, norms: torch.Tensor | None = None) -> torch.Tensor:
    """w [N, K] with round(sparsity · K) weights of every row set to +0.

    Args:
        w: float32, float16 or bfloat16.
        sparsity: the share of zeros, above 0 and below 1.
        norms: [K], of the inputs (Wanda); magnitude if None. Not negative.
    """
    check_sparsity("prune_weight", sparsity)
    if w.dim() != 2 or not w.is_floating_point() or not torch.isfinite(w).all():
        raise ValueError(f"prune_weight: w: expected finite weights [N, K], got {w.dtype} {list(w.shape)}")
    score = w.abs().float()
    if norms is not None:
        if norms.shape != (w.shape[1],) or not (torch.isfinite(norms) & (norms >= 0)).all():
            raise ValueError(f"prune_weight: norms: expected finite norms [{w.shape[1]}], got {list(norms.shape)}")
        score *= norms.float()
    count = round(sparsity * w.shape[1])
    smallest = score.topk(count, dim=1, largest=False, sorted=False).indices
    # Not w * mask: that leaves -0.0, which a bit-exact bitmap keeps.
    return w.scatter(1, smallest, 0.0)


def prune_layers(
    model: nn.Module,
    layers: Sequence[str],
    *,
    sparsity: float,
    method: str,
    samples: Sequence[torch.Tensor] = (),
    held_out: Mapping[str, torch.Tensor] | None = None,
    pack: Pack = lambda name, w: w,
    losses: dict[str, Change] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Prunes a model's linear layers in place, a decoder layer at a time, and yields each one's name when it is done.

    The weights of a layer that was yielded are let go when the next is asked for, so the model cannot be used
    afterwards: whoever wants them takes them at the yield.

    Args:
        model: a causal language model of transformers on the CPU, in evaluation mode.
        layers: the names of all its decoder layers, in order. Their plain linear layers are pruned, nothing else.
        sparsity: the share of zeros, above 0 and below 1.
        method: "magnitude" or "wanda".
        samples: token ids int64 [tokens], for Wanda.
        held_out: token ids int64 [tokens] by name, to measure the loss.
        pack: what the pruned layer computes with, so that rounding counts too.
        losses: filled, at the end, for every text of `held_out`.
        advance: called after every text in every layer, ``len(layers) · (2 · len(samples) + 2 · len(held_out))`` times
            for Wanda, without the samples for magnitude.
    """
    op = "prune_layers"
    check_sparsity(op, sparsity)
    if method not in METHODS:
        raise ValueError(f"{op}: method: expected 'magnitude' or 'wanda', got {method!r}")
    samples, held_out = list(samples) if method == "wanda" else [], dict(held_out or {})
    if method == "wanda" and not samples:
        raise ValueError(f"{op}: samples: expected at least one text for 'wanda', got none")
    for i, ids in enumerate([*samples, *held_out.values()]):
        if ids.dim() != 1 or ids.dtype != torch.int64 or len(ids) < 2:
            raise ValueError(f"{op}: text {i}: expected token ids int64 [2 or more], got {ids.dtype} {list(ids.shape)}")

    with torch.no_grad():
        runs = [_Run(model, layers, ids) for ids in (*samples, *held_out.values())]
    tests = runs[len(samples) :]
    dense = [run.hidden for run in tests]  # what the unpruned model gives for them
    for i, name in enumerate(layers):
        with torch.no_grad():
            layer = model.get_submodule(name)
            linears = {f"{name}.{part}": m for part, m in layer.named_modules() if type(m) is nn.Linear}
            with _square_sums(linears) as sums:
                for run in runs[: len(samples)]:
                    run.through(i, layer)
                    advance()
            for j, run in enumerate(tests):
                dense[j] = run.through(i, layer, dense[j])
                advance()
            for path, linear in linears.items():
                norms = sums[path].sqrt() if path in sums and sums[path].any() else None  # an expert may see no token
                try:
                    pruned = prune_weight(linear.weight, sparsity, norms)
                except ValueError as error:
                    raise ValueError(f"{path}.weight: {error}") from None
                linear.weight = nn.Parameter(pack(path, pruned), requires_grad=False)
            for run in runs:
                run.hidden = run.through(i, layer)
                advance()
        yield name
        layer.to("meta")
    with torch.no_grad():
        for name, run, before in zip(held_out, tests, dense):
            change = Change(run.loss(before), run.loss(run.hidden))
            if losses is not None:
                losses[name] = change


class Prune:
    """A `Transform` (`convert.py`): decoder layers with zeros in their linear layers, as bitmaps.

    It prunes the model that it was given, layer by layer as `convert` asks for them, and lets go of each layer when the
    next is asked for. A layer whose bitmap would take more bytes than its weight stays a plain, pruned one.

    Args:
        model, sparsity, method, samples, held_out: see `prune_layers`.
        values, group_size: see `BitmapWeight.compress`.
    """

    kind = BitmapLinear

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        method: str,
        values: str = "same",
        group_size: int = 128,
        samples: Sequence[torch.Tensor] = (),
        held_out: Mapping[str, torch.Tensor] | None = None,
    ):
        names = decoder_layers(model)
        inside = tuple(f"{name}." for name in names)
        self.layers = {
            name: m.weight.numel()
            for name, m in model.named_modules()
            if type(m) is nn.Linear and name.startswith(inside)
        }
        self.method, self.count = method, sum(self.layers.values())
        texts = len(held_out or {}) + (len(samples) if method == "wanda" else 0)
        self.steps = 2 * len(names) * texts  # how often `advance` is called
        self.advance: Callable[[], None] = lambda: None
        self.losses: dict[str, Change] = {}  # filled after the last layer
        self.plain: list[str] = []  # the layers whose bitmap would be larger
        self._stored = 0
        self._values, self._group_size = values, group_size
        self._packed: dict[str, Any] = {}  # of the present layer
        self._last = names[-1]
        options = {"sparsity": sparsity, "method": method, "samples": samples, "held_out": held_out}
        self._pruning = prune_layers(
            model, names, pack=self._pack, losses=self.losses, advance=lambda: self.advance(), **options
        )

    @property
    def density(self) -> float:
        """The share of the pruned layers' weights that are stored."""
        return self._stored / self.count

    def __call__(self, layer: str | None, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        if layer is None:
            return dict(tensors)
        self._packed = {}
        done = next(self._pruning)
        assert done == layer, (done, layer)
        rest = {name: x for name, x in tensors.items() if name.removesuffix(".weight") not in self.layers}
        packed, self._packed = self._packed, {}
        if layer == self._last:
            next(self._pruning, None)  # measures the losses
        return rest | packed

    def _pack(self, name: str, w: torch.Tensor) -> torch.Tensor:
        try:
            weight = BitmapWeight.compress(w, self._values, self._group_size)
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from None
        if weight.nbytes >= w.nbytes:
            self.plain.append(name)
            self._stored += w.numel()
            self._packed[f"{name}.weight"] = w
            return w
        self._packed[name] = BitmapLinear.from_weight(weight)
        self._stored += self._packed[name].nnz
        return weight.decompress()


def check_sparsity(op: str, sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise ValueError(f"{op}: sparsity: expected a share of zeros above 0 and below 1, got {sparsity}")


class _Run:
    """One text on its way through a model's decoder layers, each called as the model itself calls it."""

    def __init__(self, model: nn.Module, layers: Sequence[str], ids: torch.Tensor):
        self.model, self.layers, self.ids = model, layers, ids[None]
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        tuples = False  # some models' layers give a tuple that begins with the hidden states

        def record(place: int, forward: Callable, *args, **kwargs):
            nonlocal tuples
            hidden = args[0] if args else kwargs.pop("hidden_states")
            self.calls.append((args[1:], kwargs))
            if place == 0:
                self.hidden = hidden
                tuples = isinstance(forward(hidden, *args[1:], **kwargs), tuple)
            return (hidden,) if tuples else hidden

        with _forwards(model, layers, record):
            model.base_model(self.ids, use_cache=False)
        if len(self.calls) != len(layers):
            raise ValueError(
                f"prune_layers: model: expected {len(layers)} layers called once, got {len(self.calls)} calls"
            )
        self.tuples = tuples

    def through(self, place: int, layer: nn.Module, hidden: torch.Tensor | None = None) -> torch.Tensor:
        args, kwargs = self.calls[place]
        out = layer(self.hidden if hidden is None else hidden, *args, **kwargs)
        return out[0] if self.tuples else out

    def loss(self, hidden: torch.Tensor) -> float:
        """Of the second half of the tokens, from the last layer's output."""
        tail = self.ids.shape[1] // 2

        def last(place: int, forward: Callable, *args, **kwargs):
            return (hidden,) if self.tuples else hidden

        with _forwards(self.model, self.layers, last):
            logits = self.model(self.ids, use_cache=False, logits_to_keep=tail + 1).logits[0, :-1]
        losses = [
            F.cross_entropy(part.float(), wanted, reduction="none")
            for part, wanted in zip(logits.split(256), self.ids[0, -tail:].split(256))
        ]
        return torch.cat(losses).mean().item()


@contextmanager
def _forwards(model: nn.Module, layers: Sequence[str], function: Callable) -> Iterator[None]:
    """Calls ``function(place, forward, *args, **kwargs)`` for the layers' own forwards."""
    modules = [model.get_submodule(name) for name in layers]
    before = [vars(module).get("forward") for module in modules]
    for place, module in enumerate(modules):
        own = module.forward
        module.forward = lambda *args, place=place, own=own, **kwargs: function(place, own, *args, **kwargs)
    try:
        yield
    finally:
        for module, forward in zip(modules, before):
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def _square_sums(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, torch.Tensor]]:
    """Of every linear layer that is called, the sum over tokens of its squared inputs, float64 [K]."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        new = x.reshape(-1, x.shape[-1]).float().square().sum(0, dtype=torch.float64)
        sums[name] = sums[name] + new if name in sums else new

    handles = [
        linear.register_forward_pre_hook(lambda module, args, name=name: add(name, args[0]))
        for name, linear in linears.items()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()

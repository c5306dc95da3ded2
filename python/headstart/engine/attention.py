"""The attention function and the mask function that transformers calls, under the name "headstart".

transformers builds one mask a forward and hands it to every layer. Ours is a `DeferredMask`: it stands for the 4-D
mask, knows whether that is plain causality with at most left padding, and is built only where somebody needs it. A
layer with such a mask runs headstart's operators; any other runs the attention that the model had before, with the
mask that that attention wants.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import _library
from ..offline.prefill_plan import PrefillPlan, full_index
from ..ops._checks import FLOAT_DTYPES
from ..ops.sparse_attention import BlockIndex, sparse_attention

NAME = "headstart"

# A prompt shorter than this gains too little from sparsity to pay for finding it.
SHORT_PROMPT = 1024
# A chunk of fewer queries than one block of rows, decoding above all, is always dense.
FEW_QUERIES = 64

# Arguments that say nothing about which keys a query attends beyond what the mask says.
_HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)


@dataclass
class Attachment:
    """What `patch` hangs on an attention module."""

    plan: PrefillPlan
    own: str | None  # the attention implementation that the model had
    said: set[str] = field(default_factory=set)  # reasons for running it that were told; shared by a model's layers


patched: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def attachment(module: torch.nn.Module) -> Attachment | None:
    return vars(module).get("_headstart")


def choose_path(nq: int, nk: int, *, dense_plan: bool, has_kernel: bool) -> str:
    """How a layer with nq queries and nk keys runs: "sparse", "dense" (every block, by our kernel), or "own".

    The one place for the promise that a patched model is never slower than it was.
    """
    if nq >= FEW_QUERIES and nk >= SHORT_PROMPT and not dense_plan:
        return "sparse"
    return "dense" if has_kernel else "own"


# --- the mask ------------------------------------------------------------------------------------------------------


class DeferredMask(torch.Tensor):
    """A boolean mask [B, 1, Nq, Nk] that is built on first use by any torch operation.

    ``not_causal`` is None where the mask is causality and left padding alone, else what it is besides;
    ``num_keys`` is how many of the Nk keys exist so far (a static cache has room for more); ``kv_start`` int32 [B]
    is the first real key of each sequence, or None where all are real.
    """

    @staticmethod
    def __new__(cls, arguments: dict[str, Any]):
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=arguments["device"])
        mask.arguments, mask.built = arguments, {}
        mask.num_keys = int(arguments["q_offset"]) + arguments["q_length"]
        mask.not_causal, mask.kv_start = _analyse(mask.num_keys, **arguments)
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = _pytree.tree_map_only(DeferredMask, DeferredMask.dense, (args, kwargs or {}))
        return function(*args, **kwargs)

    def dense(self) -> torch.Tensor:
        if "dense" not in self.built:
            self.built["dense"] = _dense_mask(self.arguments)
        return self.built["dense"]

    def wanted_by(self, implementation: str | None) -> Any:
        """What transformers would have handed to an attention implementation."""
        implementation = implementation or "eager"
        if implementation not in self.built:
            known = implementation in ALL_MASK_ATTENTION_FUNCTIONS
            build = ALL_MASK_ATTENTION_FUNCTIONS[implementation] if known else lambda **_: None
            self.built[implementation] = build(**self.arguments)
        return self.built[implementation]

    def __repr__(self):
        return f"DeferredMask({list(self.shape)}, not_causal={self.not_causal!r}, kv_start={self.kv_start})"


def _dense_mask(arguments: dict[str, Any]) -> torch.Tensor:
    return sdpa_mask(**arguments | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _analyse(
    num_keys: int,
    *,
    q_length,
    kv_length,
    kv_offset,
    mask_function,
    attention_mask,
    allow_is_causal_skip,
    local_size=None,
    **_,
) -> tuple[str | None, torch.Tensor | None]:
    if kv_offset != 0 or num_keys > kv_length:
        return "a sliding window shorter than the sequence", None
    if local_size is not None and num_keys > local_size:
        return "a sliding window or chunk shorter than the sequence", None
    # With a window, transformers composes the mask function anew; that it allows the skip says that a window and
    # causality are all there is to it.
    plain = mask_function is causal_mask_function or (local_size is not None and allow_is_causal_skip)
    if not plain:
        return (
            "a mask other than causal (packed sequences, an overlay, bidirectional attention, or a sliding window in a "
            "static cache)"
        ), None
    if attention_mask is None:
        return None, None
    real = attention_mask[:, :num_keys]
    padding = (~real).sum(-1, dtype=torch.int32)
    if not padding.any():
        return (None, None) if real.shape[1] == num_keys else ("padding that is not on the left", None)
    first_real = torch.arange(real.shape[1], device=real.device) >= padding[:, None]
    if real.shape[1] < num_keys or not real[:, -1].all() or not torch.equal(real, first_real):
        return "padding that is not on the left", None
    return None, padding


def headstart_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor:
    arguments = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        device=device,
        **kwargs,
    )
    # A compiled graph cannot look at the padding, so it gets the mask itself, and the model's own attention.
    return _dense_mask(arguments) if torch.compiler.is_compiling() else DeferredMask(arguments)


# --- the attention -------------------------------------------------------------------------------------------------


def headstart_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D] to [B, Nq, Hq, D], and the weights, which only eager attention has."""
    here = attachment(module)

    def run_own():
        given = kwargs if is_causal is None else kwargs | {"is_causal": is_causal}
        return _own_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given)

    if here is None:
        return run_own()
    reason = _unsupported(module, query, key, value, attention_mask, dropout, is_causal, kwargs)
    if reason is not None:
        _say_once(here, module, reason)
        return run_own()

    nq, nk, kv_start = query.shape[2], attention_mask.num_keys, attention_mask.kv_start
    has_kernel = _library.has_kernel("sparse_attention", query.device.type.upper())
    path = choose_path(nq, nk, dense_plan=here.plan.is_dense, has_kernel=has_kernel)
    if path == "own":
        return run_own()
    key, value = key[:, :, :nk], value[:, :, :nk]
    if path == "dense":
        index = full_index(nq, nk, query.device)
    else:
        index = here.plan.index(module.layer_idx, query, key, kv_start=kv_start, scale=scaling)
    for entries in _recordings:
        entries.append(Recorded(module.layer_idx, index, nq, nk, path))
    out, _ = sparse_attention(query, key, value, index, scale=scaling, kv_start=kv_start)
    return out.transpose(1, 2).contiguous(), None


def _unsupported(module, query, key, value, mask, dropout, is_causal, kwargs) -> str | None:
    """Why a layer must run the model's own attention, or None."""
    unknown = [
        name for name, given in kwargs.items() if name not in _HARMLESS and given is not None and given is not False
    ]
    if unknown:
        return f"{', '.join(unknown)}, which headstart does not support"
    if not isinstance(mask, DeferredMask):
        return "no mask that says it is causal" if mask is None else "a custom or materialised mask"
    if mask.not_causal is not None:
        return mask.not_causal
    if is_causal is False or getattr(module, "is_causal", True) is False:
        return "attention that is not causal"
    if dropout > 0:
        return "dropout"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients, which headstart does not compute (call the model under torch.no_grad())"
    head_dim = query.shape[-1]
    if query.dtype not in FLOAT_DTYPES or head_dim % 8 or head_dim > 256 or value.shape[-1] != head_dim:
        return f"{query.dtype} with head dims of {head_dim} (keys) and {value.shape[-1]} (values)"
    expected = (mask.shape[0], mask.shape[2], mask.shape[3])
    if (query.shape[0], query.shape[2], key.shape[2]) != expected:
        return "keys or queries that the mask does not describe"
    return None


def _say_once(here: Attachment, module: torch.nn.Module, reason: str) -> None:
    if reason not in here.said and not torch.compiler.is_compiling():
        here.said.add(reason)
        warnings.warn(
            f"headstart: the model's own attention ({here.own or 'eager'}) runs from layer {module.layer_idx} "
            f"({type(module).__name__}) because of {reason}. This is said once.",
            RuntimeWarning,
            stacklevel=3,
        )


def _own_attention(module, query, key, value, mask, **kwargs):
    here = attachment(module)
    if here is None:  # a model that was not patched, but shares its config with one that was
        here = next(attachment(m) for m in patched if m.config is module.config)
    own = here.own or "eager"
    if isinstance(mask, DeferredMask):
        mask = mask.wanted_by(own)
    elif own == "eager" and isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, torch.finfo(query.dtype).min)
    eager = modeling_attribute(module, "eager_attention_forward")
    return ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)(module, query, key, value, mask, **kwargs)


def modeling_attribute(module: torch.nn.Module, name: str) -> Any:
    """A name in the file where a module's class, or a class that it extends, is defined; None if there is none."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return next((getattr(file, name) for file in files if hasattr(file, name)), None)


def register() -> None:
    AttentionInterface.register(NAME, headstart_attention)
    AttentionMaskInterface.register(NAME, headstart_mask)


# --- what was attended ---------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    layer: int
    index: BlockIndex
    nq: int
    nk: int
    path: str


_recordings: list[list[Recorded]] = []


@contextmanager
def record() -> Iterator[list[Recorded]]:
    """Collects the index of every layer that headstart's attention runs, in order."""
    entries: list[Recorded] = []
    _recordings.append(entries)
    try:
        yield entries
    finally:
        _recordings.remove(entries)

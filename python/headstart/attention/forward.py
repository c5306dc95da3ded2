"""The attention function that transformers calls, under the name "headstart".

The mask (`mask.py`) says what a query may see. headstart's operators handle causality, a sliding window, left padding
and packed sequences. If a query sees the whole past, the plan's sparse pattern runs. If a window hides a part of the
past, the blocks of the window run. Packed sequences run one by one. The keys of a `ContextCache` are `ContextKeys`.
They belong to a fixed context, which computes the attention itself (`context/context.py`). In all other cases the
attention that the model had before runs, with the mask that it expects.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import _library
from ..ops._checks import FLOAT_DTYPES
from ..ops.sparse_attention import sparse_attention
from . import anchor, cost, recording
from .index import full_index, window_index
from .mask import DeferredMask, headstart_mask
from .plan import PrefillPlan

NAME = "headstart"

# The attention of fewer queries than this, one block of rows, is always exact. Decoding is an example.
FEW_QUERIES = 64
# On a device without costs, a GPU, a prompt shorter than this gets exact attention. On an H100, launching the kernels
# that build an index took longer than they saved at 8,192 tokens of a small model. At 32,768 of a large one they saved.
SHORT_PROMPT = 16384

# Arguments that do not change which keys a query attends.
_HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
# Arguments that repeat what the mask says. They must agree with it.
_REPEATED = frozenset({"cu_seq_lens_k", "cu_seq_lens_q", "sliding_window"})


@dataclass
class Attachment:
    """What `patch` stores on an attention module."""

    plan: PrefillPlan
    own: str | None  # the attention implementation that the model had
    warned: set[str] = field(default_factory=set)  # the reasons that a warning named; a model's layers share it
    paths: dict[tuple, str] = field(default_factory=dict, repr=False)  # the choices of `choose_path`, by shape


_patched: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_patched_lock = threading.Lock()  # other threads may look while a model is patched or deleted


def attachment(module: torch.nn.Module) -> Attachment | None:
    return vars(module).get("_headstart")


def set_attachment(module: torch.nn.Module, attached: Attachment | None) -> None:
    with _patched_lock:
        _patched.discard(module)
        vars(module).pop("_headstart", None)
        if attached is not None:
            module._headstart = attached
            _patched.add(module)


def attachment_for(config) -> Attachment | None:
    """The attachment of a patched layer that has this config object, or None. Several models may share a config."""
    with _patched_lock:
        return next((attachment(module) for module in _patched if module.config is config), None)


def choose_path(
    here: Attachment,
    layer: int,
    device: str,
    call: cost.Call,
    *,
    own: str | None,
    has_kernel: bool,
    window: int | None = None,
) -> str:
    """The path of a layer's call.

    - "sparse": headstart's kernel on the blocks of the plan's index;
    - "dense": headstart's kernel on every block;
    - "window": headstart's kernel on the blocks of a sliding window that hides some keys;
    - "own": the model's own attention, whose cost is known only for SDPA.

    This function exists so that a patched model is never slower than before. On a CPU it compares the costs that
    `headstart tune` fitted. It rounds lengths down, by less than a sixteenth, so a choice stays valid while a cache
    grows. On a GPU the length of the prompt decides.
    """
    forced = _forced.get()
    if window is not None and window < call.nk:
        return "window" if forced in ("sparse", "dense") or (has_kernel and forced is None) else "own"
    may_be_sparse = call.nq >= FEW_QUERIES
    if forced is not None:
        exact = "dense" if forced == "sparse" else forced
        return "sparse" if forced == "sparse" and may_be_sparse and not _is_dense(here, layer, call) else exact
    if not has_kernel:
        return "own"
    if device != "cpu":
        if may_be_sparse and call.nk >= SHORT_PROMPT and not _is_dense(here, layer, call):
            return "sparse"
        return "dense" if own is None else "own"  # SDPA is the faster of the two on an H100
    call = call._replace(nq=_coarse(call.nq), nk=_coarse(call.nk), masked_keys=_coarse(call.masked_keys))
    key = (*call, own, torch.get_num_threads())
    if key not in here.paths:
        may_be_sparse = may_be_sparse and not _is_dense(here, layer, call)
        here.paths[key] = anchor.in_use(call.dtype).fastest(call, here.plan, layer, own=own, sparse=may_be_sparse)
    return here.paths[key]


def _coarse(n: int) -> int:
    dropped = max(n.bit_length() - 5, 0)
    return n >> dropped << dropped


def _is_dense(here: Attachment, layer: int, call: cost.Call) -> bool:
    return all(pattern.name == "dense" for pattern in here.plan.heads(layer, call.heads))


PATHS = ("sparse", "dense", "own")
_forced: ContextVar[str | None] = ContextVar("headstart_forced_path", default=None)


@contextmanager
def force_path(path: str) -> Iterator[None]:
    """Makes all calls of this thread take one path of `PATHS`, whatever it costs.

    With "sparse", a call that cannot be sparse is dense. A sliding window that hides keys still counts: with "own", the
    model's own attention applies it, and otherwise the path is "window". Raises a ValueError for an unknown path.
    """
    if path not in PATHS:
        raise ValueError(f"force_path: path: expected one of {', '.join(PATHS)}, got {path!r}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def splitting_pays(sequences: int, batch: int, tokens: int) -> bool:
    """Whether attending packed sequences one by one is faster. A call is assumed to cost as much as 64 × 64 pairs."""
    return sequences * FEW_QUERIES**2 <= batch * tokens**2


class ContextKeys(torch.Tensor):
    """The keys of a question, together with a fixed context. A `ContextCache` gives them to the attention of a layer.

    ``own`` are the keys as a plain tensor. ``context`` computes their attention. Only headstart's attention can use
    these keys. Any other operation would leave the context out, so it is an error.
    """

    @staticmethod
    def __new__(cls, own: torch.Tensor, context):
        keys = torch.Tensor._make_wrapper_subclass(cls, own.shape, dtype=own.dtype, device=own.device)
        keys.own, keys.context = own, context
        return keys

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(
            f"ContextCache: {function} would leave the fixed context out: the model's attention is not headstart's. "
            "Call headstart.patch(model), then cache.reset(), and ask again"
        )

    def __repr__(self):
        return f"ContextKeys({list(self.shape)}, {self.context!r})"


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
    """The output [B, Nq, Hq, D] and the attention weights for q [B, Hq, Nq, D] and k, v [B, Hkv, Nk, D].

    Only the model's own eager attention returns weights. Otherwise they are None.
    """
    here = attachment(module)
    if not torch.compiler.is_compiling():
        recording.add_queries(module, query)

    def run_own():
        given = kwargs if is_causal is None else kwargs | {"is_causal": is_causal}
        return _own_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given)

    if here is None:
        return run_own()
    keys = key.own if isinstance(key, ContextKeys) else key
    reason = _unsupported(here.own, module, query, keys, value, attention_mask, dropout, is_causal, kwargs)
    if isinstance(key, ContextKeys):
        if reason is not None:
            raise ValueError(f"ContextCache: no attention for layer {module.layer_idx} because of {reason}")
        context = key.context
        out, index = context.attend(module.config, query, keys, value, scaling, attention_mask.kv_start)
        recording.add(module.layer_idx, index, query.shape[2], context.tokens, "context")
        return out.transpose(1, 2).contiguous(), None
    if reason is not None:
        _warn_once(here, module, reason)
        return run_own()

    def path_of(call: cost.Call, own: str | None) -> str:
        return choose_path(
            here,
            module.layer_idx,
            query.device.type,
            call,
            own=own,
            has_kernel=_library.has_kernel("sparse_attention", query.device.type.upper()),
            window=attention_mask.window,
        )

    (batch, heads, nq, head_dim), nk, sequences = query.shape, attention_mask.num_keys, attention_mask.sequences
    # As in transformers' SDPA: a whole prompt, or one query that sees all keys, needs no mask.
    plain = attention_mask.kv_start is None and key.shape[2] == nk and nq in (1, nk)
    masked_keys = 0 if plain else key.shape[2]
    call = cost.Call(batch, heads, key.shape[1], nq, nk, head_dim, query.dtype, masked_keys)
    if sequences is None:
        path = path_of(call, here.own)
        if path == "own":
            return run_own()
        out = _attend(here, module, path, query, key[:, :, :nk], value[:, :, :nk], attention_mask, scaling)
        return out.transpose(1, 2).contiguous(), None

    # The model's own attention would compute all sequences at once, with a mask of all pairs.
    alone = call._replace(batch=1, masked_keys=0)
    paths = [path_of(alone._replace(nq=end - begin, nk=end - begin), None) for _, begin, end in sequences]
    if "own" in paths or not splitting_pays(len(sequences), batch, nq):
        return run_own()
    out = query.new_empty(batch, nq, heads, head_dim)
    for path, (row, begin, end) in zip(paths, sequences):
        q, k, v = (x[row : row + 1, :, begin:end] for x in (query, key, value))
        out[row, begin:end] = _attend(here, module, path, q, k, v, attention_mask, scaling)[0].transpose(0, 1)
    return out, None


def _attend(here: Attachment, module, path: str, q, k, v, mask: DeferredMask, scale: float | None) -> torch.Tensor:
    """The output of q [B, Hq, Nq, D] over the keys k and values v [B, Hkv, Nk, D] that the mask allows."""
    nq, nk = q.shape[2], k.shape[2]
    window = mask.window if path == "window" else None
    if path == "dense":
        index = full_index(nq, nk, q.device)
    elif path == "window":
        index = window_index(nq, nk, window, q.device)
    else:
        index = here.plan.index(module.layer_idx, q, k, kv_start=mask.kv_start, scale=scale)
    recording.add(module.layer_idx, index, nq, nk, path, window)
    return sparse_attention(q, k, v, index, scale=scale, kv_start=mask.kv_start, window=window)[0]


def _unsupported(own, module, query, key, value, mask, dropout, is_causal, kwargs) -> str | None:
    """The reason why a layer must run the model's own attention, or None."""
    given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    unknown = given.keys() - _HARMLESS - _REPEATED
    if unknown:
        return f"{', '.join(sorted(unknown))}, which headstart does not support"
    if not isinstance(mask, DeferredMask):
        return "a missing mask, which would say that it is causal" if mask is None else "a custom or materialised mask"
    if mask.unknown is not None:
        return mask.unknown
    contradiction = _contradiction(mask, given, own)
    if contradiction is not None:
        return contradiction
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


def _contradiction(mask: DeferredMask, given: dict[str, Any], own: str | None) -> str | None:
    """Names an argument that contradicts the mask, or None.

    In such a case the model's own attention must run. Eager and SDPA follow the mask; flash attention follows the
    arguments.
    """
    window = given.get("sliding_window")
    if window is not None and window < mask.num_keys and window != mask.window:
        return "a sliding window that the mask does not have"
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in given and not mask.splits_at(given[name]):
            return (
                f"{name} that the mask contradicts (transformers makes the mask of packed sequences from position_ids "
                "that restart, where there is no cache: use_cache=False)"
            )
    if "flash" in (own or "") and mask.shape[0] == 1 and mask.sequences is None and mask.kv_start is None:
        positions = given.get("position_ids")
        if isinstance(positions, torch.Tensor) and positions.dim() == 2 and not mask.is_consecutive(positions):
            return "position_ids that restart where the mask does not"
    return None


def _warn_once(here: Attachment, module: torch.nn.Module, reason: str) -> None:
    if reason not in here.warned and not torch.compiler.is_compiling():
        here.warned.add(reason)
        warnings.warn(
            f"headstart: the model's own attention ({here.own or 'eager'}) runs from layer {module.layer_idx} "
            f"({type(module).__name__}) because of {reason}. This warning appears once.",
            RuntimeWarning,
            stacklevel=3,
        )


def _own_attention(module, query, key, value, mask, **kwargs):
    # A model that is not patched may share its config with a patched model. And another thread may have just unpatched
    # this model.
    here = attachment(module) or attachment_for(module.config)
    own = (module.config._attn_implementation if here is None else here.own) or "eager"
    if isinstance(mask, DeferredMask):
        mask = mask.wanted_by(own)
    elif own == "eager" and isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, torch.finfo(query.dtype).min)
    eager = modeling_attribute(module, "eager_attention_forward")
    return ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)(module, query, key, value, mask, **kwargs)


def modeling_attribute(module: torch.nn.Module, name: str) -> Any:
    """The value of a name in the file that defines a module's class or a base class of it. None if no file has it."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return next((getattr(file, name) for file in files if hasattr(file, name)), None)


def register() -> None:
    AttentionInterface.register(NAME, headstart_attention)
    AttentionMaskInterface.register(NAME, headstart_mask)

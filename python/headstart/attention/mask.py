"""Reads from a mask of transformers what a query may attend, without building its Nq × Nk values.

For each forward and kind of layer, transformers makes one mask from a function of (batch, head, query, key). The
function consists of a few known parts. A `DeferredMask` stands for the 4-D mask and knows its parts. Its values are
built only if somebody needs them. If a part is not known, the whole mask is unknown.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils import _pytree
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask

# --- mask functions, taken apart -------------------------------------------------------------------------------------


def _known_parts() -> dict[Any, str]:
    """The names of the functions from which transformers makes masks, by their code objects.

    Functions from one `def` share their code, and keep their arguments in their closures. Each function is first tried
    on an example. If it computes something else, it is left out.
    """
    q, k = torch.arange(6)[:, None], torch.arange(6)
    batch = head = torch.zeros(1, 1, dtype=torch.long)
    sequence = torch.tensor([[0, 0, 1, 1, 1, 2]])
    restarting = torch.tensor([[0, 1, 0, 1, 2, 0]])
    causal = causal_mask_function
    examples = {
        "and_masks": ((causal, lambda b, h, i, j: j > 2), (k <= q) & (k > 2)),
        "sliding_window_overlay": ((3,), k > q - 3),
        "packed_sequence_mask_function": ((sequence,), sequence.mT == sequence),
        "remap_positions_for_packed_sequence": ((causal, restarting), restarting <= restarting.mT),
    }
    parts = {}
    for name, (arguments, expected) in examples.items():
        try:
            function = getattr(masking_utils, name)(*arguments)
            if torch.equal(function(batch, head, q, k), expected):
                parts[function.__code__] = name
        except Exception:  # this version of transformers does not have the function, so such masks are unknown
            continue
    return parts


_PARTS = _known_parts()


class _Rule(NamedTuple):
    """A query attends a key if causality and all of these allow it."""

    window: int | None = None
    packed: torch.Tensor | None = None  # [B or 1, N]: the sequence of each token
    positions: torch.Tensor | None = None  # [B or 1, N]: positions within the sequences, for causality and the window


def _rule(function) -> _Rule | None:
    """The rule of a mask function, or None if it has an unknown part."""
    parts: list[tuple[str, Any]] = []
    if not _take_apart(function, parts) or ("causal", None) not in parts:
        return None
    found = {name: [value for part, value in parts if part == name] for name in ("window", "packed", "positions")}
    if len(found["packed"]) > 1 or len(found["positions"]) > len(found["packed"]):
        return None
    if any(type(window) is not int or window < 1 for window in found["window"]):
        return None
    return _Rule(min(found["window"], default=None), *((found[name] or [None])[0] for name in ("packed", "positions")))


def _take_apart(function, parts: list[tuple[str, Any]]) -> bool:
    if function is causal_mask_function:
        parts.append(("causal", None))
        return True
    code = getattr(function, "__code__", None)
    arguments = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()))) if code else {}
    match _PARTS.get(code):
        case "and_masks":
            return all(_take_apart(each, parts) for each in arguments["mask_functions"])
        case "sliding_window_overlay":
            parts.append(("window", arguments["sliding_window"]))
        case "packed_sequence_mask_function":
            parts.append(("packed", arguments["packed_sequence_mask"]))
        case "remap_positions_for_packed_sequence":
            inner: list[tuple[str, Any]] = []
            known = _take_apart(arguments["mask_function"], inner) and {name for name, _ in inner} <= {
                "causal",
                "window",
            }
            parts += [("positions", arguments["position_ids"]), *inner]
            return known
        case _:
            return False
    return True


# --- the mask --------------------------------------------------------------------------------------------------------


class PackedSequence(NamedTuple):
    """A sequence that fills the tokens [begin, end) of one row of a batch."""

    row: int
    begin: int
    end: int


class DeferredMask(torch.Tensor):
    """A boolean mask [B, 1, Nq, Nk] that is built when a torch operation first uses it.

    - ``unknown``: None if the other attributes describe the mask completely; otherwise the reason why they do not.
    - ``num_keys``: the number of keys that are filled. A static cache has room for more. The queries stand at the last
      of these keys, and a query sees no key after its own.
    - ``window``: the number of keys, ending with its own, that a query sees. None means all.
    - ``kv_start``: int32 [B], the first real key of each row. None means that all keys are real.
    - ``sequences``: the sequences that are packed in the batch. Each of them sees only itself. None means that each row
      is one sequence.
    """

    @staticmethod
    def __new__(cls, arguments: dict[str, Any]):
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=arguments["device"])
        mask.arguments, mask.built, mask.looked_at = arguments, {}, {}
        mask.num_keys = arguments["q_offset"] + arguments["q_length"] - arguments["kv_offset"]
        mask.window = mask.kv_start = mask.sequences = None
        mask.unknown = mask._analyse()
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
        """The mask that transformers would have given to an attention implementation."""
        implementation = implementation or "eager"
        if implementation not in self.built:
            known = implementation in ALL_MASK_ATTENTION_FUNCTIONS
            build = ALL_MASK_ATTENTION_FUNCTIONS[implementation] if known else lambda **_: None
            self.built[implementation] = build(**self.arguments)
        return self.built[implementation]

    def splits_at(self, cu_seq_lens: Any) -> bool:
        """Whether the mask separates the same sequences as these cumulative lengths over the flattened batch."""
        batch, _, nq, nk = self.shape
        if not isinstance(cu_seq_lens, torch.Tensor) or self.kv_start is not None or not nq == nk == self.num_keys:
            return False
        rows = self.sequences or [PackedSequence(row, 0, nq) for row in range(batch)]
        ends = [*(each.row * nq + each.begin for each in rows), batch * nq]
        return self._once(cu_seq_lens, lambda: sorted(set(cu_seq_lens.flatten().tolist())) == ends)

    def is_consecutive(self, position_ids: torch.Tensor) -> bool:
        return self._once(position_ids, lambda: bool((position_ids.diff(dim=-1) == 1).all()))

    def _once(self, tensor: torch.Tensor, look) -> bool:
        """The result of `look` for an argument that comes with the mask; later layers get the same result."""
        if id(tensor) not in self.looked_at:
            self.looked_at[id(tensor)] = (look(), tensor)  # keeps the tensor, so no other tensor gets its id
        return self.looked_at[id(tensor)][0]

    def _analyse(self) -> str | None:
        batch, _, nq, nk = self.shape
        offset, padding = self.arguments["kv_offset"], self.arguments["attention_mask"]
        rule = _rule(self.arguments["mask_function"])
        if rule is None:
            return (
                "a mask other than causality, a sliding window, left padding and packed sequences "
                "(an overlay, chunks, bidirectional attention)"
            )
        if not nq <= self.num_keys <= nk or offset < 0:
            return "a mask of other keys than those given"
        self.window = rule.window
        if rule.packed is not None:
            if padding is not None or offset != 0 or not nq == nk == self.num_keys:
                return "packed sequences with padding or a cache"
            self.sequences = _sequences(batch, nq, rule)
            return "positions that do not follow each other within a packed sequence" if not self.sequences else None
        if padding is None:
            return None
        real = padding[:, offset : offset + self.num_keys]
        hidden = (~real).sum(-1, dtype=torch.int32)
        if real.shape[1] == self.num_keys and not hidden.any():
            return None
        keys = torch.arange(self.num_keys, device=padding.device)
        if real.shape[1] < self.num_keys or not torch.equal(real, keys >= hidden[:, None]):
            return "padding that is not on the left"
        self.kv_start = hidden
        return None

    def __repr__(self):
        known = f"window={self.window}, kv_start={self.kv_start}, sequences={self.sequences}"
        return f"DeferredMask({list(self.shape)}, {known if self.unknown is None else self.unknown})"


def _sequences(batch: int, tokens: int, rule: _Rule) -> list[PackedSequence] | None:
    """The sequences that are packed in a batch. None if a sequence is in pieces or its positions have gaps."""
    step = rule.packed.expand(batch, tokens).diff(dim=-1)
    follows = step >= 0
    if rule.positions is not None:
        follows &= (step > 0) | (rule.positions.expand(batch, tokens).diff(dim=-1) == 1)
    if not follows.all():
        return None
    begins = torch.nn.functional.pad(step > 0, (1, 0), value=True).nonzero().tolist()
    ends = [*begins[1:], [batch, 0]]
    return [PackedSequence(row, begin, end or tokens) for (row, begin), (_, end) in zip(begins, ends)]


def _dense_mask(arguments: dict[str, Any]) -> torch.Tensor:
    return sdpa_mask(**arguments | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def headstart_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
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
    # A compiled graph cannot look at the padding. It gets the mask itself, and runs the model's own attention.
    if torch.compiler.is_compiling():
        return _dense_mask(arguments)
    # The offset of a static cache is a tensor, which the cache increases in place before the mask is built.
    return DeferredMask(arguments | {"q_offset": int(q_offset), "kv_offset": int(kv_offset)})

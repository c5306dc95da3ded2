"""The models of `headstart demo offload`: one in bfloat16, and the same one half pruned, as bitmaps."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..._files import write_whole_folder
from ..._quiet import no_progress_bars
from ...model.load import SMOLLM2, find_checkpoint, load_model, load_tokenizer
from ...ops.bitmap import BitmapWeight
from ...weights.bitmap_linear import BitmapLinear
from ...weights.convert import Original, convert
from ...weights.prune import prune_weight
from ..texts import token_ids

DENSE = "bfloat16"
VALUES = {"bitmap 50 %": "same", "int8 + bitmap": "int8", "int4 + bitmap": "int4"}
LLAMA_1B = dict(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
)


class Size(NamedTuple):
    name: str
    layers: int
    mib: int  # of the weights in bfloat16


SIZES = {
    SMOLLM2: Size("SmolLM2-135M", 30, 257),
    "1b": Size("a Llama of 1.1 billion random weights", LLAMA_1B["num_hidden_layers"], 2099),
}
ALL_FILES = 3.3  # times that: the four models, and what accelerate writes
PROMPT = 8  # tokens


def make(size: str, folder: Path, seed: int, advance: Callable[[], None]) -> dict[str, Path]:
    """A folder for each of the models, by name; if all are there already, nothing is written."""
    folders = {name: folder / f"{size}-{seed}-{name.replace(' ', '').replace('%', '')}" for name in (DENSE, *VALUES)}
    if all((path / "config.json").is_file() for path in folders.values()):
        for _ in range(SIZES[size].layers * len(folders)):
            advance()
        return folders
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = ALL_FILES * SIZES[size].mib / 1024, shutil.disk_usage(folder).free / 2**30
    if free < needed:
        raise ValueError(f"demo: files: expected {needed:.1f} GiB of free space in {folder}, got {free:.1f} GiB")
    model = load_model(SMOLLM2, dtype=torch.bfloat16, packed=False)[0] if size == SMOLLM2 else random_llama(seed)
    write_all(model, folders, advance)
    return folders


def random_llama(seed: int, **sizes: int):
    """In bfloat16. All its layers have the same weights, so that only one must be made, pruned and quantised."""
    import transformers

    config = transformers.LlamaConfig(**LLAMA_1B | sizes)
    count, config.num_hidden_layers = config.num_hidden_layers, 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    first = model.model.layers[0]
    for i in range(1, count):
        layer = copy.deepcopy(first, {id(p): p for p in first.parameters()})
        layer.self_attn.layer_idx = i
        model.model.layers.append(layer)
    config.num_hidden_layers = model.config.num_hidden_layers = count
    return model


def write_all(model: nn.Module, folders: dict[str, Path], advance: Callable[[], None]) -> None:
    """Saves the model, then prunes half of every row of its linear layers by magnitude, and saves it as bitmaps.

    What the layers share is pruned and packed once. `advance` is called for every layer of every model.
    """
    from ...weights.names import decoder_layers

    original = Original.of_model(model)
    state = {name: model.get_parameter_or_buffer(name).clone() for name in original.names}  # none shared
    with no_progress_bars():
        write_whole_folder(folders[DENSE], functools.partial(model.save_pretrained, state_dict=state))
    del state

    layers = {
        layer: {f"{layer}.{part}": m for part, m in model.get_submodule(layer).named_modules() if type(m) is nn.Linear}
        for layer in decoder_layers(model)
    }
    pruned: dict[nn.Parameter, nn.Parameter] = {}
    for linears in layers.values():
        for linear in linears.values():
            if linear.weight not in pruned:
                pruned[linear.weight] = nn.Parameter(prune_weight(linear.weight.detach(), 0.5), requires_grad=False)
            linear.weight = pruned[linear.weight]
        advance()
    pruned.clear()
    names = [name for linears in layers.values() for name in linears]
    for kind, values in VALUES.items():
        convert(original, Bitmaps(names, values, advance), folders[kind])


class Bitmaps:
    """A `Transform`: pruned linear layers as bitmaps. What layers share is packed once."""

    kind = BitmapLinear

    def __init__(self, layers: Collection[str], values: str, advance: Callable[[], None]):
        self.layers, self._values, self._advance = set(layers), values, advance
        self._packed: dict[int, BitmapLinear] = {}  # by the address of the weight

    def __call__(self, layer: str | None, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, x in tensors.items():
            linear = name.removesuffix(".weight")
            if linear not in self.layers:
                result[name] = x
                continue
            if x.data_ptr() not in self._packed:
                self._packed[x.data_ptr()] = BitmapLinear.from_weight(BitmapWeight.compress(x, self._values))
            result[linear] = self._packed[x.data_ptr()]
        if layer is not None:
            self._advance()
        return result


def prompt(size: str) -> tuple[torch.Tensor, object]:
    """int64 [1, tokens], and the tokenizer if the model has one."""
    if size != SMOLLM2:
        return torch.arange(1, PROMPT + 1)[None], None
    tokenizer = load_tokenizer(*find_checkpoint(SMOLLM2, "demo"))
    return token_ids(tokenizer)[None, :PROMPT], tokenizer

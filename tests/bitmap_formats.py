"""A writer of compressed-tensors' "sparse-bitmask" checkpoints, in numpy, from the format's definition."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import save_file

from int4_formats import edit, read, write_files

__all__ = ["compress", "edit", "prune", "read", "save_file", "write"]


def compress(w):
    """The four tensors of a weight of one or two dims."""
    kept = w.float().numpy() != 0
    counts = np.asarray(kept.sum(-1))
    return {
        "compressed": w[torch.from_numpy(kept)],
        "bitmask": torch.from_numpy(np.packbits(kept, axis=-1, bitorder="little")),
        "shape": torch.tensor(w.shape, dtype=torch.int64),
        "row_offsets": torch.from_numpy(np.cumsum(counts, 0) - counts).reshape(counts.shape),
    }


def prune(model, share=0.5):
    """A random half of all linear weights is 0; the model is changed and returned."""
    generator = torch.Generator().manual_seed(0)
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and f"{name}.weight" not in tied:
            layer.weight.data.masked_fill_(torch.rand(layer.weight.shape, generator=generator) < share, 0.0)
    return model


def write(folder, model, *, spelling="", everything=False, plain=("lm_head",), shards=1):
    """Writes a model's linear layers compressed, or all weights. Returns the layers' names.

    Args:
        spelling: "" or ".weight", what stands between the module's name and the tensor's.
    """
    tied, tensors, layers = model.all_tied_weights_keys, {}, []
    for name, x in model.state_dict().items():
        module, _, field = name.rpartition(".")
        linear = isinstance(model.get_submodule(module), torch.nn.Linear) and not any(p in module for p in plain)
        if name in tied:
            continue
        if field == "weight" and (linear or everything):
            tensors |= {f"{module}{spelling}.{key}": part.clone() for key, part in compress(x).items()}
            layers += [module] if linear else []
        else:
            tensors[name] = x.clone()
    sparsity = {"format": "sparse-bitmask", "targets": ["Linear"], "ignore": list(plain), "global_sparsity": 0.5}
    sparsity |= {"sparsity_structure": "unstructured"}
    if everything:
        sparsity |= {"targets": None, "ignore": None}
    config = {"quant_method": "compressed-tensors", "version": "0.9.2", "sparsity_config": sparsity}
    write_files(folder, model.config, config, tensors, shards)
    return layers


def move_config(folder, change):
    """Changes the whole config.json in place."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

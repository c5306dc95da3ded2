"""Writers of AWQ, GPTQ and compressed-tensors checkpoints, in numpy, from the formats' own definitions.

`write` quantises the linear layers of a model at random, writes the folder, and gives the model the weights that the
folder then means, so that whoever opens the folder must compute the same.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import headstart

GPTQ = ("qweight", "qzeros", "scales", "g_idx")
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is this column of its eight


def words(nibbles):
    """[..., 8], nibble 0 lowest, to int32 [...]."""
    nibbles = np.ascontiguousarray(nibbles).astype(np.uint32)
    return torch.from_numpy(
        (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).copy("C").view(np.int32)
    )


def sequential(codes, order=range(8)):
    """[R, C] to int32 [R, ceil(C / 8)]."""
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
    return words(padded.reshape(len(codes), -1, 8)[:, :, list(order)])


def awq(codes, zeros, scales, g_idx, version):
    return {
        "qweight": sequential(codes.T, AWQ_COLUMNS),
        "qzeros": sequential(zeros.T, AWQ_COLUMNS),
        "scales": scales.T.contiguous(),
    }


def gptq(codes, zeros, scales, g_idx, version):
    stored = (zeros.astype(np.int64) - (1 if version == 1 else 0)) % 16
    return {
        "qweight": sequential(codes).T.contiguous(),  # sequential along K, [K / 8, N]
        "qzeros": sequential(stored.T),
        "scales": scales.T.contiguous(),
        "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }


def compressed_tensors(codes, zeros, scales, g_idx, version):
    tensors = {
        "weight_packed": sequential(codes),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    if not (zeros == 8).all():
        tensors["weight_zero_point"] = sequential(zeros.T).T.contiguous()
    if (np.diff(g_idx) < 0).any():
        tensors["weight_g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    return tensors


PACKERS = {"awq": awq, "gptq": gptq, "compressed-tensors": compressed_tensors}


def quantization_config(method, group_size, symmetric, act_order=False, version=1):
    if method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    if method == "gptq":
        kind = "gptq" if version == 1 else "gptq_v2"
        common = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": symmetric}
        return common | {"desc_act": act_order, "checkpoint_format": kind}
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "actorder": "group" if act_order else None}
    kind = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    group = {"targets": ["Linear"], "weights": weights | kind, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def random_layer(n, k, group_size, symmetric, act_order, rng):
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    zeros = np.full((n, groups), 8, np.uint8) if symmetric else rng.integers(0, 16, (n, groups), dtype=np.uint8)
    scales = torch.from_numpy(rng.uniform(0.002, 0.004, (n, groups))).to(torch.float16)
    g_idx = np.arange(k) // size
    return codes, zeros, scales, rng.permutation(g_idx) if act_order else g_idx


@torch.no_grad()
def write(
    folder,
    model,
    method,
    group_size=32,
    symmetric=False,
    act_order=False,
    version=1,
    shards=1,
    plain=("lm_head",),
    sizes=None,
):
    """Writes the folder. Returns the codes [N, K] of every int4 layer.

    `plain` are parts of the names of layers that stay as they are, `sizes` other group sizes by such parts.
    """
    rng, codes_of, tensors = np.random.default_rng(0), {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not any(part in name for part in plain):
            n, k = layer.weight.shape
            size = next((size for part, size in (sizes or {}).items() if part in name), group_size)
            codes, zeros, scales, g_idx = random_layer(n, k, size, symmetric, act_order, rng)
            packed = PACKERS[method](codes, zeros, scales, g_idx, version)
            tensors |= {f"{name}.{field}": x for field, x in packed.items()}
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias.clone()
            true = (codes.astype(np.float64) - zeros[:, g_idx]) * scales.double().numpy()[:, g_idx]
            layer.weight.copy_(torch.from_numpy(true))
            codes_of[name] = torch.from_numpy(codes)
    taken = {f"{name}.{field}" for name in codes_of for field in ("weight", "bias")}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors |= {name: x.clone() for name, x in model.state_dict().items() if name not in taken | tied}
    config = quantization_config(method, group_size, symmetric, act_order, version)
    write_files(folder, model.config, config, tensors, shards)
    return codes_of


def replace(tensors, layer, group_size=32):
    """Puts a random GPTQ layer in the place of a plain one. Returns its codes and the weight [N, K] that it means."""
    n, k = tensors.pop(f"{layer}.weight").shape
    codes, zeros, scales, g_idx = random_layer(n, k, group_size, False, False, np.random.default_rng(0))
    tensors |= {f"{layer}.{field}": x for field, x in gptq(codes, zeros, scales, g_idx, 1).items()}
    true = (codes.astype(np.float64) - zeros[:, g_idx]) * scales.double().numpy()[:, g_idx]
    return torch.from_numpy(codes), torch.from_numpy(true)


def write_files(folder, config, quantization, tensors, shards=1):
    folder.mkdir(exist_ok=True)
    content = json.loads(config.to_json_string(use_diff=False)) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(content))
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors")
    names, files = sorted(tensors), [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}  # a layer's tensors lie in several
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(folder):
    return load_file(folder / "model.safetensors")


def moved(tensors, layer, to):
    """The tensors of a layer under another name."""
    return {to + name.removeprefix(layer): x.clone() for name, x in tensors.items() if name.startswith(f"{layer}.")}


def edit(folder, change):
    """Changes the quantization_config in place."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))


def write_own(folder, model):
    """An artifact of headstart's own, with zero points and act-order. Returns its folder."""
    write(folder / "in", model, "gptq", act_order=True)
    headstart.load(folder / "in").save_pretrained(folder / "out")
    return folder / "out"


def copy(folder, to):
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())

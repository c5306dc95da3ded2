"""Checkpoints of every format that `headstart.load` opens: one file a format, all with the same answers (`Source`)."""

from __future__ import annotations

from ..files import CheckpointFiles
from .awq import Awq
from .compressed_tensors import CompressedTensors
from .gguf import Gguf
from .gptq import Gptq
from .own import Own
from .plain import Plain
from .source import Checkpoint, Source
from .sparse_bitmask import SparseBitmask

# The first that recognises a folder opens it.
FORMATS: tuple[type[Source], ...] = (Gguf, Own, Awq, Gptq, SparseBitmask, CompressedTensors, Plain)


def open_source(checkpoint: Checkpoint) -> Source:
    """Raises ValueError or FileNotFoundError, naming the file and the field or tensor."""
    source = next(kind for kind in FORMATS if kind.recognises(checkpoint))(checkpoint)
    if isinstance(source, Plain) and source.files is not None and not checkpoint.quantization:
        _refuse_packed(source.files)
    return source


def _refuse_packed(files: CheckpointFiles) -> None:
    """A folder without settings is plain. One with packed tensors has lost its settings."""
    makers = {field: kind.MARKS[field] for kind in FORMATS for field in kind.MARKS}
    for name in files.names():
        maker = makers.get(name.rpartition(".")[2])
        if maker is not None:
            raise ValueError(
                f"{files.path(name)}: {name}: expected plain weights, as config.json has no quantization_config, got a "
                f"packed tensor of {maker}; write the quantization_config of its maker into config.json"
            )

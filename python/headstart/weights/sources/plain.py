"""A folder as transformers writes it, with nothing packed that headstart knows. transformers fills the model."""

from __future__ import annotations

from ..config import HeadstartConfig
from ..files import FILE, INDEX, CheckpointFiles, Stored, stored_tensors
from .source import Checkpoint, Source


class Plain(Source):
    """Also weights that another method packed (fp8 and so on), if transformers can open them."""

    BY_TRANSFORMERS = True
    NOT_STREAMED = None

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        whole = any((checkpoint.folder / name).is_file() for name in (FILE, INDEX))
        self.files = CheckpointFiles(checkpoint.folder) if whole else None  # else .bin files, say

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return True

    def layout(self) -> HeadstartConfig:
        """Which layers of the files are packed, in headstart's own way."""
        return HeadstartConfig(self.weights)

    def stream(self) -> dict[str, Stored]:
        if self.files is None:
            raise ValueError(f"{self.folder}: expected safetensors files, which are what can be streamed, got none")
        if self.checkpoint.quantization and type(self) is Plain:
            method = self.checkpoint.quantization.get("quant_method")
            raise ValueError(
                f"{self.checkpoint.where}: quant_method: expected 'headstart', or no packed weights, as they are "
                f"streamed as they lie in the file, got {method!r}; load the model without memory_budget"
            )
        return {name: tensor for path in self.files.paths() for name, tensor in stored_tensors(path).items()}

"""headstart's own folders, as `headstart quantize`, `headstart prune` and ``save_pretrained`` write them.

transformers fills the model, with the help of `quantizer.py`: so its ``from_pretrained`` opens them too.
"""

from __future__ import annotations

from ..config import METHOD, HeadstartConfig
from .plain import Plain
from .source import Checkpoint


class Own(Plain):
    MARKS = {"packed": "headstart", "row_offsets": "headstart or compressed-tensors"}

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == METHOD

    def layout(self) -> HeadstartConfig:
        return HeadstartConfig.from_dict(dict(self.checkpoint.quantization))

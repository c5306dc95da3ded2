"""headstart: LLM inference made faster by work done ahead of time.

Operators for engines (`torch.ops.headstart.*` and the functions below), and a shim that puts them under a Hugging
Face model: `headstart.patch(model)`. `python -m headstart doctor` tells what runs here and why.
"""

from . import _library
from .ops.prefill_index import a_shape_index, adaptive_block_index, block_topk_index, vertical_slash_index
from .ops.sparse_attention import BlockIndex, merge_attention, sparse_attention

__version__ = "0.1.0"

_library.load_compiled_libraries()

__all__ = [
    "BlockIndex",
    "a_shape_index",
    "adaptive_block_index",
    "block_topk_index",
    "merge_attention",
    "sparse_attention",
    "vertical_slash_index",
]

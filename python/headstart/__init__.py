"""headstart: LLM inference made faster by work done ahead of time.

It has operators for engines (`torch.ops.headstart.*` and the functions below), and `headstart.patch(model)`, which
makes a Hugging Face model use them. `headstart doctor` reports what runs on this machine and why.
"""

import importlib

from . import _library
from .attention.plan import PrefillPlan
from .model.load import load
from .model.patch import patch, unpatch
from .ops.bitmap import BitmapWeight, bitmap_gemm
from .ops.centroid_lookup import KeyClusters, centroid_lookup
from .ops.int4_gemm import Int4Weight, int4_gemm
from .ops.prefill_index import a_shape_index, adaptive_block_index, block_topk_index, vertical_slash_index
from .ops.sparse_attention import BlockIndex, merge_attention, sparse_attention
from .weights import registration
from .weights.bitmap_linear import BitmapLinear
from .weights.int4_linear import Int4Linear

__version__ = "0.2.0"


# The names that need transformers or rich, with their modules. A module is imported when its name is first used.
_LATER = {
    "Context": ".context.context",
    "prune": ".commands.prune",
    "quantize": ".commands.quantize",
    "save_compressed_tensors": ".weights.sources.sparse_bitmask",
    "search": ".commands.search",
}


def __getattr__(name: str):
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_library.load_compiled_libraries()
_library.register_triton_kernels()
registration.install()

__all__ = [
    "BitmapLinear",
    "BitmapWeight",
    "BlockIndex",
    "Context",
    "Int4Linear",
    "Int4Weight",
    "KeyClusters",
    "PrefillPlan",
    "a_shape_index",
    "adaptive_block_index",
    "bitmap_gemm",
    "block_topk_index",
    "centroid_lookup",
    "int4_gemm",
    "load",
    "merge_attention",
    "patch",
    "prune",
    "quantize",
    "save_compressed_tensors",
    "search",
    "sparse_attention",
    "unpatch",
    "vertical_slash_index",
]

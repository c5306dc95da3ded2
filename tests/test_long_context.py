"""131,072 tokens on a CPU: right, and in memory that grows with tokens and with pairs of blocks, never with pairs of
tokens or of tokens and blocks. What is measured runs in a process of its own, for its peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headstart import _library

pytestmark = pytest.mark.slow

# A float or an int32 for every token and key block would take 1,024 MiB, a byte for every pair of tokens 16 GiB.
LIMIT_MIB = 400

START = """
import json, resource, warnings
warnings.simplefilter("error", RuntimeWarning)
import torch
n, peaks = 131072, {}
torch.manual_seed(0)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
"""

OPERATORS = """
import headstart
from judges.sparse_attention import by_torch
from headstart.attention.index import full_index
from headstart.reference.sparse_attention import index_to_mask
from tolerances import assert_close

def attend(name, build, window=None):
    index = build()
    out, lse = headstart.sparse_attention(q, k, v, index, window=window)
    density = index.density(n, n)
    peaks[name] = peak() - before
    assert 0.01 < density < 0.02 if window is None else density == 1
    return name, index, out, lse, window

q, k, v = torch.randn(3, 1, 1, n, 32).bfloat16()
before = peak()
results = [
    attend("a_shape", lambda: headstart.a_shape_index(n, n, sink=128, local=1024)),
    attend("vertical_slash", lambda: headstart.vertical_slash_index(q, k, 500, 1024)),
    attend("block_topk", lambda: headstart.block_topk_index(q, k, 16)),
    attend("adaptive", lambda: headstart.adaptive_block_index(q, k, 0.95, 32, max_blocks=16)),
    attend("window", lambda: full_index(n, n, q.device), window=1000),
]
rows = torch.tensor([0, 63, 64, 5000, 65535, 100001, *range(n - 10, n)])
for name, index, out, lse, window in results:
    lists = index.block_count, index.block_index, index.column_count, index.column_index
    mask = index_to_mask(*lists, nq=n, nk=n, causal=True, block_q=64, block_k=64, rows=rows, window=window)
    exact, in_bf16 = (by_torch(q[:, :, rows], k, v, mask, dtype=dtype) for dtype in (torch.float64, None))
    assert_close(out[:, :, rows], exact[0], in_bf16[0], name)
    assert_close(lse[:, :, rows], exact[1], in_bf16[1], name)
"""

MODELS = """
from headstart.attention.recording import record
from headstart import PrefillPlan, patch
from models import make, tokens

sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
ids, padding = tokens(1, n), torch.ones(1, n, dtype=torch.long)
padding[:, :1000] = 0
restarting = torch.cat([torch.arange(100_000), torch.arange(n - 100_000)])[None]
before = peak()
for family, path in (("Llama", "sparse"), ("Mistral", "window")):
    model = make(family, head_dim=8, max_position_embeddings=n, sliding_window=1000, **sizes).bfloat16()
    patch(model, PrefillPlan.uniform("adaptive", threshold=0.9, stride=32, max_blocks=16))
    with torch.no_grad(), record() as entries:
        model(ids, attention_mask=padding, logits_to_keep=1, use_cache=False)
        peaks[family] = peak() - before
        model(ids, position_ids=restarting, logits_to_keep=1, use_cache=False)
        peaks[family + ", packed"] = peak() - before
    assert [(e.nq, e.nk, e.path) for e in entries] == [(m, m, path) for m in (n, 100_000, n - 100_000)]
"""


def check_peaks(code: str) -> None:
    if not _library.cpu_tiers():
        pytest.skip(f"no compiled CPU kernels: {_library.cpu.error}")
    path = [str(Path(_library.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-c", START + code + "print(json.dumps(peaks))"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    peaks = json.loads(run.stdout)
    assert max(peaks.values()) < LIMIT_MIB, peaks


def test_operators():
    check_peaks(OPERATORS)


def test_patched_models():
    pytest.importorskip("transformers")
    check_peaks(MODELS)

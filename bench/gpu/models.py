"""Whole models on a GPU: the time to the first token, patched and with transformers' own SDPA.

The weights are random, so a plan with fixed budgets says what a real model gains: "adaptive" finds nothing to leave out
where attention is spread evenly. The losses of real models are in docs/measurements/context.md and attention.md.
"""

from __future__ import annotations

import statistics
import time

import torch

import headstart
from clock import Clock, Results

LLAMA_3_8B = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
)
SMOLLM2_135M = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
                    rope_parameters={"rope_type": "default", "rope_theta": 1e5})  # fmt: skip
CASES = (("SmolLM2-135M", SMOLLM2_135M, (8192,)), ("Llama 3 8B", LLAMA_3_8B, (32768, 131072)))
SHOWN = "block_topk"  # the plan that the others are held against
LONGEST_TWICE = 65536  # a longer prompt is read once
# MInference's budgets for 128K tokens; a twentieth of the blocks; the default.
PLANS = {
    "vertical_slash": lambda n: headstart.PrefillPlan.uniform("vertical_slash", vertical_size=1000, slash_size=6096),
    "block_topk": lambda n: headstart.PrefillPlan.uniform("block_topk", top_k=max(16, n // 64 // 20)),
    "adaptive": lambda n: "adaptive",
}


@torch.no_grad()
def prefill(_: Clock, results: Results, name: str, config: dict, lengths: tuple[int, ...]) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(max_position_embeddings=max(lengths), **config),
            attn_implementation="sdpa",
            dtype=torch.bfloat16,
        ).eval()
    for n in lengths:
        ids = torch.randint(config["vocab_size"], (1, n), device="cuda")

        def first_token(ids: torch.Tensor) -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(ids, use_cache=True, logits_to_keep=1).logits.argmax().item()
            return 1e3 * (time.perf_counter() - start)

        times: dict[str, list[float]] = {way: [] for way in ("sdpa", *PLANS)}
        for _ in range(3 if n <= LONGEST_TWICE else 1):  # the first round of the shorter prompts compiles
            for way, taken in times.items():
                headstart.unpatch(model) if way == "sdpa" else headstart.patch(model, PLANS[way](n))
                taken.append(first_token(ids))
        ms = {way: statistics.median(taken[1:] or taken) for way, taken in times.items()}
        ms["headstart"] = ms.pop(SHOWN)
        results.add("prefill", {"model": name, "tokens": n, "plan": SHOWN}, ms, server="model")

"""Tiny transformers models with random weights, and prompts for them. Import it where transformers is known to be."""

from __future__ import annotations

import torch
import transformers

from headstart.attention.plan import PrefillPlan

SIZES = dict(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
# Plans that select everything by way of each index builder.
EVERYTHING = {
    "dense": PrefillPlan.uniform("dense"),
    "a_shape": PrefillPlan.uniform("a_shape", sink=0, local=1024),
    "block_topk": PrefillPlan.uniform("block_topk", top_k=16),
    "adaptive": PrefillPlan.uniform("adaptive", threshold=1.0),
}


def make(family="Llama", attn="sdpa", **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | sizes)
    config._attn_implementation = attn
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family.removesuffix('Text')}ForCausalLM"
    return getattr(transformers, name)(config).eval()


def tokens(batch=2, length=150):
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def left_padded(lengths, width):
    ids = tokens(len(lengths), width)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits

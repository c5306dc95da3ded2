"""Decoding with int4 linear layers against bf16: ``python bench/int4_decode.py``.

SmolLM2-135M reads a prompt and generates greedily, once with its own linear layers and once with `Int4Linear` of each
group size. The models take turns, one token each, so a disturbance changes the ratio of a token only a little. Hooks
measure the time of a token's parts: the layers' linears; the output layer, which shares its weight with the embedding
and is not quantised; and the rest, which is the model's own Python and small operators, the same in all models.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import machine
import report
from headstart import _library
from headstart.commands.texts import token_ids
from headstart.model.load import SMOLLM2, load_model
from headstart.weights.int4_linear import Int4Linear
from headstart.weights.int4_quantize import quantize_linears
from short_prompts import twin

PARTS = ("linear layers", "output layer", "the rest")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/int4_decode.py", description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--group-size", type=int, action="append", help="repeatable; 128 and 32 if not given")
    parser.add_argument("--dtype", choices=list(machine.DTYPES), default="bf16")
    parser.add_argument("--output", type=Path, help="results file (default bench/results/int4-decode-<cpu>.json)")
    options = parser.parse_args(arguments)
    options.group_size = options.group_size or [128, 32]
    return options


class Decoder:
    """A model that generates token by token, and the seconds of each token's parts."""

    def __init__(self, model: nn.Module, ids: torch.Tensor):
        self.model, self.seconds, self.timed = model, [], {part: 0.0 for part in PARTS}
        out = model(ids)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        for name, module in model.named_modules():
            if name == "lm_head" or isinstance(module, (nn.Linear, Int4Linear)):
                self.watch(module, PARTS[name == "lm_head"])

    def watch(self, module: nn.Module, part: str) -> None:
        start = [0.0]

        def before(*_):
            start[0] = time.perf_counter()

        def after(*_):
            self.timed[part] += time.perf_counter() - start[0]

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def step(self) -> None:
        for part in PARTS:
            self.timed[part] = 0.0
        start = time.perf_counter()
        logits = self.model(self.token, past_key_values=self.cache).logits
        self.token = logits[:, -1:].argmax(-1)
        whole = time.perf_counter() - start
        self.timed[PARTS[2]] = whole - self.timed[PARTS[0]] - self.timed[PARTS[1]]
        self.seconds.append({"token": whole, **self.timed})

    def median_ms(self, what: str) -> float:
        return 1e3 * statistics.median(step[what] for step in self.seconds)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    from rich.table import Table

    options = parse(arguments)
    console, environment = report.console(), machine.environment()
    model, tokenizer = load_model(SMOLLM2, dtype=machine.DTYPES[options.dtype], packed=False)
    ids = token_ids(tokenizer)[None, : options.context]
    with console.status("quantising"):
        models = {options.dtype: twin(model)}
        models |= {f"int4, group {size}": quantize_linears(twin(model), size) for size in options.group_size}
    decoders = {name: Decoder(one, ids) for name, one in models.items()}
    for _ in range(4):  # the first calls allocate memory
        for decoder in decoders.values():
            decoder.step()
            decoder.seconds.clear()
    for _ in range(options.tokens):
        for decoder in decoders.values():
            decoder.step()
    rows = []
    table = Table("weights", "tokens/s", f"/ {options.dtype}", *(f"{part}, ms" for part in PARTS), "weights, MiB")
    for name, decoder in decoders.items():
        ratios = [own["token"] / mine["token"] for own, mine in zip(decoders[options.dtype].seconds, decoder.seconds)]
        row = {"weights": name, "tokens_per_second": 1e3 / decoder.median_ms("token")}
        row |= {"speedup": statistics.median(ratios), "ms": {part: decoder.median_ms(part) for part in PARTS}}
        tensors = {t.data_ptr(): t.nbytes for t in [*decoder.model.parameters(), *decoder.model.buffers()]}
        row["bytes"] = sum(tensors.values())
        rows.append(row)
        parts = (f"{row['ms'][part]:.1f}" for part in PARTS)
        size = f"{row['bytes'] / 2**20:,.0f}"
        table.add_row(name, f"{row['tokens_per_second']:.1f}", f"{row['speedup']:.2f}", *parts, size)
    console.print(table)
    settings = {name: getattr(options, name) for name in ("context", "tokens", "group_size", "dtype")}
    results = {"environment": environment, "settings": settings, "rows": rows}
    path = options.output or machine.RESULTS / f"int4-decode-{machine.slug(environment)}.json"
    machine.write_json(results, path)
    console.print(f"written to {path}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    if _library.cpu_tier() is None:
        sys.exit(f"bench/int4_decode.py: no CPU kernels: {_library.cpu.error}. Cure: {_library.cpu.cure}.")
    sys.exit(main())

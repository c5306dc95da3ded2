"""Whole prompts through a patched model against transformers + SDPA: ``python bench/short_prompts.py``.

This tests a promise: a patched model is never slower, at any length. SmolLM2-135M reads prompts of several lengths.
The two models share their weights and take turns, so a disturbance changes the ratio of a round only a little, and the
median of the ratios even less. With ``--linear model`` both sides have the same linear layers, so only attention makes
the difference. The report counts the paths that the layers took.

The exit status is 1 if a prompt took more than ``--allowed`` times as long.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch

import machine
import report
from headstart import _library, patch
from headstart.attention import cost
from headstart.attention.recording import record
from headstart.commands.texts import token_ids
from headstart.model.load import SMOLLM2, load_model
from measure import interleave

TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
NAMES = ("transformers + SDPA", "patched")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/short_prompts.py", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, action="append", help="only this length; repeatable")
    parser.add_argument("--prefill", default="adaptive", help="a pattern, or a plan's file")
    parser.add_argument("--linear", choices=("auto", "model"), action="append", help="only this mode; repeatable")
    parser.add_argument("--dtype", choices=list(machine.DTYPES), default="bf16")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for a length; three rounds are always done")
    parser.add_argument("--allowed", type=float, default=1.03, help="patched time over own time that is still a pass")
    parser.add_argument("--output", type=Path, help="results file (default bench/results/short-prompts-<cpu>.json)")
    options = parser.parse_args(arguments)
    if any(not 1 <= n <= 8192 for n in options.tokens or ()):
        parser.error(f"--tokens: expected 1 to 8192, which the model reads, got {options.tokens}")
    options.tokens = sorted(options.tokens or TOKENS)
    options.linear = options.linear or ["auto", "model"]
    return options


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with a configuration of its own and the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


@torch.inference_mode()
def compare(own: torch.nn.Module, patched: torch.nn.Module, ids: torch.Tensor, seconds: float) -> dict:
    """Times both in turn, and counts the paths of the patched model's layers; a layer without one ran its own."""
    models = dict(zip(NAMES, (own, patched), strict=True))
    calls = {name: lambda model=model: model(ids, use_cache=False, logits_to_keep=1) for name, model in models.items()}
    calls[NAMES[0]]()
    with record() as entries:
        calls[NAMES[1]]()
    paths = Counter(entry.path for entry in entries)
    paths["own"] = own.config.num_hidden_layers - len(entries)
    times = interleave(calls, seconds=seconds, min_rounds=3)
    ratios = [mine / theirs for theirs, mine in zip(*(times[name] for name in NAMES))]
    return {
        "tokens": ids.shape[1],
        "paths": {path: count for path, count in paths.items() if count},
        "times_us": times,
        "median_us": {name: statistics.median(t) for name, t in times.items()},
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
    }


def main(arguments: list[str] | None = None) -> int:
    from rich.table import Table

    options = parse(arguments)
    console, environment = report.console(), machine.environment()
    model, tokenizer = load_model(SMOLLM2, dtype=machine.DTYPES[options.dtype], packed=False)
    ids = token_ids(tokenizer)[None, : max(options.tokens)]
    rows = []
    table = Table("linear layers", "tokens", *NAMES, "patched / own", "rounds", "paths of the layers")
    with console.status("") as status:
        for linear in options.linear:
            patched = patch(twin(model), options.prefill, linear=linear)
            for tokens in options.tokens:
                status.update(f"{tokens:,} tokens, linear={linear}")
                rows.append({"linear": linear} | compare(model, patched, ids[:, :tokens], options.seconds))
                row = rows[-1]
                table.add_row(
                    linear,
                    f"{tokens:,}",
                    *(report.time_words(row["median_us"][name]) for name in NAMES),
                    f"{row['ratio']:.3f} ({row['ratios'][0]:.3f}–{row['ratios'][1]:.3f})",
                    str(len(row["times_us"][NAMES[0]])),
                    ", ".join(f"{count} {path}" for path, count in row["paths"].items()),
                )
    console.print(table)
    settings = {name: getattr(options, name) for name in ("tokens", "prefill", "linear", "dtype", "seconds", "allowed")}
    results = {"environment": environment, "settings": settings}
    results |= {"costs": cost.in_use().source, "rows": rows}
    path = options.output or machine.RESULTS / f"short-prompts-{machine.slug(environment)}.json"
    machine.write_json(results, path)
    console.print(f"written to {path}", highlight=False, soft_wrap=True)
    slower = [row for row in rows if row["ratio"] > options.allowed]
    for row in slower:
        words = f"linear={row['linear']}, {row['tokens']:,} tokens: {row['ratio']:.3f} × transformers + SDPA"
        print(f"bench/short_prompts.py: {words}, allowed {options.allowed}", file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    if _library.cpu_tier() is None:
        sys.exit(f"bench/short_prompts.py: no CPU kernels: {_library.cpu.error}. Cure: {_library.cpu.cure}.")
    sys.exit(main())

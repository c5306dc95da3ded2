"""Loss against density on SmolLM2-135M: uniform plans of every pattern, and plans that a search found.

    python bench/loss_curve.py [--tokens 8192] [--measurements plan.json.measurements.json] [--curve oracle ...]

Reads two texts with each plan and compares the loss of the second half with dense attention by the same kernel. The
differences go to `bench/results/loss-curve.json`, the picture to `docs/loss-curve.png`. "oracle" is adaptive with every
query sampled. It knows the exact block masses, which no estimate can know, and costs as much as dense attention. Every
layer is sparse, even where that does not pay.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import headstart
from headstart._environment import environment
from headstart.attention.forward import force_path
from headstart.attention.plan import PrefillPlan
from headstart.attention.recording import record
from headstart.attention.search import search_prefill_plan
from headstart.commands.demo import mean_loss
from headstart.commands.demo import model as smollm2
from headstart.commands.texts import sample_texts, token_ids
from headstart.model.load import SMOLLM2, load_model
from machine import RESULTS as FOLDER
from machine import ROOT, write_json

RESULTS = FOLDER / "loss-curve.json"
SEARCHED = (0.08, 0.12, 0.16, 0.2)


def plans(searched) -> dict[str, list[tuple[str, PrefillPlan]]]:
    def uniform(pattern, name, values, **fixed):
        return [(f"{name} {value}", PrefillPlan.uniform(pattern, **fixed, **{name: value})) for value in values]

    return {
        "searched": [(f"density {budget}", searched(budget)) for budget in SEARCHED] if searched else [],
        "adaptive": uniform("adaptive", "threshold", (0.8, 0.85, 0.9, 0.93)),
        "adaptive without samples": uniform("adaptive", "threshold", (0.95, 0.985), samples=0),
        "oracle": uniform("adaptive", "threshold", (0.8, 0.9), samples=64),
        "vertical_slash": [
            (f"{v} + {s}", PrefillPlan.uniform("vertical_slash", vertical_size=v, slash_size=s))
            for v, s in ((500, 512), (1000, 1024))
        ],
        "block_topk": uniform("block_topk", "top_k", (12, 24)),
        "a_shape": uniform("a_shape", "local", (512, 1024)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--measurements", type=Path, help="the file of `headstart search smollm2` with the same seed and windows"
    )
    parser.add_argument("--seed", type=int, default=0, help="the seed of that search")
    parser.add_argument("--curve", nargs="+", help="measure only these; the others keep their last results")
    options = parser.parse_args()

    searched = None
    if options.measurements:
        own, tokenizer = load_model(SMOLLM2, packed=False)
        ids = {name: token_ids(tokenizer, sample=name) for name in sample_texts()}

        def searched(budget):
            kept = options.measurements
            return search_prefill_plan(own, ids, density=budget, seed=options.seed, measurements=kept)

    model, texts = smollm2.load(options.tokens)
    headstart.patch(model, "dense")
    dense = {name: mean_loss(model, ids) for name, ids in texts.items()}
    curves = json.loads(RESULTS.read_text())["curves"] if options.curve else {}
    for family, members in plans(searched).items():
        if options.curve and family not in options.curve:
            continue
        curves[family] = []
        for label, plan in members:
            headstart.patch(model, plan)
            point = {"plan": label}
            for name, ids in texts.items():
                with record() as entries, force_path("sparse"):
                    loss = mean_loss(model, ids)
                density = sum(e.index.density(e.nq, e.nk) for e in entries) / len(entries)
                point[name] = {"density": density, "loss_difference": loss - dense[name]}
            curves[family].append(point)
            print(family, json.dumps(point), flush=True)
    content = {"tokens": options.tokens, "dense_loss": dense, "curves": curves, "environment": environment()}
    write_json(content, RESULTS)
    draw(content)


def draw(content: dict) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for panel, text in zip(axes, content["dense_loss"], strict=True):
        for family, points in content["curves"].items():
            found = [(point[text]["density"], point[text]["loss_difference"]) for point in points]
            panel.plot(*zip(*found, strict=True), marker="o", markersize=4, label=family) if found else None
        panel.axhline(0.02, color="0.6", linewidth=0.8, linestyle="--")
        panel.set(title=text, xlabel="density")
        panel.set_yscale("symlog", linthresh=0.02)
    axes[0].set_ylabel("loss, difference to dense (nats)")
    axes[1].legend(frameon=False)
    figure.suptitle(f"SmolLM2-135M, {content['tokens']:,} tokens, loss of the last half")
    figure.savefig(ROOT / "docs/loss-curve.png", dpi=130)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

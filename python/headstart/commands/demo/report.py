"""What the demo shows and leaves behind: a table, report.json and report.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from ..._files import write_whole
from ...attention.recording import attended_share
from ..console import spread

if TYPE_CHECKING:
    from ...attention.recording import Recorded
    from . import Row

HEADS_SHOWN = 3


def show(rows: list[Row], content: dict, folder: Path) -> None:
    console = Console()
    place = content["environment"]
    table = Table(
        Column("attention", no_wrap=True),
        *(Column(title, justify="right") for title in ("seconds", "speed-up", "loss", "change", "top-1", "density")),
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=f"SmolLM2-135M reads {content['tokens']:,} tokens",
        caption=(
            f"loss, and top-1 agreement with {rows[0].name}: of the last {content['loss_tokens']:,} tokens\n"
            f"{place['cpu']}, {place['threads']} threads, tier {place['cpu_tier'] or 'none'}, bfloat16"
            + (f"\n{content['note']}; `--tokens 8192` does so" if content["note"] else "")
        ),
    )
    for row in rows:
        table.add_row(
            row.name,
            f"{row.seconds:.2f}",
            f"{row.speedup:.2f}x",
            f"{row.loss:.4f}",
            f"{row.loss_difference:+.4f}",
            f"{row.agreement:.3f}",
            f"{row.density:.3f}",
        )
    console.print(table)
    console.print(f"report: {folder / 'report.json'}, {folder / 'report.png'}", highlight=False, soft_wrap=True)
    console.print(content["conclusion"], style="bold", highlight=False, soft_wrap=True)


def write(folder: Path, content: dict, recorded: dict[str, list[Recorded]]) -> None:
    """Writes report.json and report.png, each whole or not at all."""
    write_whole(folder / "report.json", lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
    figure = draw(content, recorded)
    write_whole(folder / "report.png", lambda path: figure.savefig(path, format="png", dpi=120))


# --- the picture ---------------------------------------------------------------------------------------------------


def draw(content: dict, recorded: dict[str, list[Recorded]]) -> Figure:
    """Left: speed against loss. Right: the attended blocks of a few heads, a row for each sparse pattern."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 6.5), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=[1, 1.05])
        _draw_speed(left.subplots(), content)
        _draw_heads(right, {name: e for name, e in recorded.items() if name != "dense" and e})
    return figure


def _draw_speed(axes, content: dict) -> None:
    for row in content["rows"]:
        label = f"{row['name']}: {row['seconds']:.1f} s, density {row['density']:.2f}"
        axes.plot(row["speedup"], row["loss"], "o", markersize=8, label=label)
    axes.axhline(content["rows"][0]["loss"], color="0.8", linewidth=1, zorder=0)
    axes.margins(0.1, 0.15)
    # Below the axes: beside the points, labels of rows that are close would cover each other.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=8)
    axes.set_xlabel("speed-up over transformers + SDPA, end to end (right is better)")
    axes.set_ylabel(f"loss on the last {content['loss_tokens']:,} tokens (down is better)")
    axes.set_title(f"{content['tokens']:,} tokens on {content['environment']['cpu']}")


def _draw_heads(figure, recorded: dict[str, list[Recorded]]) -> None:
    if not recorded:
        return
    heads = _telling_heads(recorded.get("adaptive") or next(iter(recorded.values())))
    grid = figure.subplots(len(recorded), len(heads), squeeze=False)
    for line, (name, entries) in zip(grid, recorded.items(), strict=True):
        for axes, (layer, head) in zip(line, heads, strict=True):
            entry = entries[layer]
            shares = attended_share(entry)  # of every head, or one for all
            axes.imshow(shares[head % len(shares)].numpy(), cmap="Blues", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{name}, layer {entry.layer}, head {head}", fontsize=8)
    figure.supxlabel("key blocks", fontsize=9)
    figure.supylabel("query blocks", fontsize=9)


def _telling_heads(entries: list[Recorded]) -> list[tuple[int, int]]:
    """(position among the entries, head) of heads from the sparsest to the densest."""
    heads = [
        (blocks, position, head)
        for position, entry in enumerate(entries)
        for head, blocks in enumerate(entry.index.block_count[0].sum(-1).tolist())
    ]
    return [head for _, *head in spread(sorted(heads), HEADS_SHOWN)]

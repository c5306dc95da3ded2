"""What the demo shows and leaves behind: progress bars, a table, report.json and report.png."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from .. import _library
from ..reference.sparse_attention import scatter_blocks

if TYPE_CHECKING:
    from ..engine.attention import Recorded
    from . import Row

HEADS_SHOWN = 3


class Steps(Progress):
    @contextmanager
    def step(self, name: str, total: int = 2) -> Iterator[Callable[[], None]]:
        task = self.add_task(name, total=total)
        yield lambda: self.advance(task)


def progress() -> Steps:
    return Steps(SpinnerColumn(), TextColumn("{task.description:22}"), BarColumn(), TimeElapsedColumn())


def environment() -> dict[str, str | int | None]:
    return {
        "cpu": _cpu_model(),
        "cpu_tier": _library.cpu_tier(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


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
    _replace(folder / "report.json", lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
    figure = draw(content, recorded)
    _replace(folder / "report.png", lambda path: figure.savefig(path, format="png", dpi=120))


def _replace(path: Path, save: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
        (point,) = axes.plot(row["speedup"], row["loss"], "o", markersize=8)
        axes.annotate(
            f"{row['name']}\n{row['seconds']:.1f} s, density {row['density']:.2f}",
            (row["speedup"], row["loss"]),
            xytext=(7, 5),
            textcoords="offset points",
            color=point.get_color(),
        )
    axes.axhline(content["rows"][0]["loss"], color="0.8", linewidth=1, zorder=0)
    axes.margins(0.25, 0.15)
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
    heads.sort()
    step = (len(heads) - 1) / max(HEADS_SHOWN - 1, 1)
    return [heads[round(i * step)][1:] for i in range(min(HEADS_SHOWN, len(heads)))]


def attended_share(entry: Recorded) -> torch.Tensor:
    """float [heads, query blocks, key blocks]: the share of a key block that a row of the first batch attends."""
    index = entry.index
    key_blocks = -(-entry.nk // index.block_k)
    share = scatter_blocks(index.block_count[:1], index.block_index[:1], key_blocks).float()
    if index.column_count is not None:
        columns = scatter_blocks(index.column_count[:1], index.column_index[:1], key_blocks * index.block_k)
        share = torch.maximum(share, columns.unflatten(-1, (key_blocks, index.block_k)).float().mean(-1))
    causal = torch.arange(share.shape[2])[:, None] * index.block_q + index.block_q - 1 + entry.nk - entry.nq
    return (share * (torch.arange(key_blocks) * index.block_k <= causal))[0]

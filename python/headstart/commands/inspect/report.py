"""What `headstart inspect` prints and leaves behind: a summary, inspect.html and inspect.png."""

from __future__ import annotations

import json
import textwrap
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from ..._files import write_whole
from .data import unpack

# The Okabe-Ito hues, which colour-blind readers can tell apart; a letter says it again where a grid has several.
PALETTE = {
    "adaptive": {"color": "#0072b2", "mark": "~"},
    "vertical_slash": {"color": "#d55e00", "mark": "V"},
    "block_topk": {"color": "#009e73", "mark": "B"},
    "a_shape": {"color": "#cc79a7", "mark": "Λ"},
    "dense": {"color": "#4d5561", "mark": "D"},
    "own": {"color": "#a08b5b", "mark": "o"},
}
FAINTEST = 0.1  # of the hue, at density 0
UNKNOWN = 0.5  # of the hue, where no density is known


def shade(density: float | None) -> float:
    """How much of a pattern's hue a cell has; the rest is the background."""
    return UNKNOWN if density is None else FAINTEST + (1 - FAINTEST) * density


def show(content: dict[str, Any], folder: Path) -> None:
    console = Console()
    table = Table(
        Column("pattern", no_wrap=True),
        *(Column(title, justify="right") for title in ("heads", "mean density", "mean error")),
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=content["title"],
    )
    rows = content["summary"]
    if len(rows) > 1:
        total = {"pattern": "all", "heads": content["layers"] * content["heads"]}
        rows = [*rows, total | {name: content[name] for name in ("density", "error")}]
    for row in rows:
        table.add_row(row["pattern"], f"{row['heads']:,}", _number(row["density"]), _number(row["error"]))
    console.print(table)
    console.print(f"report: {folder / 'inspect.html'}, {folder / 'inspect.png'}", highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def write(folder: Path, content: dict[str, Any]) -> None:
    """Writes inspect.html and inspect.png, each whole or not at all."""
    text, figure = page(content), draw(content)
    write_whole(folder / "inspect.html", lambda path: path.write_text(text, encoding="utf-8"))
    write_whole(folder / "inspect.png", lambda path: figure.savefig(path, format="png", dpi=120))


def page(content: dict[str, Any]) -> str:
    """One HTML page with everything in it."""
    drawn = {"palette": PALETTE, "shades": {"faintest": FAINTEST, "unknown": UNKNOWN}, "subtitle": _subtitle(content)}
    data = json.dumps(content | drawn, allow_nan=False, separators=(",", ":"))
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("@DATA@", data.replace("<", "\\u003c"))


# --- the picture ---------------------------------------------------------------------------------------------------

# Inches. Everything is placed from the top left corner.
WIDTH, MARGIN, GRID_WIDTH, LEGEND_LEFT, LEGEND_WIDTH = 13.0, 0.65, 8.55, 9.6, 2.8
TOP, BARS, CELL, LEGEND, MAPS_A_ROW, MAP, MAP_GAP, CAPTION = 1.25, 0.45, 0.42, 0.8, 5, 2.15, 0.25, 0.65
LEGIBLE = 0.15  # a smaller cell has no letter and no error
INK, QUIET, FAINT = "#1d2329", "#68727d", "#eceef0"


def draw(content: dict[str, Any]) -> Figure:
    """The grid of heads with the mean density of each layer above, the legend, and the blocks of the chosen heads."""
    layers, heads = content["layers"], content["heads"]
    side = min(CELL, GRID_WIDTH / layers)
    width, height = layers * side, heads * max(min(side, 6.5 / heads), 0.02)
    maps = content["chosen"] if content["blocks"] else []
    grid_bottom = max(TOP + BARS + height + 0.5, TOP + LEGEND * len(content["summary"]) + 0.75)
    maps_top = grid_bottom + 0.95
    bottom = maps_top + -(-len(maps) // MAPS_A_ROW) * (MAP + CAPTION) - 0.25 if maps else grid_bottom + 0.2
    notes = _notes(content)
    total = bottom + 0.2 * len(notes) + 0.25

    with matplotlib.rc_context({"font.size": 9, "text.color": INK, "text.parse_math": False}):
        figure = Figure(figsize=(WIDTH, total), facecolor="white")

        def axes(left: float, top: float, width: float, height: float):
            made = figure.add_axes((left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total))
            made.tick_params(length=0, colors=QUIET, labelsize=8)
            made.spines[:].set_visible(False)
            return made

        def write(left: float, top: float, text: str, **options) -> None:
            figure.text(left / WIDTH, 1 - top / total, text, **{"va": "baseline"} | options)

        write(MARGIN, 0.6, content["title"], size=17, weight="bold")
        write(MARGIN, 0.88, _subtitle(content), color=QUIET, size=10)
        _draw_layers(axes(MARGIN, TOP, width, BARS), content)
        _draw_grid(axes(MARGIN, TOP + BARS + 0.05, width, height), content, side)
        _draw_legend(axes, write, content)
        if maps:
            write(MARGIN, maps_top - 0.58, "Attended blocks", size=12, weight="bold")
            hint = "queries run down, keys to the right; grey is what the head skips"
            write(MARGIN + 1.7, maps_top - 0.58, hint, color=QUIET)
        for i, (layer, head) in enumerate(maps):
            line, place = divmod(i, MAPS_A_ROW)
            left, top = MARGIN + place * (MAP + MAP_GAP), maps_top + line * (MAP + CAPTION)
            cell = content["cells"][layer][head]
            name = content["patterns"][cell["pattern"]]["name"]
            write(left, top - 0.26, f"layer {layer}, head {head}", weight="bold")
            write(left, top - 0.08, f"{name}, density {cell['density']:.3f}", color=PALETTE[name]["color"])
            panel = axes(left, top, MAP, MAP)
            panel.set(xticks=[], yticks=[])
            if "blocks" in cell:
                panel.imshow(
                    _blocks_image(content, cell, PALETTE[name]["color"]), aspect="auto", interpolation="nearest"
                )
            else:
                panel.text(0.5, 0.5, "the model's own attention", ha="center", color=QUIET)
        for i, note in enumerate(notes):
            write(MARGIN, bottom + 0.2 * i + 0.05, note, color=QUIET, size=8)
    return figure


def _subtitle(content: dict[str, Any]) -> str:
    parts = [f"{content['layers']:,} layers × {content['heads']:,} heads"]
    if content["layers"] == content["heads"] == 1:
        parts = ["one pattern for all layers and heads"]
    if content["reading"]:
        parts += [f"plan {content['plan']}" if content["plan"] else "one pattern for all heads"]
        parts += [f"text: {content['reading']['text']}"]
    elif content["model"] and "model_type" in content["model"]:
        parts += [f"for a {content['model']['model_type']} model"]
    return "  ·  ".join(parts)


def _notes(content: dict[str, Any]) -> list[str]:
    notes = []
    for title, lines in (
        ("plan", content["provenance"]),
        ("read on", (content["reading"] or {}).get("environment", [])),
    ):
        text = ", ".join(f"{name} {value}" for name, value in lines)
        notes += textwrap.wrap(f"{title}: {text}", 190, max_lines=3) if text else []
    return notes


def _mix(hue: str, share) -> np.ndarray:
    """RGB between white and a hue."""
    share = np.asarray(share)[..., None]
    return (1 - share) + share * np.array(matplotlib.colors.to_rgb(hue))


def _color(content: dict[str, Any], cell: dict[str, Any]) -> np.ndarray:
    name = content["patterns"][cell["pattern"]]["name"]
    return _mix(PALETTE[name]["color"], shade(cell.get("density")))


def _draw_layers(axes, content: dict[str, Any]) -> None:
    known = [[cell["density"] for cell in row if "density" in cell] for row in content["cells"]]
    means = [sum(row) / len(row) if row else 0 for row in known]
    if any(known):
        axes.bar(range(len(means)), means, width=0.8, color="#b9c0c7")
        axes.set_ylabel("mean", color=QUIET, size=8)
        axes.set_yticks([0, 1] if max(means) > 0.5 else [0, 0.5])
    else:
        axes.set_yticks([])
    axes.set(xlim=(-0.5, len(means) - 0.5), ylim=(0, 1 if max(means) > 0.5 else 0.5), xticks=[])


def _draw_grid(axes, content: dict[str, Any], side: float) -> None:
    """`side` is the width of a cell in inches."""
    layers, heads = content["layers"], content["heads"]
    image = np.array([[_color(content, content["cells"][x][y]) for x in range(layers)] for y in range(heads)])
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(-0.5, layers - 0.5, heads - 0.5, -0.5))
    gap = min(6 * side, 1.5)
    axes.hlines(np.arange(heads + 1) - 0.5, -0.5, layers - 0.5, color="white", linewidth=gap)
    axes.vlines(np.arange(layers + 1) - 0.5, -0.5, heads - 0.5, color="white", linewidth=gap)
    marked = len(content["summary"]) > 1
    worst = _worst(content)
    for x, row in enumerate(content["cells"] if side > LEGIBLE else ()):
        for y, cell in enumerate(row):
            ink = "white" if image[y, x] @ (0.299, 0.587, 0.114) < 0.55 else INK
            if marked:
                mark = PALETTE[content["patterns"][cell["pattern"]]["name"]]["mark"]
                axes.text(x, y, mark, ha="center", va="center", color=ink, size=min(30 * side, 9))
            if worst and "error" in cell:
                length = 0.76 * cell["error"] / worst
                axes.hlines(y + 0.34, x - 0.38, x - 0.38 + length, color=ink, linewidth=4.5 * side)
    for layer, head in content["chosen"]:
        frame = {"fill": False, "edgecolor": INK, "linewidth": 1.8, "zorder": 3, "clip_on": False}
        axes.add_patch(Rectangle((layer - 0.5, head - 0.5), 1, 1, **frame))
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(heads - 0.5, -0.5))
    axes.set(xticks=_ticks(layers), yticks=_ticks(heads))
    axes.set_xlabel("layer", color=QUIET)
    axes.set_ylabel("head", color=QUIET)


def _worst(content: dict[str, Any]) -> float:
    return max((cell.get("error", 0) for row in content["cells"] for cell in row), default=0)


def _ticks(count: int) -> range:
    return range(0, count, 1 if count <= 12 else 2 if count <= 32 else 8)


def _draw_legend(axes, write, content: dict[str, Any]) -> None:
    """For each pattern: how many heads have which density, over the shades that the grid gives them."""
    bins = np.linspace(0, 1, 21)
    centres, several = (bins[:-1] + bins[1:]) / 2, len(content["summary"]) > 1
    for i, row in enumerate(content["summary"]):
        top, entry = TOP + LEGEND * i, PALETTE[row["pattern"]]
        found = _densities(content, row["pattern"])
        heads = f"{row['heads']:,} head{'s' if row['heads'] > 1 else ''}"
        mean = "density not measured" if row["density"] is None else f"mean {row['density']:.3f}"
        name = f"{entry['mark']}  {row['pattern']}" if several else row["pattern"]
        write(LEGEND_LEFT, top + 0.1, name, weight="bold", color=entry["color"])
        write(LEGEND_LEFT + LEGEND_WIDTH, top + 0.1, f"{heads}, {mean}", ha="right", color=QUIET, size=8)
        colors = _mix(entry["color"], shade(centres) if found else np.full(20, UNKNOWN))
        bars = axes(LEGEND_LEFT, top + 0.16, LEGEND_WIDTH, 0.34)
        bars.bar(centres, np.histogram(found, bins)[0], width=0.044, color=colors)
        bars.set(xlim=(0, 1), xticks=[], yticks=[])
        ramp = axes(LEGEND_LEFT, top + 0.51, LEGEND_WIDTH, 0.07)
        ramp.imshow(colors[None], aspect="auto", extent=(0, 1, 0, 1))
        ramp.set(yticks=[], xticks=[])
    if any(row["density"] is not None for row in content["summary"]):
        ramp.set(xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "0.25", "0.5", "0.75", "1"])
        ramp.set_xlabel("density", color=QUIET)
    notes = []
    if _worst(content) and GRID_WIDTH / content["layers"] > LEGIBLE:
        notes.append(f"line in a cell: error, at full width {_worst(content):.3g}")
    if content["blocks"]:
        notes.append("framed: the heads drawn below")
    for i, note in enumerate(notes):
        write(LEGEND_LEFT, TOP + LEGEND * len(content["summary"]) + 0.45 + 0.18 * i, note, color=QUIET, size=8)


def _densities(content: dict[str, Any], pattern: str) -> list[float]:
    everyone = [cell for row in content["cells"] for cell in row if "density" in cell]
    return [cell["density"] for cell in everyone if content["patterns"][cell["pattern"]]["name"] == pattern]


def _blocks_image(content: dict[str, Any], cell: dict[str, Any], hue: str) -> np.ndarray:
    visible = content["reading"]["visible"]
    _, share = unpack(content["blocks"][cell["blocks"]], visible)
    faint = np.array(matplotlib.colors.to_rgb(FAINT))
    image = faint + share[..., None] * (np.array(matplotlib.colors.to_rgb(hue)) - faint)
    image[np.arange(share.shape[1]) >= np.array(visible)[:, None]] = 1
    return image

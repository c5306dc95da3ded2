"""The picture of `headstart demo offload`: when layers were read, waited for and computed with."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure

LANES = {"hold": (0, "compute"), "wait": (1, "wait"), "read": (2, "read")}


def draw(content: dict) -> Figure:
    """A panel for each streamed model with the last tokens of a turn; a layer has one colour in all lanes."""
    rows = {name: row for name, row in content["rows"].items() if row.get("events")}
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 1 + 1.6 * max(len(rows), 1)), layout="constrained")
        grid = figure.subplots(max(len(rows), 1), squeeze=False)[:, 0]
        for axes, (name, row) in zip(grid, rows.items()):
            colours = matplotlib.colormaps["viridis"].resampled(row["streamed_layers"])
            for kind, layer, begin, end in row["events"]:
                lane, _ = LANES[kind]
                shift = 0.42 * (layer % 2) if kind == "read" else 0  # the reads of two layers overlap
                height = 0.38 if kind == "read" else 0.8
                axes.broken_barh([(begin, end - begin)], (lane + shift, height), color=colours(layer), linewidth=0)
            axes.set_yticks([y + 0.4 for y, _ in LANES.values()], [label for _, label in LANES.values()])
            axes.set_xlim(0, max(end for *_, end in row["events"]))
            axes.set_title(
                f"{name}: {row['streamed_layers']} of {row['layers']} layers streamed, "
                f"{row['read_bytes'] / 2**20:,.0f} MiB and {row['cold_seconds']:.2f} s a token",
                loc="left",
            )
        grid[-1].set_xlabel("seconds; two tokens, nothing in the page cache; a colour is a layer")
    return figure

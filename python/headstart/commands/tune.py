"""`headstart tune`: measures this machine for the cost model of attention, and shows what follows from it."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..attention import cost, tune
from ..attention.patterns import PATTERNS
from ..attention.plan import PrefillPlan

SHOWN_LENGTHS = (128, 512, 1024, 4096)
SHOWN_WORKS = ("SDPA", "dense", "sparse", "adaptive index")


def run(show: bool = False) -> cost.Costs:
    """Measures, writes `cost.tune_path()`, and prints it; or prints the costs in use, if `show`."""
    console = Console()
    if show:
        costs = cost.in_use()
        _describe(console, costs)
        return costs
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("timing attention", total=len(tune.measured_shapes()))
        samples = tune.measure(advance=lambda: progress.advance(task))
    path = cost.tune_path()
    costs = tune.fit(samples, source=str(path))
    tune.save(costs, path)
    cost.forget()
    console.print(_measured(costs, samples))
    _describe(console, costs)
    return costs


def _measured(costs: cost.Costs, samples: list[tune.Sample]) -> Table:
    table = Table("dtype", "heads", "tokens", *SHOWN_WORKS, title="ms, measured / predicted")
    for column in table.columns[2:]:
        column.justify = "right"
    found = {(sample.shape, sample.name): sample for sample in samples}
    for shape in sorted(tune.measured_shapes(), key=lambda s: (s.head_dim, str(s.dtype), s.nk)):
        if shape.nq == shape.nk in SHOWN_LENGTHS:
            cells = [
                f"{1e3 * found[shape, name].seconds:.3g} / {1e3 * tune.predicted(costs, found[shape, name]):.3g}"
                if (shape, name) in found
                else ""
                for name in SHOWN_WORKS
            ]
            heads = f"{shape.heads} on {shape.kv_heads}, D {shape.head_dim}"
            table.add_row(cost.dtype_name(shape.dtype), heads, f"{shape.nk:,}", *cells)
    return table


def _describe(console: Console, costs: cost.Costs) -> None:
    paths = Table("dtype", "heads", "plan", "path, from tokens on", title="the fastest path of a prompt")
    for heads, kv_heads, head_dim in tune.SHAPES:
        for dtype in tune.DTYPES:
            call = cost.Call(1, heads, kv_heads, 1, 1, head_dim, dtype)
            for pattern in PATTERNS:
                changes = cost.crossovers(costs, call, PrefillPlan.uniform(pattern))
                words = ", ".join(f"{path} {n:,}" for n, path in changes)
                paths.add_row(cost.dtype_name(dtype), f"{heads} on {kv_heads}, D {head_dim}", pattern, words)
    console.print(paths)
    errors = [error for kinds in costs.residuals.values() for error in kinds.values()]
    medians = sorted(error["median"] for error in errors)
    machine = ", ".join(f"{name} {value}" for name, value in costs.machine.items())
    console.print(
        f"measured {costs.date}: {machine}\n"
        f"typical error of a kind of work {medians[len(medians) // 2]:.0%}, the worst kind's {medians[-1]:.0%}, "
        f"largest of all {max(error['largest'] for error in errors):.0%}\n"
        f"in use: {costs.source}"
        + (
            ""
            if torch.get_num_threads() == costs.machine.get("threads")
            else f", for {torch.get_num_threads()} threads"
        ),
        highlight=False,
        soft_wrap=True,
    )

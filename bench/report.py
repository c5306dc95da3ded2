"""From raw times to a report: rates, shares of the machine's limits, ratios, targets; the table and the JSON file.

Raw groups are plain data (`run_group`), so a group measured in another process is evaluated like one of this process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from pathlib import Path

from baselines import COPY, FLEX, INT4, LINEAR, SDPA
from cases import BITMAP, BITMAP_GEMM, EVERY, INT4_GEMM, Spec
from measure import interleave

SCHEMA = 1


# --- measuring -------------------------------------------------------------------------------------------------------


def run_group(spec: Spec, *, seconds: float, min_rounds: int, max_rounds: int = 200) -> dict:
    """Builds a group, checks every result once (which warms up), and times its works in turn."""
    works = spec.build()
    errors = {work.name: check(work) for work in works}
    calls = {work.name: work.call for work in works}
    times = interleave(calls, seconds=seconds, min_rounds=min_rounds, max_rounds=max_rounds)
    left_out = {"call", "check"}
    return {
        "title": spec.title,
        **dataclasses.asdict(spec),
        "results": [
            {field.name: getattr(work, field.name) for field in dataclasses.fields(work) if field.name not in left_out}
            | {"targets": [dataclasses.asdict(target) for target in work.targets]}
            | {"error": errors[work.name], "times_us": [round(t, 2) for t in times[work.name]]}
            for work in works
        ],
    }


def check(work) -> float | None:
    result = work.call()
    return None if work.check is None else work.check(result)


# --- the maths -------------------------------------------------------------------------------------------------------


def evaluate(raw: dict, machine: dict) -> dict:
    """A raw group with, for every result: its median and best time, rates, shares of limits, ratios, targets met."""
    results = [dict(result) for result in raw["results"]]
    for result in results:
        result["median_us"] = statistics.median(result["times_us"])
        result["fastest_us"] = min(result["times_us"])
    full = next((result for result in results if result["name"] == EVERY), None)
    for result in results:
        time = result["median_us"]
        result["gflops"] = result["flops"] / time / 1e3 if result["flops"] else None
        result["gbs"] = result["bytes"] / time / 1e3 if result["bytes"] else None
        result["percent"] = percentages(result, raw["dtype"], machine)
        if result["baseline"] is None:
            result["versus"] = {
                other["baseline"]: other["median_us"] / time
                for other in results
                if other["baseline"] is not None and other["of"] in (None, result["name"])
            }
            if full is not None and result is not full:
                result["share_of_full"] = time / full["median_us"]
                if result["limit"] == "gemm":
                    result["per_density"] = result["share_of_full"] / result["density"]
        result["wrong"] = result["error"] is not None and not result["error"] <= result["error_bar"]
        result["targets"] = [judge(target, result) for target in result["targets"]]
    return {**raw, "results": results}


def percentages(result: dict, dtype: str, machine: dict) -> dict[str, float]:
    """Of the GEMM rate in the same dtype and of the best one, or of the read or copy bandwidth."""
    if result["limit"] == "gemm":
        rates = machine["gemm_gflops"]
        return {
            "gemm": 100 * result["gflops"] / rates[dtype],
            "best_gemm": 100 * result["gflops"] / max(rates.values()),
        }
    if result["limit"] in ("read", "copy"):
        return {result["limit"]: 100 * result["gbs"] / machine[f"{result['limit']}_gbs"]}
    return {}


def judge(target: dict, result: dict) -> dict:
    """The target with the measured `value`, and `met`."""
    value: object = result
    for part in target["metric"].split("."):
        value = value[part]
    low, high = target["at_least"], target["at_most"]
    met = (low is None or value >= low) and (high is None or value <= high)
    return {**target, "value": value, "met": met}


def all_results(report: dict) -> list[dict]:
    return [result for group in report["groups"] for result in group["results"]]


def wrong_results(report: dict) -> list[str]:
    return [
        f"{group['title']}: {result['name']}: error {result['error']:.3g}, allowed {result['error_bar']:.3g}"
        for group in report["groups"]
        for result in group["results"]
        if result["wrong"]
    ]


def targets_met(report: dict) -> tuple[int, int]:
    """(met, all)."""
    targets = [target for result in all_results(report) for target in result["targets"]]
    return sum(target["met"] for target in targets), len(targets)


# --- words -----------------------------------------------------------------------------------------------------------


def time_words(us: float) -> str:
    """Three digits and a unit: 12.3 µs, 456 ms, 1.20 s."""
    for unit, size in (("s", 1e6), ("ms", 1e3), ("µs", 1)):
        if us >= size or unit == "µs":
            return f"{digits(us / size)} {unit}"
    raise AssertionError


def digits(x: float) -> str:
    return f"{x:.0f}" if x >= 99.5 else f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def target_words(target: dict) -> str:
    """E.g. ``≥ 4× torch SDPA``."""
    sign, bound = ("≥", target["at_least"]) if target["at_least"] is not None else ("≤", target["at_most"])
    metric = target["metric"]
    if metric.startswith("versus."):
        return f"{sign} {bound:g}× {metric.removeprefix('versus.')}"
    words = {
        "percent.best_gemm": f"{bound:g} % of GEMM",
        "percent.read": f"{bound:g} % of read",
        "per_density": f"{bound:g} · d",
        "share_of_full": f"{100 * bound:g} %",
        "gbs": f"{bound:g} GB/s",
    }
    return f"{sign} {words.get(metric, f'{bound:g} {metric}')}"


# --- the table -------------------------------------------------------------------------------------------------------

COLUMNS = {
    "case": 28,
    "µs": 10,
    "GFLOP/s": 8,
    "GB/s": 7,
    "% limit": 7,
    "% best": 7,
}
RATIOS = {SDPA: "× SDPA", FLEX: "× Flex"}
RATIOS_OF = {
    INT4_GEMM: {INT4: "× int4", LINEAR: "× linear"},
    BITMAP: {COPY: "× copy"},
    BITMAP_GEMM: {LINEAR: "× linear"},
}


def ratios(group: dict) -> dict[str, str]:
    """The baselines of a group's family, and what their columns are called."""
    return RATIOS_OF.get(group["family"], RATIOS)


def console():
    from rich.console import Console

    plain = Console()
    return plain if plain.is_terminal else Console(width=140)


LEGEND = (
    "% limit: of the GEMM rate in the dtype, or of the read (decode, a weight with one row) or copy (merge, bitmap) "
    "bandwidth; % best: of the best GEMM rate; × SDPA, × Flex, × int4 (torch's operator), × linear (bf16), × copy: "
    "times faster; of every block: the time as a share of every block's, or factor · density"
)


def table(group: dict):
    """One line a case."""
    from rich.table import Table
    from rich.text import Text

    out = Table(title=Text(group["title"], "bold"), title_justify="left", box=None, padding=(0, 1, 0, 0))
    columns = {**COLUMNS, **dict.fromkeys(ratios(group).values(), 8), "of every block": 13}
    for name, width in columns.items():
        out.add_column(name, justify="left" if name == "case" else "right", min_width=width, no_wrap=True)
    out.add_column("target", no_wrap=True)
    for result in group["results"]:
        out.add_row(*cells(result, ratios(group)), target_cell(result), style="dim" if result["baseline"] else "")
    return out


def cells(result: dict, baselines: dict[str, str]) -> list[str]:
    def ratio(name: str) -> str:
        return f"{digits(versus[name])}×" if name in versus else ""

    percent, versus = result["percent"], result.get("versus", {})
    limit = next((percent[name] for name in ("gemm", "read", "copy") if name in percent), None)
    of_full = ""
    if "per_density" in result:
        of_full = f"{result['per_density']:.2f} · {result['density']:.3f}"
    elif "share_of_full" in result:
        of_full = f"{100 * result['share_of_full']:.1f} %"
    return [
        result["name"],
        f"{result['median_us']:,.1f}",
        digits(result["gflops"]) if result["gflops"] else "",
        digits(result["gbs"]) if result["gbs"] else "",
        digits(limit) if limit is not None else "",
        digits(percent["best_gemm"]) if "best_gemm" in percent else "",
        *(ratio(name) for name in baselines),
        of_full,
    ]


def target_cell(result: dict):
    from rich.text import Text

    text = Text()
    if result["wrong"]:
        text.append(f"WRONG: error {result['error']:.3g} > {result['error_bar']:g}  ", "bold red")
    for i, target in enumerate(result["targets"]):
        mark, style = ("pass", "green") if target["met"] else ("miss", "red")
        text.append(("; " if i else "") + target_words(target) + " ")
        text.append(mark, style)
    return text


def machine_words(environment: dict, machine: dict) -> list[str]:
    gemm = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in machine["gemm_gflops"].items())
    commit = (environment["commit"] or "unknown") + (" with uncommitted changes" if environment["uncommitted"] else "")
    lines = [
        f"{environment['cpu']}, {environment['threads']} threads, tier {environment['tier']}; "
        f"torch {environment['torch']} ({environment['aten_capability']}); commit {commit}",
        f"GEMM {gemm}; read {machine['read_gbs']:.1f} GB/s ({machine['read_method']}), copy {machine['copy_gbs']:.1f} "
        "GB/s read and written",
    ]
    if environment["busy"]:
        lines.append(f"warning: the machine is busy (load average {environment['load_average']}); numbers will be off")
    if "avx512_bf16" not in environment["flags"]:
        lines.append("note: the targets are set for a CPU with AVX-512-BF16, which this is not")
    return lines


# --- the file --------------------------------------------------------------------------------------------------------


def save(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + f".{os.getpid()}.new")
    fresh.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    fresh.replace(path)


def parse(path: Path):
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a results file: {error}") from None


def load(path: Path) -> dict:
    """Reads a results file of `run.py`; says what is wrong with any other."""
    report = parse(path)
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema: expected {SCHEMA} (a results file of bench/run.py), got {schema}")
    return report

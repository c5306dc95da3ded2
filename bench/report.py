"""From raw times to a report: rates, shares of the machine's limits, ratios, targets; the table and the JSON file.

A raw group is plain data (`run_group`), so a group from another process or from a file is evaluated in the same way.
`load` evaluates a file again: its times are facts, the shares and targets are judged by today's rules.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Collection
from pathlib import Path

import limits
from baselines import COPY, FLEX, INT4, LINEAR, SDPA
from cases import CHOICE, EVERY, Spec
from headstart import _library
from measure import interleave
from targets import FASTEST_TIER, targets
from work import BITMAP, BITMAP_GEMM, INT4_GEMM

SCHEMA = 2
IN_CACHE = 2  # memory is no limit for data that come again before 2 × the caches' size has moved


# --- measuring -------------------------------------------------------------------------------------------------------


def run_group(spec: Spec, *, seconds: float, min_rounds: int, max_rounds: int = 200) -> dict:
    """Builds a group, checks every result once (which warms up), and times its works in turn."""
    chosen = _library.cpu_tier()
    try:
        works = spec.build()
        errors = {work.name: check(work) for work in works}
        calls = {work.name: work.call for work in works}
        times = interleave(calls, seconds=seconds, min_rounds=min_rounds, max_rounds=max_rounds)
    finally:
        if chosen is not None:
            _library.set_cpu_tier(chosen)
    left_out = {"call", "check"}
    return {
        "title": spec.title,
        "chosen": chosen,
        **dataclasses.asdict(spec),
        "results": [
            {field.name: getattr(work, field.name) for field in dataclasses.fields(work) if field.name not in left_out}
            | {"error": errors[work.name], "times_us": [round(t, 2) for t in times[work.name]]}
            for work in works
        ],
    }


def check(work) -> float | None:
    result = work.call()
    return None if work.check is None else work.check(result)


# --- the maths -------------------------------------------------------------------------------------------------------


def evaluate(raw: dict, machine: dict, unknown: Collection[str] = ()) -> dict:
    """A raw group with, for every result: its median and best time, rates, share of a limit, ratios, judged targets.

    machine: `cache_bytes`, and `measured`, a list of what `limits.measure` returned.
    unknown: limits whose measured rate is known to be too low.
    """
    found = limits.highest(machine["measured"])
    results = [dict(result) for result in raw["results"]]
    for result in results:
        result["median_us"] = statistics.median(result["times_us"])
        result["fastest_us"] = min(result["times_us"])
    full = next((result for result in results if result["name"] == EVERY), None)
    for result in results:
        time = result["median_us"]
        result["gflops"] = result["flops"] / time / 1e3 if result["flops"] else None
        result["gbs"] = result["bytes"] / time / 1e3 if result["bytes"] else None
        result["limited_by"] = limited_by(raw, result, found, machine["cache_bytes"], unknown)
        result["percent"] = {}
        if result["limited_by"] is not None:
            rate = result["gflops"] if result["limit"] == "multiply" else result["gbs"]
            result["percent"] = {result["limit"]: 100 * rate / found[result["limited_by"]]["rate"]}
        if result["baseline"] is None:
            result["versus"] = {
                other["baseline"]: other["median_us"] / time
                for other in results
                if other["baseline"] is not None and other["of"] in (None, result["name"])
            }
            if raw["family"] == CHOICE:
                tiers = [other["median_us"] for other in results if other["of"] == result["of"]]
                result[FASTEST_TIER] = min(tiers) / time
            elif full is not None and result is not full:
                result["share_of_full"] = time / full["median_us"]
                if result["limit"] == "multiply":
                    result["per_density"] = result["share_of_full"] / result["density"]
        result["wrong"] = result["error"] is not None and not result["error"] <= result["error_bar"]
        result["targets"] = [judge(dataclasses.asdict(target), result) for target in targets(raw, result)]
    return {**raw, "results": results}


def limited_by(group: dict, result: dict, found: dict, cache_bytes: int, unknown: Collection[str]) -> str | None:
    """The limit that the result is compared with; None if there is none, or if its rate is not known.

    int4 codes are integers, so bytes may multiply them, whatever the dtype of the activations is.
    """
    limit = result["limit"]
    if limit == "multiply":
        integers = INT4_GEMM in (group["family"], group["kernel"]) and result["baseline"] != LINEAR
        return limits.fastest_unit("int8" if integers else group["dtype"], found, unknown)
    if limit not in found or limit in unknown or result["cycle_bytes"] < IN_CACHE * cache_bytes:
        return None
    return limit


def judge(target: dict, result: dict) -> dict:
    """The target with the measured `value` and with `met`; both are None if the share of a limit is not known."""
    value: object = result
    for part in target["metric"].split("."):
        value = value.get(part)
    if value is None:
        return {**target, "value": None, "met": None}
    low, high = target["at_least"], target["at_most"]
    return {**target, "value": value, "met": (low is None or value >= low) and (high is None or value <= high)}


def rows(report: dict):
    """(group, result) of every result."""
    return ((group, result) for group in report["groups"] for result in group["results"])


def wrong_results(report: dict) -> list[str]:
    return [
        f"{group['title']}: {result['name']}: error {result['error']:.3g}, allowed {result['error_bar']:.3g}"
        for group, result in rows(report)
        if result["wrong"]
    ]


def past_limits(report: dict) -> dict[str, list[str]]:
    """{limit: the rows that were faster}. Such a limit was measured too low, so no share of it is true."""
    found: dict[str, list[str]] = {}
    for group, result in rows(report):
        for percent in result["percent"].values():
            if percent > 100:
                words = f"{group['title']}: {result['name']}: {percent:.1f} % of {LIMIT_WORDS[result['limited_by']]}"
                found.setdefault(result["limited_by"], []).append(words)
    return found


def slower_than_forced(report: dict) -> list[str]:
    """The rows where a forced tier was more than 5 % faster than the tier that headstart chose."""
    return [
        f"{group['title']}: {result['name']}: {1 / target['value']:.2f} × the time of the fastest tier"
        for group, result in rows(report)
        for target in result["targets"]
        if target["metric"] == FASTEST_TIER and target["met"] is False
    ]


def targets_met(report: dict) -> tuple[int, int, int]:
    """(met, missed, not known)."""
    met = [target["met"] for _, result in rows(report) for target in result["targets"]]
    return met.count(True), met.count(False), met.count(None)


# --- words -----------------------------------------------------------------------------------------------------------

LIMIT_WORDS = {
    "fp32": "the fp32 rate",
    "bf16": "the bf16 rate",
    "int16": "the int16 rate",
    "int8": "the int8 rate",
    "read": "read bandwidth",
    "copy": "copy bandwidth",
}


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
    return bound_words(target) + metric_words(target["metric"])[1]


def bound_words(target: dict) -> str:
    """The same without what it compares with: ``≥ 4×``."""
    sign, bound = ("≥", target["at_least"]) if target["at_least"] is not None else ("≤", target["at_most"])
    return f"{sign} {scaled(target['metric'], bound):g}{metric_words(target['metric'])[0]}"


def value_words(target: dict) -> str:
    """What was measured, in the words of the target."""
    if target["value"] is None:
        return "not known"
    value, words = scaled(target["metric"], target["value"]), "".join(metric_words(target["metric"]))
    rounded = digits(value)
    if not target["met"] and f" {float(rounded):g}{words}".startswith(bound_words(target)[1:]):
        rounded = f"{value:.4f}"  # a value just past the bound must not look like the bound
    return rounded + words


def scaled(metric: str, value: float) -> float:
    return 100 * value if metric == "share_of_full" else value


def metric_words(metric: str) -> tuple[str, str]:
    """The unit, and what the metric compares with."""
    if metric.startswith("versus."):
        return "×", f" {metric.removeprefix('versus.')}"
    return {
        "percent.multiply": (" %", " of the multiply rate"),
        "percent.read": (" %", " of read bandwidth"),
        "per_density": (" · d", f" of {EVERY}"),
        "share_of_full": (" %", f" of {EVERY}"),
        "gbs": (" GB/s", ""),
        FASTEST_TIER: ("×", " the speed of the fastest tier"),
    }[metric]


# --- the table -------------------------------------------------------------------------------------------------------

COLUMNS = {
    "case": 28,
    "µs": 10,
    "GFLOP/s": 8,
    "GB/s": 7,
    "% limit": 7,
    "limit": 6,
}
RATIOS = {SDPA: "× SDPA", FLEX: "× Flex"}
RATIOS_OF = {
    INT4_GEMM: {INT4: "× int4", LINEAR: "× linear"},
    BITMAP: {COPY: "× copy"},
    BITMAP_GEMM: {LINEAR: "× linear"},
}


def ratios(group: dict) -> dict[str, str]:
    """The baselines of a group's family, and what their columns are called."""
    return {} if group["family"] == CHOICE else RATIOS_OF.get(group["family"], RATIOS)


def console():
    from rich.console import Console

    plain = Console()
    return plain if plain.is_terminal else Console(width=140)


LEGEND = (
    "% limit: share of the limit that is named beside it; empty where the data may stay in the caches; × SDPA, × Flex, "
    "× int4 (torch's operator), × linear (bf16), × copy: times faster; of every block: the time as a share of every "
    "block's time, or factor · density"
)


def table(group: dict):
    """One line for each case."""
    from rich.table import Table
    from rich.text import Text

    out = Table(title=Text(group["title"], "bold"), title_justify="left", box=None, padding=(0, 1, 0, 0))
    columns = {**COLUMNS, **dict.fromkeys(ratios(group).values(), 8)}
    beside_full = any("share_of_full" in result for result in group["results"])
    columns |= {"of every block": 13} if beside_full else {}
    for name, width in columns.items():
        out.add_column(name, justify="left" if name == "case" else "right", min_width=width, no_wrap=True)
    out.add_column("target", no_wrap=True)
    for result in group["results"]:
        out.add_row(
            *cells(result, ratios(group), beside_full), target_cell(result), style="dim" if result["baseline"] else ""
        )
    return out


def cells(result: dict, baselines: dict[str, str], beside_full: bool) -> list[str]:
    def ratio(name: str) -> str:
        return f"{digits(versus[name])}×" if name in versus else ""

    versus = result.get("versus", {})
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
        *(digits(percent) for percent in result["percent"].values()),
        *([result["limited_by"]] if result["percent"] else ["", ""]),
        *(ratio(name) for name in baselines),
        *([of_full] if beside_full else []),
    ]


def target_cell(result: dict):
    from rich.text import Text

    text = Text()
    if result["wrong"]:
        text.append(f"WRONG: error {result['error']:.3g} > {result['error_bar']:g}  ", "bold red")
    for i, target in enumerate(result["targets"]):
        marks = {True: ("pass", "green"), False: ("miss", "red"), None: ("not known", "yellow")}
        mark, style = marks[target["met"]]
        text.append(("; " if i else "") + target_words(target) + " ")
        text.append(mark, style)
    return text


def rate_words(name: str, rate: float) -> str:
    return f"{digits(rate)} {'GB/s' if name in ('read', 'copy') else 'GFLOP/s'}"


def environment_words(environment: dict) -> list[str]:
    commit = (environment["commit"] or "unknown") + (" with uncommitted changes" if environment["uncommitted"] else "")
    lines = [
        f"{environment['cpu']}, {environment['threads']} threads, tier {environment['tier']}; "
        f"torch {environment['torch']} ({environment['aten_capability']}); commit {commit}",
    ]
    if environment["busy"]:
        lines.append(f"warning: the machine is busy (load average {environment['load_average']}); numbers will be off")
    return lines


def limit_words(measured: list[dict]) -> list[str]:
    """A line for each limit."""
    return [
        f"{LIMIT_WORDS[name]}: {rate_words(name, limit['rate'])} ({limit['way']}, {limit['when']})"
        for name, limit in limits.highest(measured).items()
    ]


# --- the file --------------------------------------------------------------------------------------------------------


def parse(path: Path):
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a results file: {error}") from None


def load(path: Path) -> dict:
    """Reads a results file of `run.py` and evaluates it; an error says what is wrong with any other file.

    `unknown`: {limit: why}. A limit that a kernel passed is not known in a file of schema 1, and an error in others.
    """
    report = parse(path)
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema not in (1, SCHEMA) or "groups" not in report:
        raise ValueError(f"{path}: schema: expected {SCHEMA} (a results file of bench/run.py), got {schema}")
    if schema == 1:
        report = from_schema_1(report)
    groups = report["groups"]
    report["groups"] = [evaluate(group, report["machine"]) for group in groups]
    report["unknown"] = {limit: lines[0] for limit, lines in past_limits(report).items()}
    if report["unknown"]:
        if schema == SCHEMA:
            raise ValueError(f"{path}: a share above 100 %: {'; '.join(report['unknown'].values())}")
        report["groups"] = [evaluate(group, report["machine"], set(report["unknown"])) for group in groups]
    return report


def from_schema_1(report: dict) -> dict:
    """Schema 1 has torch's product before and after the run, and the read and copy bandwidths from before it."""
    old, measured = report["machine"], []
    for when, key in (("before the run", "gemm_gflops"), ("after the run", "gemm_gflops_after")):
        rates = {unit: {"torch product": rate} for unit, rate in old.get(key, {}).items()}
        measured.append({"when": when, "rates": rates})
    measured[0]["rates"] |= {"read": {old["read_method"]: old["read_gbs"]}, "copy": {"torch copy": old["copy_gbs"]}}
    groups = []
    for group in report["groups"]:
        limit = {"gemm": "multiply"}
        results = [
            {**result, "limit": limit.get(result["limit"], result["limit"]), "cycle_bytes": float("inf"), "tier": None}
            for result in group["results"]
        ]
        groups.append({"chosen": report["environment"]["tier"], "kernel": None, **group, "results": results})
    cache_bytes = report["environment"].get("cache_bytes", 0)
    return {**report, "machine": {"cache_bytes": cache_bytes, "measured": measured}, "groups": groups}

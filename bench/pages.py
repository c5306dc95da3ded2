"""Makes README.md's tables, docs/numbers.md and docs/registers.md from bench/results: ``python bench/pages.py``.

docs/numbers.md shows every CPU that has a results file of `run.py`, and every GPU that has one of `gpu/run.py`.
README.md shows a few rows of the newest ones, and the tables of the newest demo and of the newest run of `peers.py`.
With `--check`, nothing is written, and a page that differs from the results is an error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import limits
import machine
import registers
import report
from baselines import COPY, FLEX, INT4, LINEAR, SDPA
from cases import CHOICE, EVERY
from gpu import tables as gpu
from work import (
    BITMAP,
    BITMAP_GEMM,
    BITMAP_VALUES,
    COMPRESS,
    GROUP,
    INT4_GEMM,
    INT8_ACTIVATIONS,
    INT8_SMALL_GROUPS,
    ZEROS,
)

BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
DEMO_BEGIN, DEMO_END = "<!-- demo:begin -->", "<!-- demo:end -->"
PEERS_BEGIN, PEERS_END = "<!-- peers:begin -->", "<!-- peers:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
TABLE_OF = {INT4_GEMM: "int4 weights", BITMAP: "bitmap weights", BITMAP_GEMM: "bitmap weights", CHOICE: CHOICE}
# README.md's rows: family, result.
SHORT = (
    ("sparse_attention", EVERY),
    ("sparse_attention", "density 0.10"),
    ("prefill_index", "adaptive stride 16, 4 samples"),
    ("centroid_lookup", "decode step, 10 % of the keys, with parents"),
    (INT4_GEMM, INT4_GEMM),
    (INT4_GEMM, INT8_ACTIVATIONS),
    (BITMAP, BITMAP_VALUES["same"]),
    (BITMAP_GEMM, BITMAP_VALUES["same"]),
)
SHORT_ROWS = (1, 256)  # of activations
WRONG_LOSS = 1.0  # nats more than transformers: no approximation that is meant costs so much


# --- docs/numbers.md -------------------------------------------------------------------------------------------------

HEAD = f"""# Numbers

`python bench/pages.py` makes this page from `bench/results/`; do not edit it. `make bench` measures your CPU. Each CPU
has one results file. A figure is the median of calls that took turns in one run; attention is causal, with batch 1.
{SDPA} is always dense attention. d is the share of the pairs that are attended.

A share compares a kernel with a limit of the same machine. The limit is the highest rate that was measured before,
during or after the run, in several ways (`bench/limits.py`). An fp32 case is compared with the fp32 rate; a bf16 case
with the fastest of the fp32, bf16 and int16 rates, since each is exact enough for bf16; a case with int4 weights with
the fastest of these and the int8 rate. If the data may stay in the caches, there is no share of the memory's bandwidth.
A row that misses a target says so.
"""


def numbers_page(files: dict[str, dict], gpus: dict[str, dict] | None = None) -> str:
    """Both: results by the path of their file, as a reader of the page finds it."""
    sections = [cpu_section(results, source) for source, results in files.items()]
    sections += [gpu.section(results, source) for source, results in (gpus or {}).items()]
    return "\n".join([HEAD, *sections])


def cpu_section(results: dict, source: str) -> str:
    environment = results["environment"]
    parts = [f"## {environment['cpu']}, {environment['threads']} threads", origin(results, source)]
    parts.append("\n".join(limits_table(results)))
    tables: dict[str, list[dict]] = {"attention": [], **{name: [] for name in TABLE_OF.values()}}
    for group in results["groups"]:
        tables[TABLE_OF.get(group["family"], "attention")].append(group)
    for name, groups in tables.items():
        if groups:
            rows = choice_table(groups) if name == CHOICE else table(groups)
            parts += [f"### {name[0].upper()}{name[1:]}", "\n".join(rows)]
    parts.append("### Targets")
    parts.append(targets_words(results))
    missed = missed_table(results)
    if missed:
        parts.append("\n".join(missed))
    return "\n\n".join(parts) + "\n"


def origin(results: dict, source: str) -> str:
    environment = results["environment"]
    state = " with uncommitted changes" if environment["uncommitted"] else ""
    busy = f" The machine was busy (load average {environment['load_average']})." if environment["busy"] else ""
    return (
        f"Tier {environment['tier']}, torch {environment['torch']}; {environment['date'][:10]}, commit "
        f"{environment['commit']}{state}.{busy} From [`{Path(source).name}`]({source})."
    )


def limits_table(results: dict) -> list[str]:
    lines = ["| limit | rate | how it was measured |", "|---|--:|---|"]
    for name, limit in limits.highest(results["machine"]["measured"]).items():
        words = report.LIMIT_WORDS[name].removeprefix("the ")
        rate, way = report.rate_words(name, limit["rate"]), f"{limit['way']}, {limit['when']}"
        if name in results["unknown"]:
            rate, way = "not known", f"{way}: {rate}, but a kernel was faster ({results['unknown'][name]})"
        lines.append(f"| {words} | {rate} | {way} |")
    if results["schema"] == 1:
        lines += [
            "",
            "This file follows older rules. torch's product is its only multiply rate, and a kernel may be faster than "
            "that. It has no rate for integers, so cases with int4 weights have no share.",
        ]
    return lines


def targets_words(results: dict) -> str:
    met, missed, unknown = report.targets_met(results)
    rest = f" {unknown} cannot be judged, because the limit is not known." if unknown else ""
    return f"{met} of {met + missed + unknown} targets are met, {missed} are missed.{rest}"


def missed_table(results: dict) -> list[str]:
    lines = [
        f"| {row_name(group, result)}, {head(group)} | {report.target_words(target)} | {report.value_words(target)} |"
        for group, result in report.rows(results)
        for target in result["targets"]
        if target["met"] is False
    ]
    return ["| missed | target | measured |", "|---|---|---|", *lines] if lines else []


def table(groups: list[dict]) -> list[str]:
    """A row for each case, a column for each shape."""
    heads = list(dict.fromkeys(head(group) for group in groups))
    rows: dict[str, dict[str, str]] = {}
    for group in groups:
        for result in group["results"]:
            if shown(group, result):
                rows.setdefault(row_name(group, result), {})[head(group)] = cell(group, result)
    lines = [f"| {' | '.join(['', *heads])} |", f"|{'---|' * (len(heads) + 1)}"]
    return lines + [f"| {' | '.join([name, *(cells.get(h, '') for h in heads)])} |" for name, cells in rows.items()]


def choice_table(groups: list[dict]) -> list[str]:
    """A row for each kernel, a column for each tier; the tier that headstart chose is bold."""
    tiers = list(dict.fromkeys(result["tier"] for group in groups for result in group["results"]))
    lines = [f"| {' | '.join(['', *(f'{tier} tier' for tier in tiers)])} |", f"|---|{'--:|' * len(tiers)}"]
    for group in groups:
        rows: dict[str, dict[str, str]] = {}
        for result in group["results"]:
            words = report.time_words(result["median_us"])
            if result["tier"] == group["chosen"]:
                words = f"**{words}**{missed_words(result)}"
            rows.setdefault(result["of"], {})[result["tier"]] = words
        for name, cells in rows.items():
            title = group["title"].removeprefix(f"{CHOICE}, ")
            lines.append(f"| {' | '.join([f'{title}: {name}', *(cells.get(tier, '') for tier in tiers)])} |")
    return lines


def head(group: dict) -> str:
    shape, kernel = group["shape"], group["kernel"] or group["family"]
    if kernel == INT4_GEMM:
        return f"weight {shape['n']:,} × {shape['k']:,}, group {GROUP}"
    if kernel in (BITMAP, BITMAP_GEMM):
        return f"weight {shape['n']:,} × {shape['k']:,}, {100 * ZEROS:.0f} % zeros"
    return f"{shape['hq']} heads on {shape['hkv']} KV heads, D {shape['d']}"


def shown(group: dict, result: dict) -> bool:
    """Whether the table has the row; the results file has all of them.

    The table has all bf16 cases and the dense fp32 case. It leaves out every block's second time beside the index
    builders, bitmap weights in lower tiers, and quantised values with more than one row.
    """
    if group["family"] == "prefill_index" and result["name"] == EVERY:
        return False
    if result["baseline"] is not None and not (group["family"] == "sparse_attention" and result["baseline"] == SDPA):
        return False
    if group["family"] in (BITMAP, BITMAP_GEMM) and (group["tier"] or result["name"].startswith("int")):
        return group["family"] == BITMAP_GEMM and group["tokens"] == 1 and not group["tier"]
    return group["dtype"] == "bf16" or (group["family"] in ("sparse_attention", "tier") and result["name"] == EVERY)


def row_name(group: dict, result: dict) -> str:
    family, tokens = group["family"], f"{group['tokens']:,}"
    dtype = "" if group["dtype"] == "bf16" else f", {group['dtype']}"
    tier = f", {group['tier']} tier" if group["tier"] else ""
    if family == CHOICE:
        return f"{CHOICE}, {result['of']}, {tokens} rows or tokens"
    if family == "sparse_attention":
        name = {SDPA: f"{SDPA}, {tokens} tokens", EVERY: f"`sparse_attention`, {EVERY}"}.get(result["name"])
        return (name or f"`sparse_attention`, {result['name'].replace('density', 'd =')}") + dtype
    if family == "prefill_index":
        pattern, _, stride = result["name"].partition(" ")
        name = {"adaptive": "adaptive_block"}.get(pattern, pattern)
        return f"`{name}_index`{', ' + stride if stride else ''}{dtype}"
    if family == "decode":
        return f"decode, one query over {tokens} keys{dtype}"
    if family == "centroid_lookup":
        return f"`centroid_lookup`, {result['name']}, {tokens} keys{dtype}"
    if family == INT4_GEMM:
        rest = result["name"].removeprefix(INT4_GEMM)
        return f"`{INT4_GEMM}`, {tokens} row{'s' if group['tokens'] > 1 else ''}{rest}{tier}"
    if family == BITMAP:
        op = "`bitmap_compress`" if result["name"] == COMPRESS else f"`bitmap_decompress`, {result['name']}"
        return op + tier
    if family == BITMAP_GEMM:
        return f"`bitmap_gemm`, {tokens} row{'s' if group['tokens'] > 1 else ''}, {result['name']}{tier}"
    if family == "tier":
        return f"{EVERY}, {group['tier']} tier, {tokens} tokens{dtype or ', bf16'}"
    return f"`merge_attention`, {tokens} tokens{dtype}"


def cell(group: dict, result: dict) -> str:
    parts = [report.time_words(result["median_us"])]
    for name, ratio in result.get("versus", {}).items():
        if name == SDPA:
            same = " at the same tier" if group["family"] == "tier" else ""
            parts.append(f"**{report.digits(ratio)}× SDPA**{same}")
        elif name == INT4 and result["name"] != INT8_SMALL_GROUPS:  # torch's operator has groups of 128 here
            parts.append(f"**{report.digits(ratio)}× {INT4}**")
        elif name == COPY:
            parts.append(f"**{report.digits(ratio)}× a copy**")
        elif name in (FLEX, LINEAR):
            bold = "**" if group["family"] == BITMAP_GEMM else ""
            parts.append(f"{bold}{report.digits(ratio)}× {name}{bold}")
    if "per_density" in result:
        parts.append(f"{result['per_density']:.2f} · d of {EVERY}")
    elif "share_of_full" in result:
        parts.append(f"{100 * result['share_of_full']:.1f} % of {EVERY}")
    for limit, percent in result["percent"].items():
        rate = f"{report.digits(result['gbs'])} GB/s, " if limit in ("read", "copy") else ""
        if rate or group["family"] in ("sparse_attention", INT4_GEMM, BITMAP_GEMM) and "per_density" not in result:
            parts.append(f"{rate}{percent:.0f} % of {report.LIMIT_WORDS[result['limited_by']]}")
    return ", ".join(parts) + missed_words(result)


def missed_words(result: dict) -> str:
    missed = [target for target in result["targets"] if target["met"] is False]
    words = (f"{report.value_words(target)}, target {report.bound_words(target)}" for target in missed)
    return f"; **missed:** {'; '.join(words)}" if missed else ""


# --- README.md -------------------------------------------------------------------------------------------------------


def short_table(results: dict, source: str) -> str:
    """A few rows of the first shapes, and where the rest is."""
    lines = ["| | |", "|---|---|"]
    heads: list[str] = []
    for family, name in SHORT:
        for group in results["groups"]:
            wanted = group["family"] == family and group["dtype"] == "bf16" and not group["tier"]
            if not wanted or (family in (INT4_GEMM, BITMAP_GEMM) and group["tokens"] not in SHORT_ROWS):
                continue
            first = next(other for other in results["groups"] if other["family"] == family)
            if head(group) != head(first):
                continue
            for result in (result for result in group["results"] if result["name"] == name):
                heads.append(head(group))
                lines.append(f"| {row_name(group, result)} | {cell(group, result)} |")
    environment = results["environment"]
    lines += [
        "",
        f"{'; '.join(dict.fromkeys(heads))}. {environment['cpu']}, {environment['threads']} threads. "
        f"{origin(results, source)} {targets_words(results)} [docs/numbers.md](docs/numbers.md) has all cases, the "
        "limits and the targets.",
    ]
    return "\n".join(lines)


def demo_table(content: dict) -> str:
    """The demo's table, as `headstart demo` prints it."""
    place = content["environment"]
    lines = ["| attention | seconds | speed-up | loss | change | top-1 | density |", f"|---|{'--:|' * 6}"]
    lines += [
        f"| {row['name']} | {row['seconds']:.2f} | {row['speedup']:.2f}× | {row['loss']:.4f} | "
        f"{row['loss_difference']:+.4f} | {row['agreement']:.3f} | {row['density']:.3f} |"
        for row in content["rows"]
    ]
    lines += [
        "",
        f"{content['model']}, {content['tokens']:,} tokens; {place['cpu']}, {place['threads']} threads, tier "
        f"{place['cpu_tier']}; torch {place['torch']}, transformers {place['transformers']}; {place['date'][:10]}. "
        f"*{content['conclusion']}*",
    ]
    return "\n".join(lines)


def peers_table(results: dict) -> list[str]:
    """The engines of `peers.py`, to stand between `PEERS_BEGIN` and `PEERS_END`. A figure that is missing is a dash."""
    place, settings, engines = results["environment"], results["settings"], results["engines"].values()
    own_loss = results["engines"].get("transformers", {}).get("medians", {}).get("loss")
    columns = {"opens, s": ("open", "{:.2f}"), "first token, s": ("first token", "{:.2f}")}
    columns |= {f"reads {n:,}, s": (f"prefill {n}", "{:.2f}") for n in settings["prefill"]}
    columns |= {"loss": ("loss", "{:.3f}")}
    columns |= {f"tokens/s at {n:,}": (f"decode {n}", "{:.1f}") for n in settings["decode"]}
    columns |= {"peak memory, MB": ("peak bytes", "{:,.0f}")}
    lines, notes = [f"| engine | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"], []
    for engine in engines:
        found, title = engine["medians"], engine["title"]
        if not found:
            reason = "; ".join(engine["failures"]).replace("|", "/") or "nothing was measured"
            lines.append(f"| {title} | does not run here: {reason} |{' |' * (len(columns) - 1)}")
            continue
        cells = []
        for figure, form in columns.values():
            value = found.get(figure)
            cell = "–" if value is None else form.format(value / 1e6 if figure == "peak bytes" else value)
            if figure == "loss" and None not in (value, own_loss) and value != own_loss:
                cell += f" ({value - own_loss:+.3f})"
            cells.append(cell)
        lines.append(f"| {' | '.join([title, *cells])} |")
        wrong = None not in (found.get("loss"), own_loss) and found["loss"] > own_loss + WRONG_LOSS
        warnings = ["its loss says that it does not compute this model rightly here"] if wrong else []
        notes += [f"{title}: {words}." for words in (*warnings, *engine["notes"], *engine["failures"])]
    versions = dict(item for engine in engines for item in engine["versions"].items())
    rounds, state = settings["rounds"], " with uncommitted changes" if place["uncommitted"] else ""
    words = [
        f"{results['model']}; loss of the last {results['loss_tokens']:,} tokens; {place['cpu']}, {place['threads']} "
        f"threads; {', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"{'medians of ' if rounds > 1 else ''}{rounds} round{'s' if rounds > 1 else ''}; {place['date'][:10]}, "
        f"commit {place['commit']}{state}.",
        *([f"The machine was busy (load average {place['load_average']})."] if place["busy"] else []),
        *notes,
    ]
    return [*lines, "", " ".join(words)]


def replaced(text: str, table: str, path: Path, begin: str, end: str) -> str:
    """`text` with `table` between the markers. Each marker must stand there once, in this order."""
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise ValueError(f"{path}: expected {marker} once, found it {text.count(marker)} times")
    before, rest = text.split(begin)
    if end not in rest:
        raise ValueError(f"{path}: expected {begin} before {end}")
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


# --- files -----------------------------------------------------------------------------------------------------------


def run_results(folder: Path) -> dict[Path, dict]:
    """The results of `run.py`, the newest first: one file for each CPU, which has the CPU's name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = report.parse(path)
        of_cpu = "groups" in content and "cpu" in content.get("environment", ())
        if of_cpu and path.stem == machine.slug(content["environment"]):
            found[path] = report.load(path)
    return dict(sorted(found.items(), key=lambda item: item[1]["environment"]["date"], reverse=True))


def gpu_results(folder: Path) -> dict[Path, dict]:
    """The results of `gpu/run.py`, the newest first."""
    found = {path: content for path in sorted(folder.glob("*.json")) if "families" in (content := report.parse(path))}
    newest = {path: max(f["environment"]["date"] for f in found[path]["families"].values()) for path in found}
    return dict(sorted(found.items(), key=lambda item: newest[item[0]], reverse=True))


def pages(root: Path) -> dict[Path, str]:
    """The pages, and the text that they should have."""
    folder, readme = root / "bench" / "results", root / "README.md"
    runs, text = run_results(folder), readme.read_text()
    if not runs:
        raise ValueError(f"{folder}: no results of bench/run.py")
    newest = next(iter(runs))
    text = replaced(text, short_table(runs[newest], newest.relative_to(root).as_posix()), readme, BEGIN, END)
    demos = [report.parse(path) for path in folder.glob("demo-*.json")]
    if demos:
        demo = max(demos, key=lambda content: content["environment"]["date"])
        text = replaced(text, demo_table(demo), readme, DEMO_BEGIN, DEMO_END)
    beside = [report.parse(path) for path in folder.glob("peers-*.json")]
    if beside:
        newest_peers = max(beside, key=lambda content: content["environment"]["date"])
        text = replaced(text, "\n".join(peers_table(newest_peers)), readme, PEERS_BEGIN, PEERS_END)
    gpus = gpu_results(folder)
    if gpus:
        rows = gpu.summary(next(iter(gpus.values())))
        text = replaced(text, "\n".join(rows), readme, GPU_BEGIN, GPU_END)

    def below(files: dict[Path, dict]) -> dict[str, dict]:
        return {f"../{path.relative_to(root).as_posix()}": results for path, results in files.items()}

    found = {readme: text, root / "docs" / "numbers.md": numbers_page(below(runs), below(gpus))}
    taken = folder / registers.RESULTS.name
    if taken.exists():
        found[root / "docs" / "registers.md"] = registers.page(report.parse(taken))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/pages.py", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    parser.add_argument("--root", type=Path, default=machine.ROOT, help="the source tree with the results and pages")
    options = parser.parse_args(arguments)
    try:
        fresh = pages(options.root)
    except (OSError, ValueError) as error:
        print(f"bench/pages.py: {error}", file=sys.stderr)
        return 1
    status = 0
    for path, text in fresh.items():
        if not options.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path}: not the numbers of bench/results; run `python bench/pages.py`", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())

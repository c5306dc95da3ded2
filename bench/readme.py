"""The README's tables of numbers, made from a results file of `run.py` or the demo's report.json, never typed.

python bench/readme.py bench/results/<cpu>.json README.md            writes the table between its two markers
python bench/readme.py bench/results/<cpu>.json README.md --check    exit status 1 if the README differs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import report
from baselines import COPY, FLEX, INT4, LINEAR, SDPA
from cases import BITMAP, BITMAP_GEMM, COMPRESS, EVERY, GROUP, INT4_GEMM, ZEROS

BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
DEMO_BEGIN, DEMO_END = "<!-- demo:begin -->", "<!-- demo:end -->"


def markdown(results: dict, source: str) -> str:
    """The text between the markers."""
    environment, machine = results["environment"], results["machine"]
    tables: dict[str, list[dict]] = {"attention": [], INT4_GEMM: [], BITMAP: []}
    table_of = {INT4_GEMM: INT4_GEMM, BITMAP: BITMAP, BITMAP_GEMM: BITMAP}
    for group in results["groups"]:
        tables[table_of.get(group["family"], "attention")].append(group)
    lines = "\n\n".join("\n".join(table(groups)) for groups in tables.values() if groups).splitlines()
    gemm = " and ".join(f"{rate:,.0f} GFLOP/s in {name}" for name, rate in machine["gemm_gflops"].items())
    bandwidths = [report.digits(machine[name]) for name in ("read_gbs", "copy_gbs")]
    state = " with uncommitted changes" if environment["uncommitted"] else ""
    busy = f" The machine was busy (load average {environment['load_average']})." if environment["busy"] else ""
    lines += [
        "",
        f"Medians of calls that took turns in one run, causal, batch 1, on {environment['cpu']}, "
        f"{environment['threads']} threads, tier {environment['tier']}, torch {environment['torch']}; "
        f"{environment['date'][:10]}, commit {environment['commit']}{state}.{busy} "
        f"The machine's own limits in the same run: matrix product {gemm}, read {bandwidths[0]} GB/s, copy "
        f"{bandwidths[1]} GB/s (read and written). GEMM is the matrix product's rate in the case's dtype, or the fp32 "
        f"rate if that is higher. {SDPA} is always dense attention; d is the share of the pairs attended. From "
        f"`{source}`; `make bench` measures again.",
    ]
    return "\n".join(lines)


def table(groups: list[dict]) -> list[str]:
    """A row a case, a column a shape."""
    if not groups:
        return []
    heads = list(dict.fromkeys(head(group) for group in groups))
    rows: dict[str, dict[str, str]] = {}
    for group in groups:
        for result in group["results"]:
            if shown(group, result):
                rows.setdefault(row_name(group, result), {})[head(group)] = cell(group, result)
    lines = [f"| {' | '.join(['', *heads])} |", f"|{'---|' * (len(heads) + 1)}"]
    return lines + [f"| {' | '.join([name, *(cells.get(h, '') for h in heads)])} |" for name, cells in rows.items()]


def head(group: dict) -> str:
    shape = group["shape"]
    if group["family"] == INT4_GEMM:
        return f"weight {shape['n']:,} × {shape['k']:,}, group {GROUP}"
    if group["family"] in (BITMAP, BITMAP_GEMM):
        return f"weight {shape['n']:,} × {shape['k']:,}, {100 * ZEROS:.0f} % zeros"
    return f"{shape['hq']} heads on {shape['hkv']} KV heads, D {shape['d']}"


def shown(group: dict, result: dict) -> bool:
    """bf16 in full; of fp32 the dense case alone. Left out are every block's second time, beside the index builders,
    and bitmap weights in lower tiers and, but for one row, with quantised values: the results file has them."""
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
    percent = result["percent"]
    for name, ratio in result.get("versus", {}).items():
        if name == SDPA:
            same = " at the same tier" if group["family"] == "tier" else ""
            parts.append(f"**{report.digits(ratio)}× SDPA**{same}")
        elif name == INT4:
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
    elif group["family"] in ("sparse_attention", INT4_GEMM, BITMAP_GEMM) and result["limit"] == "gemm":
        share = percent["best_gemm" if group["dtype"] == "bf16" else "gemm"]
        parts.append(f"{share:.0f} % of GEMM")
    for name, words in (("read", "read bandwidth"), ("copy", "copy bandwidth")):
        if name in percent:
            parts.append(f"{report.digits(result['gbs'])} GB/s, {percent[name]:.0f} % of {words}")
    return ", ".join(parts)


def demo_markdown(content: dict) -> str:
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


def replaced(text: str, table: str, path: str = "README", begin: str = BEGIN, end: str = END) -> str:
    """`text` with `table` between the markers, which must each stand there once, in order."""
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise ValueError(f"{path}: expected {marker} once, found it {text.count(marker)} times")
    head, rest = text.split(begin)
    if end not in rest:
        raise ValueError(f"{path}: expected {begin} before {end}")
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def updated(text: str, results: Path, readme: Path) -> str:
    content = report.parse(results)
    if isinstance(content, dict) and "conclusion" in content:
        return replaced(text, demo_markdown(content), str(readme), DEMO_BEGIN, DEMO_END)
    return replaced(text, markdown(report.load(results), source_name(results, readme)), str(readme))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/readme.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("readme", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    options = parser.parse_args(arguments)
    try:
        text = options.readme.read_text()
        fresh = updated(text, options.results, options.readme)
    except (OSError, ValueError) as error:
        print(f"bench/readme.py: {error}", file=sys.stderr)
        return 1
    if options.check and fresh != text:
        cure = f"python bench/readme.py {options.results} {options.readme}"
        print(f"{options.readme}: its numbers are not those of {options.results}; run `{cure}`", file=sys.stderr)
        return 1
    if not options.check:
        options.readme.write_text(fresh)
    return 0


def source_name(results: Path, readme: Path) -> str:
    """The results file as the README's reader finds it: relative to the README if it lies below."""
    try:
        return results.resolve().relative_to(readme.resolve().parent).as_posix()
    except ValueError:
        return results.name


if __name__ == "__main__":
    sys.exit(main())

"""The CPU kernels, their baselines and the machine's limits: ``python bench/run.py``.

The works of a group (a kernel, its baselines, its sparser forms) take turns, and their medians are compared. Works that
memory limits rotate over copies of their tensors, so that data come from memory. Every result is checked. The machine's
limits are measured before and after (limits.py). Lower instruction-set tiers run in processes of their own, in which
torch uses the same instruction set; some kernels also run in every tier, side by side. The results go to a JSON file;
`pages.py` makes the tables of README.md and docs/numbers.md from it.

The exit status is 1 if a result was wrong, if a kernel was faster than a limit that was measured again after it, if a
forced tier was more than 5 % faster than the tier that headstart chose, or if a process failed. A missed target is only
shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import cases
import limits
import machine
import report
from headstart import _library

ALL_FAMILIES = [*cases.FAMILIES, "tier"]
# The values of three variables that hold torch's own kernels, MKL and oneDNN to a tier's instructions.
TORCH_HELD_TO = {
    "generic": ("default", "SSE4_2", "SSE41"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512", "AVX512_CORE"),
}
# A tier's share of the tokens. The generic tier is about 10 times slower than the best.
TIER_TOKENS = {"generic": 1 / 8, "avx2": 1, "avx512": 1}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="sequence length (default 8192, with --quick 2048)")
    parser.add_argument("--quick", action="store_true", help="a minute instead of several; saves only with --output")
    parser.add_argument("--output", type=Path, help="results file (default bench/results/<cpu>.json)")
    parser.add_argument("--flex", action="store_true", help="also FlexAttention; compiling it takes minutes")
    parser.add_argument("--dtype", action="append", choices=list(machine.DTYPES), help="only this dtype; repeatable")
    parser.add_argument("--only", action="append", choices=ALL_FAMILIES, help="only this family; repeatable")
    parser.add_argument("--seconds", type=float, help="time for a group; a least number of rounds is always done")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--in-tier", choices=list(TORCH_HELD_TO), help=argparse.SUPPRESS)  # set by `measure_tier`
    options = parser.parse_args(arguments)
    for name in ("tokens", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    options.tokens = options.tokens or (2048 if options.quick else 8192)
    options.seconds = options.seconds if options.seconds is not None else (0.5 if options.quick else 6.0)
    options.min_rounds = 3 if options.quick else 5
    options.dtype = options.dtype or list(machine.DTYPES)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def measure_tier(tier: str, options: argparse.Namespace) -> list[dict]:
    """Raw groups of a lower tier, from a process in which headstart and torch are both held to it."""
    held = dict(zip(("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA"), TORCH_HELD_TO[tier]))
    environment = dict(os.environ, HEADSTART_ISA=tier, **held)
    tokens = max(64, int(options.tokens * TIER_TOKENS[tier]))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "groups.json"
        command = [sys.executable, __file__, "--in-tier", tier, "--tokens", str(tokens), "--output", str(output)]
        command += ["--seconds", str(options.seconds / 2), "--threads", str(torch.get_num_threads())]
        command += ["--quick"] if options.quick else []
        command += [part for dtype in options.dtype for part in ("--dtype", dtype)]
        subprocess.run(command, env=environment, check=True)
        return json.loads(output.read_text())


def inside_tier(options: argparse.Namespace) -> int:
    """The work of the process that `measure_tier` starts."""
    tier, aten = _library.cpu_tier(), torch.backends.cpu.get_cpu_capability()
    if tier != options.in_tier or aten.lower() != TORCH_HELD_TO[tier][0]:
        print(f"bench/run.py: asked for tier {options.in_tier}, got {tier}, and {aten} in torch", file=sys.stderr)
        return 1
    raw = [
        {**report.run_group(spec, seconds=options.seconds, min_rounds=3), "aten_capability": aten}
        for family in ("tier", cases.INT4_GEMM, cases.BITMAP, cases.BITMAP_GEMM)
        for spec in cases.specs(family, options.tokens, dtypes=options.dtype, tier=tier)
    ]
    options.output.write_text(json.dumps(raw))
    return 0


def raw_groups(options: argparse.Namespace, status, failures: list[str]):
    """Measures group after group. If the process of a tier fails, `failures` gets a line."""
    families = options.only or ALL_FAMILIES
    for family in (name for name in cases.FAMILIES if name in families):
        if family == cases.CHOICE and "HEADSTART_ISA" in os.environ:
            continue  # headstart did not choose the tier
        for spec in cases.specs(family, options.tokens, dtypes=options.dtype, flex=options.flex):
            status.update(spec.title)
            raw = report.run_group(spec, seconds=options.seconds, min_rounds=options.min_rounds)
            if report.slower_than_forced({"groups": [report.evaluate(raw, {"cache_bytes": 0, "measured": []})]}):
                status.update(f"{spec.title}, again")  # a disturbance of the machine rarely comes twice
                raw = report.run_group(spec, seconds=2 * options.seconds, min_rounds=2 * options.min_rounds)
            yield raw
    if "tier" not in families:
        return
    tiers = _library.cpu_tiers()
    for tier in reversed(tiers[: tiers.index(_library.cpu_tier())]):
        if tier in TORCH_HELD_TO:
            status.update(f"{tier} tier, in a process of its own")
            try:
                yield from measure_tier(tier, options)
            except subprocess.CalledProcessError as error:
                failures.append(f"{tier} tier: its process ended with status {error.returncode}")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if _library.cpu_tier() is None:
        print(f"bench/run.py: no CPU kernels: {_library.cpu.error}. Cure: {_library.cpu.cure}.", file=sys.stderr)
        return 1
    if options.in_tier:
        return inside_tier(options)
    console = report.console()
    environment = machine.environment()
    for line in report.environment_words(environment):
        console.print(line, style="yellow" if line.startswith("warning") else "", highlight=False, soft_wrap=True)
    if options.tokens != 8192:
        console.print("note: the targets are set for 8,192 tokens", highlight=False)
    if "HEADSTART_ISA" in os.environ:
        console.print("note: HEADSTART_ISA forces a tier, so the choice of unit is not compared", highlight=False)
    failures: list[str] = []
    with console.status("") as status:
        measured, groups = measure(options, status, failures)
    settings = {name: getattr(options, name) for name in ("tokens", "quick", "flex", "dtype", "seconds", "min_rounds")}
    results = {"schema": report.SCHEMA, "environment": environment, "settings": settings}
    results |= {"machine": {"cache_bytes": environment["cache_bytes"], "measured": measured}, "groups": groups}
    show(results, console)
    path = options.output
    if path is None and not options.quick:
        path = machine.RESULTS / f"{machine.slug(environment)}.json"
    if path is not None:
        machine.write_json(results, path)
        console.print(f"written to {path}; `python bench/pages.py` makes the tables", highlight=False, soft_wrap=True)
    failures += faults(results)
    for line in failures:
        print(f"bench/run.py: {line}", file=sys.stderr)
    return 1 if failures else 0


def measure(options: argparse.Namespace, status, failures: list[str]) -> tuple[list[dict], list[dict]]:
    """What `limits.measure` returned, and the groups, evaluated with the highest rates."""
    status.update("the machine's limits")
    measured, raws = [limits.measure(options.quick)], []
    known = {"cache_bytes": machine.cache_bytes(), "measured": measured}
    for raw in raw_groups(options, status, failures):
        if report.past_limits({"groups": [report.evaluate(raw, known)]}):  # the machine may be faster than before
            status.update(f"the machine's limits, after {raw['title']}")
            measured.append(limits.measure(options.quick, f"after {raw['title']}"))
        raws.append(raw)
    status.update("the machine's limits, again")
    measured.append(limits.measure(options.quick, "after the run"))
    return measured, [report.evaluate(raw, known) for raw in raws]


def show(results: dict, console) -> None:
    for group in results["groups"]:
        console.print()
        console.print(report.table(group))
    console.print()
    console.print(report.LEGEND, style="dim", highlight=False)
    for line in report.limit_words(results["machine"]["measured"]):
        console.print(line, highlight=False, soft_wrap=True)
    met, missed, unknown = report.targets_met(results)
    console.print(f"targets: {met} met, {missed} missed, {unknown} not known", highlight=False)


def faults(results: dict) -> list[str]:
    """What makes a run fail; a missed target does not."""
    past = [line for lines in report.past_limits(results).values() for line in lines]
    return [
        *(f"wrong result: {line}" for line in report.wrong_results(results)),
        *(f"faster than the machine's limit, which cannot be: {line}" for line in past),
        *(f"a forced tier is faster: {line}" for line in report.slower_than_forced(results)),
    ]


if __name__ == "__main__":
    sys.exit(main())

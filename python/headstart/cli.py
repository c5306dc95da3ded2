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
    help="headstart makes LLM inference faster by work that it does ahead of time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
contexts = typer.Typer(help="Read a text once, then ask many questions about it.", no_args_is_help=True)
demos = typer.Typer(invoke_without_command=True)
app.add_typer(contexts, name="context")
app.add_typer(demos, name="demo")
SOURCE_TREE = Path(__file__).resolve().parents[2]


Report = Annotated[Path, typer.Option(help="The folder for report.json and report.png.")]
Threads = Annotated[int | None, typer.Option(min=1, help="The number of CPU threads. Default: torch decides.")]
Seed = Annotated[int, typer.Option(help="The seed of the clusters and of random weights.")]
REPORT = Path("demo-report")


@demos.callback()
def demo(
    command: typer.Context,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="The number of tokens to read. Default: 8192, or 4096 on a slow CPU.")
    ] = None,
    report: Report = REPORT,
    pattern: Annotated[list[str] | None, typer.Option(help="Run this pattern. You can give it several times.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Run every pattern, and read a second text.")] = False,
    threads: Threads = None,
) -> None:
    """Show a real model with headstart and without it. Without a subcommand, SmolLM2-135M reads a long text."""
    if command.invoked_subcommand is not None:
        return
    if pattern and every:
        raise ValueError("demo: all: expected one of --all and --pattern, got both")
    _set_threads(threads)
    from headstart.commands.demo import PATTERNS, run

    run(tokens, report, patterns=PATTERNS if every else pattern)


@demos.command("context")
def demo_context(
    tokens: Annotated[int | None, typer.Option(min=1, help="The number of tokens in the text.")] = None,
    report: Report = REPORT,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Ask many questions about one long text. Compare a stored context with transformers and its cache."""
    _set_threads(threads)
    from headstart.commands.demo.context import run

    run(report=report, seed=seed, **_given(tokens=tokens))


@demos.command("offload")
def demo_offload(
    tokens: Annotated[int | None, typer.Option(min=1, help="The number of tokens that the model writes.")] = None,
    report: Report = REPORT,
    threads: Threads = None,
    seed: Seed = 0,
    size: Annotated[str | None, typer.Option(help="The model: smollm2, or 1b, which has random weights.")] = None,
    budget: Annotated[
        str | None, typer.Option(help='The memory for weights, such as "600MB". Default: 30 % of their size.')
    ] = None,
    files: Annotated[Path | None, typer.Option(help="A folder that keeps the models for the next run.")] = None,
) -> None:
    """Run a model in less memory than its weights need. Compare this with accelerate's disk offload."""
    _set_threads(threads)
    from headstart.commands.demo.offload import run

    run(report=report, seed=seed, **_given(tokens=tokens, size=size, budget=budget, files=files))


def _given(**options: object) -> dict[str, object]:
    """The options that were given; the others keep the defaults of the function that takes them."""
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, or smollm2.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The JSON file to write the plan to.")] = Path(
        "plan.json"
    ),
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A UTF-8 file to search on. You can give several. Default: texts that Python brings."),
    ] = None,
    max_error: Annotated[float | None, typer.Option(help="Find the cheapest plan within this error.")] = None,
    density: Annotated[float | None, typer.Option(help="Find the most accurate plan within this density.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="The number of tokens in a window. Default: 8192, or what the model and the texts allow."),
    ] = None,
    windows: Annotated[int, typer.Option(help="The number of windows in each text.")] = 1,
    seed: Annotated[int, typer.Option(help="The seed that places the windows.")] = 0,
) -> None:
    """Find the best sparse pattern of each attention head and write the plan. An interrupted search continues."""
    from headstart.commands.search import search as run

    budget = {"max_error": max_error, "density": density}
    run(model, output, texts=text or (), tokens=tokens, windows=windows, seed=seed, **budget)


@app.command()
def inspect(
    plan: Annotated[Path | None, typer.Argument(help="The JSON file of a prefill plan.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that reads a text: a directory, a .gguf file, or smollm2.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 file to read. Default: Python's help texts.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="The number of tokens to read. Default: 4096, or the whole text.")
    ] = None,
    prefill: Annotated[
        str | None, typer.Option(help="The pattern of all heads, where no plan is given. Default: adaptive.")
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="Draw the blocks of this head, LAYER.HEAD. You can give several.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder for the page and the picture.")] = Path(
        "inspect-report"
    ),
) -> None:
    """Show the pattern and the density of each attention head, and the blocks that it attends."""
    from headstart.commands.inspect import run

    run(plan, model=model, text=text, tokens=tokens, prefill=prefill, heads=head or (), output=output)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, or smollm2.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    group_size: Annotated[
        int, typer.Option(help="How many weights share a scale: a multiple of 32, or -1 for a row.")
    ] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Use no zero points.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="The dtype of scales and of other weights: bfloat16, float16, float32.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="A layer, or a pattern of layers, to leave as it is. You can give several.")
    ] = None,
    output_bits: Annotated[
        int | None, typer.Option(help="4 or 8: pack the output layer, also if it is tied to the embedding.")
    ] = None,
) -> None:
    """Write a model with 4-bit linear layers, for from_pretrained and headstart.load. It reads no texts."""
    from headstart.commands.quantize import quantize as run

    options = {"symmetric": symmetric, "dtype": dtype, "exclude": exclude or (), "output_bits": output_bits}
    run(model, output, group_size=group_size, **options)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, or smollm2.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    sparsity: Annotated[float, typer.Option(help="The share of zeros in each row of the linear layers.")] = 0.5,
    method: Annotated[
        str, typer.Option(help="How weights are chosen: magnitude, or wanda, which reads texts.")
    ] = "wanda",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A UTF-8 file. The loss is measured on its beginning; wanda reads the rest. You can give several."
        ),
    ] = None,
    values: Annotated[
        str, typer.Option(help="How the other weights are stored: same (unchanged), int8 or int4.")
    ] = "same",
    group_size: Annotated[
        int, typer.Option(help="How many columns share a scale in int8 and int4; -1 for a row.")
    ] = 128,
    tokens: Annotated[
        int | None,
        typer.Option(help="The number of tokens in a window. Default: 2048, or what the model and the texts allow."),
    ] = None,
    windows: Annotated[int, typer.Option(help="The number of windows that wanda reads, over all texts.")] = 8,
) -> None:
    """Set weights of the linear layers to zero and write them as bitmaps. Report the loss before and after."""
    from headstart.commands.prune import prune as run

    options = {"values": values, "group_size": group_size, "tokens": tokens, "windows": windows}
    run(model, output, sparsity=sparsity, method=method, texts=text or (), **options)


@contexts.command("build")
def build_context(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, or smollm2.")],
    text: Annotated[Path, typer.Argument(help="A UTF-8 file to read.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")] = Path("context"),
    tokens: Annotated[
        int | None, typer.Option(help="The number of tokens to read. Default: as many as the model can take.")
    ] = None,
    clusters: Annotated[float, typer.Option(help="The number of clusters, as a share of the keys.")] = 0.05,
    parents: Annotated[
        float | None, typer.Option(help="The number of parent clusters, as a share of the keys. Default: no parents.")
    ] = None,
    prefill: Annotated[str, typer.Option(help="The attention pattern that reads the text.")] = "adaptive",
    seed: Annotated[int, typer.Option(help="The seed of the clustering.")] = 0,
) -> None:
    """Read a text with a model, cluster its keys, and write the context that questions start from."""
    from headstart.commands.context import build

    options = {"clusters": clusters, "parents": parents, "prefill": prefill, "seed": seed}
    build(model, text, output, tokens=tokens, **options)


@app.command()
def tune(
    show: Annotated[bool, typer.Option("--show", help="Print the costs in use, and measure nothing.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="The number of CPU threads. Default: torch decides.")
    ] = None,
) -> None:
    """Time attention on this CPU. Patched models then take the path that is fastest here."""
    from headstart.commands.tune import run

    _set_threads(threads)
    run(show)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Compare the operators with their baselines. This needs the source tree; options go to bench/run.py."""
    script = SOURCE_TREE / "bench" / "run.py"
    if not script.exists():
        raise FileNotFoundError(f"{script} does not exist; the benchmarks run from a source tree: `make bench`")
    raise typer.Exit(subprocess.run([sys.executable, str(script), *context.args]).returncode)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Only check that every CUDA kernel can run; fail and say why if not.")
    ] = False,
) -> None:
    """Report what runs here, on which kernels, and why something does not run."""
    from headstart_launcher import load

    raise typer.Exit(load("doctor").main(["--json"] * json + ["--gpu"] * gpu))


def _set_threads(threads: int | None) -> None:
    """Changes the whole process. Only commands may do this, because the process belongs to them."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. An error that is no bug of headstart ends in one line, not in a traceback."""
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

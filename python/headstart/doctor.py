"""`headstart doctor` reports what runs on this machine, with which kernels, and how to repair what does not run.

The report must work even if `import headstart` fails or kills the process. So this file imports only the standard
library, and examines the package in a second Python process (`probe`). If that process fails, the report says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
REQUIRED = ("torch", "numpy", "safetensors", "rich", "typer")
PACKAGES = (*REQUIRED, "triton", "transformers", "accelerate", "gguf", "matplotlib")
RELEVANT_FLAGS = (
    "sse4_2 avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx512_fp16 avx512_vbmi2 avx_vnni "
    "amx_tile amx_bf16 amx_int8 asimd asimddp bf16 i8mm sve sve2"
).split()
PROBE_SECONDS = 300
MARK = "headstart-probe:"


# --- the second process --------------------------------------------------------------------------------------------


def probe() -> dict:
    """Imports torch, then headstart, and returns what it finds. It runs in a separate process."""
    found: dict = {}
    try:
        import torch
    except Exception as error:
        return {"error": f"import torch: {_words(error)}", "cure": "reinstall torch: `pip install 'torch>=2.11'`"}
    found["torch"] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    try:
        import headstart
        from headstart import _library
    except Exception as error:
        cure = "reinstall it: `pip install --no-build-isolation .` in the source tree, or `make build`"
        return found | {"error": f"import headstart: {_words(error)}", "cure": cure}
    found["headstart"] = {"version": headstart.__version__, "path": str(Path(headstart.__file__).parent)}
    found["tiers"], found["tier"] = _library.cpu_tiers(), _library.cpu_tier()
    found["unit_rates"] = _library.cpu_unit_rates()
    found["libraries"] = {
        library.device: {
            "path": str(library.path),
            "loaded": library.handle is not None,
            "error": library.error,
            "cure": library.cure if library.error else None,
        }
        for library in (_library.cpu, _library.cuda)
    }
    prefix = f"{_library.NAMESPACE}::"
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix))
    found["operators"] = {
        name: {device: _library.served_by(name, device) for device in ("CPU", "CUDA")}
        for name in (full.removeprefix(prefix) for full in names)
    }
    found["missing_gpu_kernels"] = _library.missing_gpu_kernels()
    return found


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _run_probe() -> dict:
    environment = dict(os.environ)
    if importlib.util.find_spec("headstart") is None:  # run by path in a source tree that is not installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(PACKAGE.parent)]))
    # With -c and not with the file, because then Python would put this folder first on its path, and this folder has a
    # triton/.
    script = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__probe__')"
    command = [sys.executable, "-c", script]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"import headstart: not done after {PROBE_SECONDS} s", "cure": "look at `py-spy dump` of it"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        cure = "run again with HEADSTART_ISA=generic" if name == "SIGILL" else "rebuild: `make clean build`"
        return {"error": f"import headstart: the process died of {name}", "cure": f"{cure}; please report it"}
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"error": f"import headstart: {last}", "cure": "run `python -c 'import headstart'` to see it all"}


# --- the report ----------------------------------------------------------------------------------------------------


def examine() -> dict:
    """The whole report as plain data."""
    found = _run_probe()
    installed = {name: _version(name) for name in PACKAGES}
    requested = os.environ.get("HEADSTART_ISA")
    tiers = found.get("tiers", [])
    problems = []
    if "error" in found:
        problems.append({"cause": found["error"], "cure": found["cure"]})
    missing = [name for name in REQUIRED if installed[name] is None and name not in found]
    if missing:
        problems.append({"cause": f"not installed: {', '.join(missing)}", "cure": f"pip install {' '.join(missing)}"})
    cpu_library = found.get("libraries", {}).get("cpu", {})
    if cpu_library.get("error"):
        problems.append({"cause": f"no CPU kernels: {cpu_library['error']}", "cure": cpu_library["cure"]})
    notes = []
    if requested and tiers and requested not in tiers:
        notes.append(
            {"cause": f"HEADSTART_ISA={requested} is not a tier of this CPU", "cure": f"one of {', '.join(tiers)}"}
        )
    cuda_library = found.get("libraries", {}).get("cuda", {})
    if found.get("torch", {}).get("gpus") and cuda_library.get("error"):
        notes.append({"cause": f"no CUDA C++ kernels: {cuda_library['error']}", "cure": cuda_library["cure"]})
    model, flags = _cpu()
    return {
        "healthy": not problems,
        "problems": problems,
        "notes": notes,
        "headstart": found.get("headstart", {"version": _version("headstart"), "path": str(PACKAGE)}),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "cpu": {
            "model": model,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "flags": flags,
            "tiers": tiers,
            "tier": found.get("tier"),
            "unit_rates": found.get("unit_rates", {}),
            "HEADSTART_ISA": requested,
        },
        "torch": found.get("torch"),
        "packages": installed,
        "libraries": found.get("libraries", {}),
        "operators": found.get("operators", {}),
        "missing_gpu_kernels": found.get("missing_gpu_kernels")
        or ([found["error"], found["cure"]] if "error" in found else None),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str, list[str]]:
    """The CPU's name, and those of its features that matter to headstart's kernels, according to Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", platform.machine()), [flag for flag in RELEVANT_FLAGS if flag in flags]


def lines(report: dict) -> list[tuple[str, str]]:
    """The lines of the report, as pairs of a style ("title", "good", "bad" or "plain") and a text."""
    out: list[tuple[str, str]] = []

    def row(name: str, value: object, style: str = "plain") -> None:
        out.append((style, f"  {name:<14} {value}"))

    def title(text: str) -> None:
        out.append(("title", text))

    cpu, torch = report["cpu"], report["torch"]
    title("headstart")
    row("version", report["headstart"]["version"] or "not installed")
    row("path", report["headstart"]["path"])
    row("python", f"{report['python']['version']} ({report['python']['executable']})")
    row("platform", report["platform"])

    title("CPU")
    row("model", f"{cpu['model']}, {cpu['cores']} cores")
    row("features", " ".join(cpu["flags"]) or "unknown")
    row("tiers found", " ".join(cpu["tiers"]) or "none")
    row("tier in use", f"{cpu['tier'] or 'none'}{' (HEADSTART_ISA)' if cpu['HEADSTART_ISA'] else ''}")
    rates = [f"{name} ({unit}) {rate:,.0f}" for name, (unit, rate) in cpu["unit_rates"].items()]
    row("unit rates", f"{', '.join(rates)}: 1e9 operations a second, one core" if rates else "unknown")

    title("packages")
    for name, version in report["packages"].items():
        row(name, version or ("missing" if name in REQUIRED else "not installed"))
    if torch:
        title("torch")
        row("version", f"{torch['version']}, {torch['threads']} threads, {torch['cpu_capability']}")
        row("CUDA", torch["cuda"] or "torch is built without it")
        row("GPUs", ", ".join(torch["gpus"]) or "none")

    if report["libraries"]:
        title("kernel libraries")
        for name, library in report["libraries"].items():
            row(f"_{name}.so", "loaded" if library["loaded"] else f"not loaded: {library['error']}")
    if report["operators"]:
        title("operators served by")
        width = max(len(name) for name in report["operators"]) + 2
        out.append(("plain", f"  {'':<{width}}{'CPU':<12}CUDA"))
        for name, served in report["operators"].items():
            out.append(("plain", f"  {name:<{width}}{served['CPU']:<12}{served['CUDA']}"))
        out.append(("plain", "  (torch: the plain-torch reference, correct and slow)"))

    for kind, style in (("problems", "bad"), ("notes", "title")):
        if report[kind]:
            title(kind)
        for finding in report[kind]:
            row("cause", finding["cause"], style)
            row("cure", finding["cure"])
    out.append(("good", "healthy") if report["healthy"] else ("bad", "not healthy"))
    return out


def show(report: dict) -> None:
    """Prints the report. It is in colour if rich can be imported and the output is a terminal."""
    try:
        from rich.console import Console
        from rich.text import Text

        console = Console()
    except Exception:
        for _, line in lines(report):
            print(line)
        return
    styles = {"title": "bold", "good": "bold green", "bad": "bold red", "plain": ""}
    for style, line in lines(report):
        console.print(Text(line, style=styles[style]), soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Prints the report. Returns 0 if the package and its CPU kernels work, else 1.

    With ``--gpu``, it prints nothing and returns 0 if every CUDA kernel can run, else it says why not and returns 1.
    """
    parser = argparse.ArgumentParser(prog="headstart doctor", description="What runs here, on which kernels, and why.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--gpu", action="store_true", help="print nothing; fail, and say why, unless every CUDA kernel is ready to run"
    )
    options = parser.parse_args(arguments)
    report = examine()
    if options.gpu:
        if report["missing_gpu_kernels"] is None:
            return 0
        cause, cure = report["missing_gpu_kernels"]
        print(f"headstart: the CUDA kernels cannot run here. Cause: {cause}. Cure: {cure}.", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0 if report["healthy"] else 1


if __name__ == "__probe__":
    print(MARK + json.dumps(probe()), flush=True)
elif __name__ == "__main__":
    sys.path.pop(0)  # removes this folder, because its triton/ would hide the real one
    sys.exit(main())

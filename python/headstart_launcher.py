"""The `headstart` command.

It stands outside the package and loads the files it needs by path, so that `headstart --help` does not wait for
torch, and `headstart doctor` answers where `import headstart` fails.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_package = Path(__file__).parent / "headstart"


def load(name: str) -> ModuleType:
    """One file of the package as a module of its own, without importing the package."""
    spec = importlib.util.spec_from_file_location(f"_headstart_{name}", _package / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["doctor"]:  # no typer needed
        sys.exit(load("doctor").main(arguments[1:]))
    try:
        cli = load("cli")
    except ImportError as error:
        sys.exit(f"headstart: {error}. `headstart doctor` tells what is missing.")
    sys.exit(cli.main(arguments))


if __name__ == "__main__":
    main()

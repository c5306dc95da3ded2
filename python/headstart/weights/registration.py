"""Makes `AutoModelForCausalLM.from_pretrained` open headstart's artifacts, whichever package is imported first.

transformers keeps its quantisation methods in two dictionaries of `transformers.quantizers.auto`, a module that it
imports late. If that module is there, ours is added at once. If not, a finder on `sys.meta_path` waits for it and adds
ours when it has been executed; so `import headstart` does not import transformers, and a program that never loads a
model pays nothing. The finder finds nothing by itself, and takes itself off the list when it has done its work.
"""

from __future__ import annotations

import importlib.abc
import sys
import warnings

MODULE = "transformers.quantizers.auto"


def install() -> None:
    """Registers now, or when transformers gets so far. May be called again, as a reload does."""
    for finder in [f for f in sys.meta_path if getattr(f, "headstart", False)]:
        sys.meta_path.remove(finder)
    if hasattr(sys.modules.get(MODULE), "register_quantizer"):  # else it is missing, or being imported right now
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    headstart = True  # how a reloaded headstart knows the finder of the one before

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _register()

            spec.loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    try:
        from . import quantizer  # noqa: F401  registers itself, also where its own import was what led here
    except ImportError as error:  # never break an import of transformers
        warnings.warn(f"headstart's packed models cannot be opened by from_pretrained: {error}", stacklevel=2)

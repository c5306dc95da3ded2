"""A view of a model has its own modules, hooks and configs, and shares the weights of the model.

A call may have to change what a model does, for example its attention, or add hooks. It makes the change in a view. The
model itself stays unchanged, so other threads may run it, or make views of it, at the same time.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from types import MethodType
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig

Model = TypeVar("Model", bound=nn.Module)


def view_of(model: Model) -> Model:
    """A model that computes what `model` computes, and shares its parameters and buffers.

    The modules of both have the same dictionaries of parameters and buffers. If a weight is replaced in the model, as
    happens with streamed weights, the view has the new one too. A hook or a forward that is a closure over a module of
    the model still uses the model's module.
    """
    copies: dict[int, Any] = {id(module): object.__new__(type(module)) for module in model.modules()}

    def own(x: Any) -> Any:
        if id(x) in copies:
            return copies[id(x)]
        if isinstance(x, PreTrainedConfig):
            copies[id(x)] = made = object.__new__(type(x))
            vars(made).update((name, own(value)) for name, value in vars(x).items())
            return made
        if type(x) in (dict, OrderedDict):
            copies[id(x)] = made = type(x)()
            made.update((key, own(value)) for key, value in x.items())
            return made
        if type(x) is list:
            copies[id(x)] = made = []
            made.extend(map(own, x))
            return made
        if type(x) is tuple:
            return tuple(map(own, x))
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*map(own, x))
        if type(x) is functools.partial:
            made = functools.partial(own(x.func), *map(own, x.args), **own(x.keywords))
            vars(made).update(vars(x))
            return made
        if type(x) is MethodType and id(x.__self__) in copies:
            return MethodType(x.__func__, own(x.__self__))
        return x

    for module in model.modules():
        shared = {name: vars(module)[name] for name in ("_parameters", "_buffers")}
        rest = {name: own(value) for name, value in vars(module).items() if name not in shared}
        vars(copies[id(module)]).update(rest | shared)
    return copies[id(model)]

"""What a config.json says about headstart's packed layers: its ``quantization_config``, with "headstart" as method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._expect import checker
from .bitmap_linear import BitmapLinear
from .int4_linear import Int4Linear
from .packed_linear import Option, PackedLinear, packed_layers

METHOD, VERSION = "headstart", 1
KINDS: dict[str, type[PackedLinear]] = {kind.WEIGHTS: kind for kind in (Int4Linear, BitmapLinear)}
PLAIN = "plain"  # no packed layers: a model in the layout of `convert.py`
_expect = checker("config.json: quantization_config")


def _options(weights: str) -> Mapping[str, Option]:
    return {} if weights == PLAIN else KINDS[weights].OPTIONS


def _defaults(weights: str) -> dict[str, Any]:
    return {key: option.default for key, option in _options(weights).items() if not option.own}


class HeadstartConfig(QuantizationConfigMixin):
    """Options that all packed layers share, and under the layers' names what is different there.

    Args:
        weights: the kind of the layers, "int4" or "bitmap", or "plain" if there are none.
        version: 1.
        modules: the packed layers by their names in the model, each with its own options.
        options: as `Int4Linear.OPTIONS` or `BitmapLinear.OPTIONS` lists them; a dtype is a string.

    Raises:
        ValueError: naming the field.
    """

    def __init__(
        self,
        weights: str = Int4Linear.WEIGHTS,
        version: int = VERSION,
        modules: dict[str, dict[str, Any]] | None = None,
        quant_method: str = METHOD,
        **options,
    ):
        kinds = (*KINDS, PLAIN)
        _expect(quant_method == METHOD, "quant_method", repr(METHOD), quant_method)
        _expect(weights in kinds, "weights", f"one of {', '.join(map(repr, kinds))}", weights)
        _expect(version == VERSION, "version", f"{VERSION} (a newer headstart may read it)", version)
        known, shared = _options(weights), _defaults(weights)
        odd = next((key for key in options if key not in shared), None)
        _expect(odd is None, str(odd), "no such field", options.get(odd))
        modules = {} if modules is None else modules
        _expect(isinstance(modules, dict), "modules", "an object", modules)
        _expect(weights != PLAIN or not modules, "modules", "none, as weights is 'plain'", modules)
        self.quant_method, self.weights, self.version, self.modules = METHOD, weights, version, modules
        vars(self).update(shared | options)
        for key, value in (shared | options).items():
            _expect(known[key].accepts(value), key, known[key].expected, value)
        for name, own in modules.items():
            where = f"modules: {name}"
            _expect(isinstance(own, dict), where, "an object", own)
            odd = next((key for key in own if key not in known), None)
            _expect(odd is None, where, f"only {', '.join(known)}", odd)
            for key, option in known.items():
                if option.own:
                    _expect(key in own, f"{where}: {key}", "a number", None)
            for key, value in own.items():
                _expect(known[key].accepts(value), f"{where}: {key}", known[key].expected, value)

    def options(self, name: str) -> dict[str, Any]:
        """All options of a layer."""
        return {key: getattr(self, key) for key in _defaults(self.weights)} | self.modules[name]

    @classmethod
    def of(cls, model: nn.Module) -> HeadstartConfig:
        """What describes the packed layers of a model."""
        layers = packed_layers(model)
        kinds = sorted({layer.WEIGHTS for layer in layers.values()})
        if len(kinds) > 1:
            raise ValueError(f"{type(model).__name__}: expected packed layers of one kind, got {' and '.join(kinds)}")
        kind = kinds[0] if kinds else Int4Linear.WEIGHTS
        return cls.describing(kind, {name: layer.options() for name, layer in layers.items()})

    @classmethod
    def describing(cls, weights: str, found: Mapping[str, dict[str, Any]]) -> HeadstartConfig:
        """From the kind and the options of all layers: the commonest values are written once."""
        shared = _defaults(weights)
        full = {name: shared | options for name, options in found.items()}
        tuples = Counter(tuple(options[key] for key in shared) for options in full.values())
        common = dict(zip(shared, tuples.most_common(1)[0][0])) if full else shared
        modules = {
            name: {key: value for key, value in options.items() if key not in common or value != common[key]}
            for name, options in full.items()
        }
        return cls(weights, modules=modules, **common)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

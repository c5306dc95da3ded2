"""GPTQ checkpoints in 4 bits, both versions, with and without act-order: Frantar et al., arXiv 2210.17323."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial

from ...ops.int4_gemm import Int4Weight
from .packed import Int4Source, Read


class Gptq(Int4Source):
    METHOD = "gptq"
    FIELDS = ("qweight", "qzeros", "scales", "g_idx")
    OPTIONAL = ("g_idx",)
    MARKS = {"qweight": "AWQ or GPTQ"}

    def check(self) -> None:
        get, expect = self.settings.get, self.expect
        self._version = {"gptq": 1, "gptq_v2": 2}.get(get("checkpoint_format"))
        cure = (
            "'gptq' (zero points stored minus one: AutoGPTQ, and most files without this field) or 'gptq_v2' (stored "
            'as they are); write the one that made the file, such as "checkpoint_format": "gptq", into '
            f"{self.checkpoint.settings.name}"
        )
        expect(self._version is not None, "checkpoint_format", cure, get("checkpoint_format"))
        expect(get("pack_dtype", "int32") == "int32", "pack_dtype", "'int32'", get("pack_dtype"))
        self._rules = get("dynamic") or {}
        expect(isinstance(self._rules, dict), "dynamic", "an object of patterns", self._rules)

    def plan(self, layer: str, fields: Collection[str]) -> Read:
        options, where = self.settings, ""
        for pattern, changes in self._rules.items():  # GPTQModel takes the first that matches; "-:" leaves layers plain
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), layer):
                good = not pattern.startswith("-:")
                self.expect(good, f"dynamic: {pattern}", "a pattern of plain layers", f"{layer}, which is quantised")
                options, where = {**options, **changes}, f"dynamic: {pattern}: "
                break
        self.expect(options.get("bits") == 4, f"{where}bits", "4", options.get("bits"))
        self.expect_group_size(f"{where}group_size", options.get("group_size"))
        return partial(_read, options["group_size"], self._version)


def _read(group_size: int, version: int, tensors) -> Int4Weight:
    return Int4Weight.from_gptq(**tensors, group_size=group_size, version=version)

"""AWQ checkpoints in 4 bits, in the layout "gemm" (AutoAWQ): Lin et al., arXiv 2306.00978."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from ...ops.int4_gemm import Int4Weight
from .packed import Int4Source, Read


class Awq(Int4Source):
    METHOD = "awq"
    FIELDS = ("qweight", "qzeros", "scales")

    def check(self) -> None:
        get, expect = self.settings.get, self.expect
        bits, self._group_size = get("bits", get("w_bit")), get("group_size", get("q_group_size"))
        version = next((get(key) for key in ("version", "format", "checkpoint_format") if get(key)), None)
        if get("backend") == "llm-awq":
            version = "llm-awq"
        expect(bits == 4, "bits", "4", bits)
        self.expect_group_size("group_size", self._group_size)
        cure = '\'gemm\' (convert it with AutoAWQ, or write "version": "gemm" if its qweight is [in, out / 8])'
        expect(str(version).lower() == "gemm", "version", cure, version)
        expect(get("zero_point", True) is True, "zero_point", "true", get("zero_point"))

    def plan(self, layer: str, fields: Collection[str]) -> Read:
        return partial(_read, self._group_size)


def _read(group_size: int, tensors) -> Int4Weight:
    return Int4Weight.from_awq(**tensors, group_size=group_size)

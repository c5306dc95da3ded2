"""The engine: headstart's operators under an existing Hugging Face model."""

from ..attention.patterns import HeadPattern
from ..attention.plan import PrefillPlan
from .bitmap_linear import BitmapLinear
from .int4_linear import Int4Linear
from .load import load
from .patch import patch, unpatch

__all__ = ["BitmapLinear", "HeadPattern", "Int4Linear", "PrefillPlan", "load", "patch", "unpatch"]

"""The engine: headstart's operators under an existing Hugging Face model."""

from ..attention.patterns import HeadPattern
from ..attention.plan import PrefillPlan
from .patch import patch, unpatch

__all__ = ["HeadPattern", "PrefillPlan", "patch", "unpatch"]

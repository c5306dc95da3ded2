"""The engine: headstart's operators under an existing Hugging Face model."""

from ..offline.prefill_plan import HeadPattern, PrefillPlan
from .patch import patch, unpatch

__all__ = ["HeadPattern", "PrefillPlan", "patch", "unpatch"]

"""The engine: headstart's operators under an existing Hugging Face model."""

from .patch import patch, unpatch
from .plan import HeadPattern, PrefillPlan

__all__ = ["HeadPattern", "PrefillPlan", "patch", "unpatch"]

"""Patching diffusers pipelines."""

from .patching import Patch, patch, patched, status, unpatch
from .status import PromptStatus, Status

__all__ = ["Patch", "PromptStatus", "Status", "patch", "patched", "status", "unpatch"]

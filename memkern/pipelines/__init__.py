"""Patching diffusers pipelines."""

from .instance import Patch
from .patching import patch, patched, status, unpatch
from .probe import Probe, probe
from .status import PromptStatus, Status

__all__ = ["Patch", "Probe", "PromptStatus", "Status", "patch", "patched", "probe", "status", "unpatch"]

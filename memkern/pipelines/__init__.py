"""Patching diffusers pipelines."""

from .instance import Patch
from .patching import patch, patched, status, unpatch
from .probe import probe
from .record import Probe
from .report import Support
from .report import report as support
from .status import PromptStatus, Status

__all__ = [
    "Patch",
    "Probe",
    "PromptStatus",
    "Status",
    "Support",
    "patch",
    "patched",
    "probe",
    "status",
    "support",
    "unpatch",
]

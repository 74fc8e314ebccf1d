"""Patching diffusers pipelines."""

from .patch import Patch
from .patching import patch, patched, status, unpatch, using
from .probe import Probe, probe
from .session import Counts, Record
from .status import PromptStatus, Status
from .support import Support, support

__all__ = [
    "Counts",
    "Patch",
    "Probe",
    "PromptStatus",
    "Record",
    "Status",
    "Support",
    "patch",
    "patched",
    "probe",
    "status",
    "support",
    "unpatch",
    "using",
]

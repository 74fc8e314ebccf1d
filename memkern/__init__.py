"""memkern: stops Stable Diffusion from returning its training images.

    import memkern
    memkern.patch(pipe)

The method is that of Kim & No, "Memorization in Stable Diffusion is unexpectedly driven by CLIP embeddings"
(arXiv 2605.02908). Data flows one way: ids → roles → policy → plan → embeddings → K/V → image.
"""

from typing import TYPE_CHECKING, Any

from . import ops
from .embeddings import apply_policy
from .errors import UnmitigatedError, UnmitigatedWarning
from .info import info
from .pipelines import Counts, Patch, Probe, Record, Support, patch, patched, probe, status, support, unpatch, using
from .plan import Plan, lower
from .policy import Edit, Policy
from .presets import PRESETS
from .roles import Role, token_roles
from .version import __version__

if TYPE_CHECKING:
    from .benchmark import bench

__all__ = [
    "PRESETS",
    "Counts",
    "Edit",
    "Patch",
    "Plan",
    "Policy",
    "Probe",
    "Record",
    "Role",
    "Support",
    "UnmitigatedError",
    "UnmitigatedWarning",
    "__version__",
    "apply_policy",
    "bench",
    "info",
    "lower",
    "ops",
    "patch",
    "patched",
    "probe",
    "status",
    "support",
    "token_roles",
    "unpatch",
    "using",
]


def __getattr__(name: str) -> Any:
    """`bench`, imported on first use."""
    if name == "bench":
        from .benchmark import bench

        return bench
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""memkern: stops Stable Diffusion from returning its training images.

    import memkern
    memkern.patch(pipe)

The method is that of Kim & No, "Memorization in Stable Diffusion is unexpectedly driven by CLIP embeddings"
(arXiv 2605.02908). Data flows one way: ids → roles → policy → plan → embeddings → K/V → image.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import ops
from .embeddings import apply_policy
from .errors import UnmitigatedError, UnmitigatedWarning
from .info import info
from .plan import Plan, lower
from .policy import Edit, Policy
from .presets import PRESETS
from .roles import Role, token_roles
from .version import __version__

if TYPE_CHECKING:
    from .benchmark import bench
    from .pipelines.patch import Patch
    from .pipelines.patching import patch, patched, status, unpatch, using
    from .pipelines.probe.probe import probe
    from .pipelines.probe.record import Probe
    from .pipelines.session import Counts, Record
    from .pipelines.support import Support, support

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


_PIPELINES = "Counts Patch Probe Record Support patch patched probe status support unpatch using".split()
_LATER = {"bench": ".benchmark"} | dict.fromkeys(_PIPELINES, ".pipelines")


def __getattr__(name: str) -> Any:
    """What is imported on first use: diffusers and transformers take seconds, and operators do without them."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_LATER[name], __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

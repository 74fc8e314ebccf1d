"""Which implementation of the operators runs, and why.

`cpp` is the compiled CPU library, `torch` the reference for any device. `auto` takes the first that can run
and keeps the reasons against the others for `memkern.info()`; a named backend that cannot run raises.
"""

from __future__ import annotations

import logging

import torch

BACKENDS = ("auto", "cpp", "torch")

_logger = logging.getLogger("memkern")
_told = False


def _load() -> str | None:
    """Load the compiled CPU library, which registers itself; the reason why not, or None."""
    try:
        from .. import _C  # type: ignore[attr-defined]  # noqa: F401
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
            return "the compiled CPU library is not part of this installation (see `memkern info`)"
        return f"the compiled CPU library does not load with torch {torch.__version__}: {error}"
    return None


_NOT_LOADED = _load()


def refusals(backend: str, device: torch.device) -> list[str]:
    """Why `backend` cannot run for tensors on `device`; empty if it can."""
    if backend not in BACKENDS:
        return [f"there is no backend {backend!r}; use one of {', '.join(BACKENDS)}"]
    if backend != "cpp":
        return []
    reasons = [] if device.type == "cpu" else [f"cpp runs on CPU tensors, these are on {device}"]
    return reasons + ([_NOT_LOADED] if _NOT_LOADED is not None else [])


def choose(backend: str, device: torch.device) -> str:
    """The backend that will run: "cpp" or "torch".

    Raises:
        ValueError: a named backend cannot run; the message lists why.
    """
    reasons = refusals("cpp" if backend == "auto" else backend, device)
    if not reasons:
        return "cpp" if backend == "auto" else backend
    if backend != "auto":
        raise ValueError(f"backend {backend!r} cannot run: {'; '.join(reasons)}")
    return "torch"


def tell_fallback(device: torch.device) -> None:
    """Say, once in a process, that `auto` had to take the reference on a device the compiled library serves."""
    global _told
    if device.type == "cpu" and _NOT_LOADED is not None and not _told:
        _told = True
        _logger.warning("memkern uses its plain-torch operators: %s", _NOT_LOADED)

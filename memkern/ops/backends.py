"""The choice of the implementation that runs an operator, and the reasons for it.

`cpp` is the compiled CPU library, `cuda` the compiled CUDA library, `triton` the Triton kernels, `torch` the
reference for any device. `auto` takes the first that can run on the tensors' device and keeps the reasons against
the others for `memkern.info()`; a named backend that cannot run raises.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .cards import has_matrix_units
from .compiled import load_cpp, load_cuda

BACKENDS = ("auto", "cpp", "cuda", "triton", "torch")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run on CPU tensors, in its interpreter."""

_UNABLE = (
    "no kernel image",
    "invalid device function",
    "unsupported toolchain",
    "driver version is insufficient",
    "active drivers",
    "Failed to find C compiler",
)
"""Texts of a RuntimeError for a kernel that cannot be launched at all; any other error is a fault, and is raised."""

_logger = logging.getLogger("memkern")
_serves: dict[str, tuple[str, ...]] = {}
_failed: dict[tuple[object, ...], str] = {}
_logged: set[object] = set()


def _find_triton() -> str | None:
    """The reason why there is no Triton, or None; it is imported on first use only."""
    with contextlib.suppress(ImportError):
        if importlib.util.find_spec("triton") is not None:
            return None
    return "triton is not installed"


_MISSING = {
    "cpp": load_cpp(),
    "cuda": load_cuda(),
    "triton": _find_triton(),
}


def serve(operator: str, names: Sequence[str]) -> None:
    """Note which backends have `operator`."""
    _serves[operator] = tuple(names)


def serving(operator: str) -> tuple[str, ...]:
    """The backends that have `operator`."""
    return _serves[operator]


def installed(backend: str) -> list[str]:
    """The reasons why `backend` cannot run on any device with this installation; empty if it can."""
    if backend not in BACKENDS:
        return [f"there is no backend {backend!r}; use one of {', '.join(BACKENDS)}"]
    reason = _MISSING.get(backend)
    return [] if reason is None else [reason]


def refusals(
    backend: str, device: torch.device, dtype: torch.dtype | None = None, operator: str | None = None
) -> list[str]:
    """The reasons why `backend` cannot run for tensors on `device` (of `dtype`, for `operator`); empty if it can."""
    reasons = []
    runs_on = {"cpp": "cpu", "cuda": "cuda", "triton": "cpu" if INTERPRETING else "cuda"}.get(backend, device.type)
    if device.type != runs_on:
        reasons.append(f"{backend} runs on {runs_on.upper()} tensors, these are on {device}")
    if operator is not None and backend != "auto" and backend in BACKENDS and backend not in _serves[operator]:
        reasons.append(f"{backend} has no {operator}")
    if backend == "triton" and dtype is torch.float64:
        reasons.append("triton computes float32, float16 and bfloat16, not float64")
    if backend == "triton" and dtype is torch.bfloat16 and INTERPRETING:
        reasons.append("triton's interpreter computes bfloat16 wrongly")
    return reasons + installed(backend)


def order(device: torch.device, operator: str | None = None) -> tuple[str, ...]:
    """The backends that `auto` tries on `device`, the reference last."""
    if device.type != "cuda":
        return ("cpp", "torch") if device.type == "cpu" else ("torch",)
    products = operator in ("biased_attention", "absorbed_attention", "attention_mass")
    if products and not has_matrix_units(device):
        return ("torch",)  # Triton has no tensor cores there, torch may.
    return ("cuda", "triton", "torch")


def usable(device: torch.device) -> str:
    """The backend that `auto` takes first on `device`, as far as this installation has it."""
    return next(backend for backend in order(device) if not installed(backend))


def require(backend: str, operator: str, tensor: torch.Tensor) -> None:
    """Raise unless `backend` can run `operator` for tensors of the device and dtype of `tensor`.

    Raises:
        ValueError: a named backend cannot run; the message lists why.
    """
    if backend == "auto":
        return
    reasons = refusals(backend, tensor.device, tensor.dtype, operator)
    if reasons:
        raise ValueError(f"backend {backend!r} cannot run: {'; '.join(reasons)}")


def require_installed(backend: str) -> None:
    """Raise ValueError unless `backend` is part of this installation, for any device."""
    reasons = installed(backend)
    if reasons:
        raise ValueError(f"backend {backend!r} cannot run: {'; '.join(reasons)}")


def run(operator: str, overloads: Mapping[str, Callable[..., Any]], *arguments: Any) -> Any:
    """Run `auto` on a GPU: the first backend that takes the arguments; one that fails to launch is skipped.

    The reasons are logged once, and kept: a launch that failed is not tried again for the same widths.
    """
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    tensor = _deciding(tensors)
    widths = tuple(other.shape[-1] for other in tensors)
    reasons = []
    for backend in order(tensor.device, operator)[:-1]:
        key = (backend, operator, tensor.dtype, widths)
        against = refusals(backend, tensor.device, tensor.dtype, operator)
        against += [_failed[key]] if key in _failed else []
        if not against:
            try:
                return overloads[backend](*arguments)
            except Exception as error:
                reason = why_unable(error)
                if reason is None:
                    raise
                _failed[key] = reason
                against = [reason]
        # A backend without this operator is normal, so this is no reason to log.
        reasons += [reason for reason in against if reason != f"{backend} has no {operator}"]
    if reasons:
        tell((operator, tensor.dtype), f"{operator} runs as plain torch on {tensor.device}: {'; '.join(reasons)}")
    return overloads["torch"](*arguments)


def served(device: torch.device, operator: str, dtype: torch.dtype) -> str:
    """The backend that `auto` comes to for an operator without a failure, by what is known beforehand."""
    for backend in order(device, operator)[:-1]:
        if not refusals(backend, device, dtype, operator):
            return backend
    return "torch"


def why_unable(error: Exception) -> str | None:
    """The reason, if an error means that a backend cannot run here; None for a fault that must be raised."""
    unable = (
        isinstance(error, (ImportError, OSError, NotImplementedError))
        or type(error).__module__.split(".")[0] == "triton"
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in _UNABLE))
    )
    if not unable or isinstance(error, torch.OutOfMemoryError):
        return None
    return f"{type(error).__name__}: {error}".splitlines()[0]


def run_triton(operator: str, *arguments: Any) -> Any:
    """Launch the operator's Triton kernels on the tensors' own device."""
    module = importlib.import_module(f".triton.{operator}", __package__)
    device = _deciding(arguments).device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return getattr(module, operator)(*arguments)


def _deciding(arguments: Sequence[Any]) -> torch.Tensor:
    """The tensor whose dtype is the computation's: the first of floating point."""
    return next(tensor for tensor in arguments if isinstance(tensor, torch.Tensor) and tensor.is_floating_point())


def failures() -> list[str]:
    """The launches that were tried in this process and failed, with the reasons."""
    return sorted({f"{key[0]}, {key[1]}: {reason}" for key, reason in _failed.items()})


def tell(key: object, message: str) -> None:
    """Log a warning once in a process."""
    if key not in _logged:
        _logged.add(key)
        _logger.warning("memkern: %s", message)


def tell_fallback(device: torch.device) -> None:
    """Log, once in a process, that `auto` takes the reference on a CPU because there is no compiled library."""
    if device.type == "cpu" and _MISSING["cpp"] is not None:
        tell("cpu", f"the operators run as plain torch: {_MISSING['cpp']}")

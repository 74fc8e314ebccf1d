"""The time and the memory that one call takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_LOG_LEVEL = "KINETO_LOG_LEVEL"


class Taken(NamedTuple):
    """Milliseconds of one call: until the result was computed, and until the call returned on the host."""

    total: float
    host: float


def timed(function: Callable[[], object], device: torch.device) -> Taken:
    """The time of a call on an idle device; on a CPU the two times are the same."""
    _wait(device)
    start = time.perf_counter()
    function()
    returned = time.perf_counter()
    _wait(device)
    return Taken(1e3 * (time.perf_counter() - start), 1e3 * (returned - start))


def peak(function: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes of tensors that a call held, beyond those held before; None if torch cannot tell."""
    if device.type == "cpu":
        return _peak_on_cpu(function)
    if device.type != "cuda":
        return None
    _wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(function: Callable[[], object]) -> int | None:
    try:
        with _profiler_hushed(), torch.autograd.profiler.profile(profile_memory=True, use_cpu=True) as profile:
            function()
    except RuntimeError as error:
        if "profiler" in str(error).lower():
            # Another profiler runs in this process.
            return None
        raise
    recorded: Any = profile.kineto_results
    events = [event for event in recorded.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextmanager
def _profiler_hushed() -> Iterator[None]:
    """Silence torch's profiler, which reads its log level from the environment at its first use."""
    former = os.environ.get(_LOG_LEVEL)
    os.environ.setdefault(_LOG_LEVEL, "99")
    try:
        yield
    finally:
        if former is None:
            del os.environ[_LOG_LEVEL]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

"""Timing calls against one another, their host time included."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from ...ops.backends import tell

ROUNDS, ENOUGH = (3, 12), 0.1
"""The least and the largest number of timings of each call, and the seconds of timing that are enough."""

LEAST = 2
"""The least number of valid timings of each call, where time runs out or other processes disturb the rest."""

BURST = 8
"""Calls that a GPU gets at a time: they take the host's time or the device's, whichever is longer."""

SCRATCH = 1 << 23
"""Values that are written between two timings on a CPU, 32 MiB: while an image is generated, a layer does not find its
weights in the cache either.
"""

SWITCHES = 1, 50
"""The switches to other processes that a valid timing may have: a fixed number, and a number per second."""


class Clock:
    """Times calls on a device.

    Args:
        left: seconds that all timing may take.

    Attributes:
        spent: seconds so far, without the first calls on a GPU, which may compile kernels.
    """

    def __init__(self, device: torch.device, left: float) -> None:
        self._device, self._left = device, left
        self.spent = 0.0
        self._on_cpu = device.type == "cpu"
        self._scratch = torch.zeros(SCRATCH, dtype=torch.float32, device=device) if self._on_cpu else None

    def compare(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float] | None:
        """The least milliseconds of each call, timed in turns; None where there was too little time, or other processes
        kept the processor busy.
        """
        for call in calls.values():
            start = time.perf_counter()
            call()
            self._wait()
            self.spent += time.perf_counter() - start if self._on_cpu else 0.0
            if self.spent >= self._left:
                return None
        took: dict[str, list[float]] = {name: [] for name in calls}
        begun = self.spent
        for turn in range(ROUNDS[1]):
            fewest = min(map(len, took.values()))
            if fewest >= ROUNDS[0] and self.spent - begun > ENOUGH:
                break
            if turn > ROUNDS[0] and not fewest:
                tell(
                    ("clock", "busy"),
                    "the processor is busy: paths of layers are estimated, until `memkern tune` times them",
                )
                return None
            # The order changes, since the data that one call leaves in the cache helps the next.
            for name in list(calls)[:: -1 if turn % 2 else 1]:
                self._time(calls[name], took[name])
                if self.spent >= self._left:
                    return _least(took)
        return _least(took)

    def _time(self, call: Callable[[], object], took: list[float]) -> None:
        """Time a call, and note the time if no other process came in between."""
        before, calls = time.perf_counter(), 1 if self._on_cpu else BURST
        if self._scratch is not None:
            self._scratch.add_(1)
        switches, start = _switches(), time.perf_counter()
        for _ in range(calls):
            call()
        self._wait()
        end = time.perf_counter()
        if _switches() - switches <= SWITCHES[0] + SWITCHES[1] * (end - start):
            took.append(1e3 * (end - start) / calls)
        self.spent += end - before

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _least(took: Mapping[str, list[float]]) -> dict[str, float] | None:
    enough = all(len(times) >= LEAST for times in took.values())
    return {name: min(times) for name, times in took.items()} if enough else None


def _switches() -> int:
    """The number of times that other processes took the processor from this one; 0 where that is not counted."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

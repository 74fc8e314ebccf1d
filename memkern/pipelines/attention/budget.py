"""The budget for kept keys and values of a context: its bytes, and the layers that get them.

The bytes go to the layers where each saves most time by the estimate. So the choice depends only on the pipeline, the
sizes and the budget, never on other running processes, and the same seed gives the same image.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

SHARE, MOST = 1 / 32, 256 << 20
"""The default budget: a share of a device's whole memory, and the most bytes."""

Memory = int | float | None
"""Bytes, a share of the device's whole memory, or the default."""


def check_memory(memory: Memory) -> None:
    """Check that a value given as `memory` is one of those.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative, or a share above 1.
    """
    if memory is None:
        return
    if isinstance(memory, bool) or not isinstance(memory, (int, float)):
        raise TypeError(f"memory: expected bytes, a share of the device's memory or None, got {memory!r}")
    if isinstance(memory, float) and not 0 <= memory <= 1:
        raise ValueError(f"memory: expected a share between 0.0 and 1.0, or bytes as an int, got {memory!r}")
    if memory < 0:
        raise ValueError(f"memory: expected bytes of 0 or more, got {memory!r}")


def bytes_of(memory: Memory, device: torch.device) -> int:
    """The bytes that may be kept on a device."""
    if isinstance(memory, int):
        return memory
    whole = _whole(device)
    return min(MOST, int(SHARE * whole)) if memory is None else int(memory * whole)


def _whole(device: torch.device) -> int:
    """The bytes of a device's memory, free or not; as many as the default needs where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return int(MOST / SHARE)


@dataclass(frozen=True)
class Wish:
    """The bytes that a layer could keep, and their use.

    Attributes:
        key: the key to find it by.
        sizes: bytes of each way to keep something, from K and V to more.
        savings: the time that each saves in a step, compared with keeping nothing.
    """

    key: Hashable
    sizes: tuple[int, ...]
    savings: tuple[float, ...]


def allot(wishes: Iterable[Wish], room: int) -> dict[Hashable, int]:
    """The bytes that each layer may keep, no more than `room` together: the most time saved for a byte goes first.

    The rest is for layers that could keep more, the least first: when timed, that may be faster than estimated.
    """
    wanted = list(wishes)
    given = {wish.key: 0 for wish in wanted}
    steps = [(step, order) for order, wish in enumerate(wanted) for step in _steps(wish)]
    for step, order in sorted(steps, key=lambda pair: (-pair[0].worth, pair[1])):
        key = wanted[order].key
        # A step after one that found no room is not taken either.
        if given[key] == step.start and step.end - step.start <= room:
            given[key] = step.end
            room -= step.end - step.start
    for wish in sorted(wanted, key=lambda wish: wish.sizes[-1] - given[wish.key]):
        more = max((size for size in wish.sizes if size - given[wish.key] <= room), default=0)
        if more > given[wish.key]:
            room -= more - given[wish.key]
            given[wish.key] = more
    return given


class _Step(NamedTuple):
    """More bytes for a layer, and the time that they save."""

    start: int
    end: int
    saved: float

    @property
    def worth(self) -> float:
        return self.saved / (self.end - self.start)


def _steps(wish: Wish) -> list[_Step]:
    """The steps from nothing to the most that a layer could keep, each worth less than the one before."""
    steps: list[_Step] = []
    reached = 0.0
    for size, saving in zip(wish.sizes, wish.savings, strict=True):
        start = steps[-1].end if steps else 0
        if saving <= reached or size <= start:
            continue
        step, reached = _Step(start, size, saving - reached), saving
        while steps and steps[-1].worth < step.worth:
            step = _Step(steps[-1].start, step.end, steps[-1].saved + step.saved)
            steps.pop()
        steps.append(step)
    return steps

"""Launches that are repeated with other tensors of the same layout: compiled and packed once.

Triton's own call looks at every argument each time, which takes the host longer than a small layer takes a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .launch import Launch


class Repeated:
    """Launches as they were compiled, with all arguments but the moving ones in place."""

    __slots__ = ("_steps",)

    def __init__(self, steps: list[tuple[Callable[..., object], list[Any], list[tuple[int, int]]]]) -> None:
        self._steps = steps

    @classmethod
    def of(cls, launches: Sequence[Launch], moving: Sequence[torch.Tensor]) -> Repeated | None:
        """Launch once, and keep how. None in the interpreter, which compiles nothing.

        Args:
            launches: in order.
            moving: the tensors of them that are others in each call.
        """
        steps = []
        for launch in launches:
            compiled = launch.run()
            if compiled is None:
                return None
            values = {**launch.arguments, **launch.constants}
            packed = [values[name] for name in launch.kernel.arg_names]
            places = [
                (at, which) for at, value in enumerate(packed) for which, one in enumerate(moving) if value is one
            ]
            for at, _ in places:
                packed[at] = None
            steps.append((compiled[(*launch.grid, 1, 1)[:3]], packed, places))
        return cls(steps)

    def __call__(self, *moving: torch.Tensor) -> None:
        """Launch on the current stream of the current device, on which the first launch was."""
        for run, packed, places in self._steps:
            arguments = packed.copy()
            for at, which in places:
                arguments[at] = moving[which]
            run(*arguments)

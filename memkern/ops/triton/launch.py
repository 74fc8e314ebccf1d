"""A kernel launch as a value: what runs on a GPU, in the interpreter, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cost import Work


@dataclass(frozen=True)
class Launch:
    """One kernel with all that it is called with.

    Attributes:
        kernel: a `triton.jit` function.
        grid: programs in x and y.
        arguments: what is passed at run time, by name; None for a tensor that is not there.
        constants: what the kernel is compiled for, by name.
        options: `num_warps` and `num_stages`.
        work: what its time is estimated from, where that was asked.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, torch.Tensor | int | float | None]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    work: Work | None = None

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    def on(self, device: str) -> Launch:
        """The same launch with its meta tensors made real, filled with values that no kernel stumbles over."""

        def real(value: torch.Tensor | int | float | None) -> torch.Tensor | int | float | None:
            if not isinstance(value, torch.Tensor):
                return value
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            return made.normal_() if value.is_floating_point() else made.zero_()

        return replace(self, arguments={name: real(value) for name, value in self.arguments.items()})


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is dense, else a contiguous copy."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()

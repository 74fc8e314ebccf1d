"""A kernel launch as a value, to run on a GPU or in the interpreter, or to compile ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cost import Work


@dataclass(frozen=True)
class Launch:
    """One kernel with all of its arguments.

    Attributes:
        kernel: a `triton.jit` function.
        grid: programs in x and y.
        arguments: values passed at run time, by name; None for a missing tensor.
        constants: values that the kernel is compiled for, by name.
        options: `num_warps` and `num_stages`.
        work: the work that its time is estimated from, if it was estimated.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, torch.Tensor | int | float | None]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    work: Work | None = None

    def run(self) -> Any:
        """Launch on the current stream of the current device; returns the compiled kernel, None if interpreted."""
        return self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    def on(self, device: str) -> Launch:
        """The same launch with its meta tensors made real, filled with values that every kernel accepts."""

        def real(value: torch.Tensor | int | float | None) -> torch.Tensor | int | float | None:
            if not isinstance(value, torch.Tensor):
                return value
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            return made.normal_() if value.is_floating_point() else made.zero_()

        return replace(self, arguments={name: real(value) for name, value in self.arguments.items()})


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is dense, else a contiguous copy."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()

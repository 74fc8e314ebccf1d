"""Where in the schedule a call of the UNet is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from .acceleration import Acceleration
from .hooks import nothing


class UNetHook:
    """A forward pre-hook that tells the kv stage where in the schedule a call of the UNet is, and how large."""

    def __init__(self, acceleration: Acceleration, scheduler: Callable[[], Any]) -> None:
        self.acceleration = acceleration
        self.scheduler = scheduler

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.acceleration.begin_call()
        stage = self.acceleration.stage
        if stage is not None:
            sample, timestep = (
                kwargs.get(name, args[place] if len(args) > place else None)
                for place, name in enumerate(("sample", "timestep"))
            )
            stage.sample = None if sample is None else tuple(sample.shape[-2:])
            if stage.follows_steps:
                stage.position = position(timestep, getattr(self.scheduler(), "timesteps", None))

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (nothing,)


def position(timestep: Any, timesteps: torch.Tensor | None) -> float | None:
    """Where in the schedule a step is: i/n for step i of n, the first of those with this time; None if it is none.

    A pipeline passes an element of its scheduler's `timesteps` itself: its place in memory tells i, without a sync.
    """
    if timesteps is None or timesteps.dim() != 1 or timestep is None or len(timesteps) == 0:
        return None
    count = len(timesteps)
    if isinstance(timestep, torch.Tensor) and timestep.dim() == 0 and timestep.dtype == timesteps.dtype:
        place = timestep.data_ptr() - timesteps.data_ptr()
        if 0 <= place < count * timesteps.stride(0) * timesteps.itemsize and timestep.device == timesteps.device:
            return place // (timesteps.stride(0) * timesteps.itemsize) / count
    times = timesteps.detach().cpu().tolist()
    value = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
    return times.index(value) / count if value in times else None

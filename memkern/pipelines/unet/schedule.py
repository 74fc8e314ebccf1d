"""The place of a UNet's call in the schedule, and the size of its latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_ARGUMENTS = ("sample", "timestep", "encoder_hidden_states")
"""The first arguments of a UNet or ControlNet, in this order."""


@dataclass(frozen=True)
class Place:
    """The place of a UNet's call.

    Attributes:
        sample: rows × columns of the latents; None where not known.
        position: i/n for step i of a schedule of n; None where it is not known, or not needed.
    """

    sample: tuple[int, int] | None = None
    position: float | None = None


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The sample, the timestep and the context of a call, given by name or by place; None for one not given."""
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    sample, timestep, context = (given.get(name) for name in _ARGUMENTS)
    return sample, timestep, context


def lora_scale(kwargs: dict[str, Any]) -> float:
    """The factor by which a UNet is called to scale its LoRAs."""
    options = kwargs.get("cross_attention_kwargs")
    return float(options.get("scale", 1.0)) if options else 1.0


def position(timestep: Any, timesteps: torch.Tensor | None) -> float | None:
    """The place of a step in the schedule: i/n for step i of n, the first with this time; None if there is none.

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

"""Where in the schedule a call of the UNet is, and how large its latents are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

UNET_ARGUMENTS = ("sample", "timestep", "encoder_hidden_states")
"""What a UNet or ControlNet is called with first."""


@dataclass(frozen=True)
class Place:
    """A call of the UNet.

    Attributes:
        sample: rows × columns of the latents; None where not known.
        position: i/n for step i of a schedule of n; None where it is not known, or nobody asks.
    """

    sample: tuple[int, int] | None = None
    position: float | None = None


def argument(name: str, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of a call, by name or by place; None if it was not given."""
    return kwargs.get(name, args[index] if len(args) > index else None)


def sample_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Rows × columns of the latents that a UNet is called with."""
    sample = argument("sample", 0, args, kwargs)
    return None if sample is None else tuple(sample.shape[-2:])


def lora_scale(kwargs: dict[str, Any]) -> float:
    """What a UNet is called to scale its LoRAs by."""
    options = kwargs.get("cross_attention_kwargs")
    return float(options.get("scale", 1.0)) if options else 1.0


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

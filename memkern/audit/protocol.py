"""The generation settings of an audit: every number that changes its images, and published sets of them by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..actions import whole

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PIPELINE = "pipeline"
"""The name that stands for the pipeline's device, as the device of the generators."""


@dataclass(frozen=True)
class Protocol:
    """The settings that images are generated with.

    Attributes:
        seeds: of the initial noise.
        steps, guidance: of the pipeline.
        scheduler: a class of diffusers, "DDIM" or "DDIMScheduler"; None is the model's own.
        dtype: of the weights; None is float16 on a GPU and float32 elsewhere.
        device: None is the first GPU, or the CPU.
        generator_device: of the initial noise; "pipeline" is the pipeline's. The CPU's noise is the same on every card.
        batch: how many images are generated at once, with a generator each.
    """

    seeds: tuple[int, ...] = (0,)
    steps: int = 20
    guidance: float = 7.5
    scheduler: str | None = None
    dtype: str | None = None
    device: str | None = None
    generator_device: str = "cpu"
    batch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", _seeds(self.seeds))
        for name in ("steps", "batch"):
            whole(name, getattr(self, name), 1)
        if isinstance(self.guidance, bool) or not isinstance(self.guidance, (int, float)):
            raise TypeError(f"guidance: expected a number, got {self.guidance!r}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance: expected a finite number, got {self.guidance}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.scheduler is not None:
            object.__setattr__(self, "scheduler", scheduler_class(self.scheduler).__name__)
        if self.device is not None:
            device("device", self.device)
        if self.generator_device != PIPELINE:
            device("generator_device", self.generator_device)

    def generators_of(self, pipe: Any) -> str:
        """The device of the generators for that pipeline."""
        return str(pipe.device) if self.generator_device == PIPELINE else self.generator_device


def protocol(name: str | None = None, **given: Any) -> Protocol:
    """The protocol of that name, or the default one, with the given values in place of its own.

    Args:
        given: attributes of `Protocol`; None keeps the protocol's value.

    Raises:
        TypeError, ValueError: an unknown name, or a value that is not valid.
    """
    if name is not None and name not in PROTOCOLS:
        raise ValueError(f"protocol: expected {', '.join(PROTOCOLS)}, got {name!r}")
    assert given.keys() <= {part.name for part in fields(Protocol)}
    base = Protocol() if name is None else PROTOCOLS[name]
    return replace(base, **{key: value for key, value in given.items() if value is not None})


def scheduler_class(name: str) -> Any:
    """The scheduler of diffusers that "DDIM" or "DDIMScheduler" names."""
    import diffusers

    found = getattr(diffusers, name if name.endswith("Scheduler") else f"{name}Scheduler", None)
    if not (isinstance(found, type) and hasattr(found, "set_timesteps")):
        raise ValueError(f"scheduler: expected a scheduler of diffusers, such as DDIM or DDIMScheduler, got {name!r}")
    return found


def device(name: str, text: str) -> torch.device:
    """The device that `text` names; ValueError if it does not exist here."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise ValueError(f"{name}: expected a device such as cpu, cuda or cuda:1, got {text!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name}: {text} is not here; there are {torch.cuda.device_count()} GPUs")
    return found


def _seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    found = tuple(dict.fromkeys(seeds))
    if not found:
        raise ValueError("seeds: expected at least one whole number, got none")
    for seed in found:
        whole("seeds", seed, 0)
        if seed >= 2**63:
            raise ValueError(f"seeds: expected whole numbers below 2**63, got {seed}")
    return found


PROTOCOLS = {
    "kim-no": Protocol(
        seeds=(0, 1, 10, 42, 100, 441, 515, 1000, 2025, 10000),
        steps=50,
        guidance=7.5,
        scheduler="DDIM",
        dtype="float32",
        generator_device=PIPELINE,
    )
}
"""Name → the settings of a paper. "kim-no": Kim & No, arXiv 2605.02908."""

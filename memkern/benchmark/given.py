"""The checks of the arguments of `memkern.bench`, and the description of a pipeline and its device."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..actions import whole
from ..documents import at
from ..pipelines.family import refusals
from ..pipelines.unet.layers import unwrapped
from ..policy import Policy
from .calls import Arguments

LEAST_ROUNDS = 3
STEPS = 20
"""The steps of the schedule whose first step is measured."""


def checked_pipeline(pipe: Any) -> Any:
    """The pipeline's UNet.

    Raises:
        TypeError, ValueError: `pipe` is no pipeline, cannot be patched, or has no UNet.
    """
    refusals.require(pipe)
    unet = unwrapped(getattr(pipe, "unet", None))
    if not isinstance(unet, torch.nn.Module):
        other = type(getattr(pipe, "transformer", None)).__name__
        raise ValueError(
            f"pipe: expected a pipeline with a UNet, whose steps are measured; this {type(pipe).__name__} has "
            f"{'none' if other == 'NoneType' else f'a {other}'}"
        )
    return unet


def checked_policies(policies: Sequence[Policy | str]) -> list[Policy]:
    """The policies, each once.

    Raises:
        TypeError, ValueError: there is none, or one is unknown.
    """
    if isinstance(policies, (str, Policy)):
        policies = [policies]
    with at("policies"):
        found = list({str(policy): policy for policy in map(Policy.of, policies)}.values())
    if not found:
        raise ValueError("policies: expected at least one, such as 'zero-pad:0.7', got none")
    return found


def checked_inputs(
    pipe: Any, *, batch: int, size: Sequence[int] | None, prompt: str, inputs: dict[str, Any] | None
) -> dict[str, Any]:
    """The arguments of the pipeline's call.

    Raises:
        TypeError, ValueError: a value that is not valid, or that this pipeline does not take.
    """
    whole("batch", batch, 1)
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected text, got {prompt!r}")
    takes = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent"}
    given |= {"generator": [torch.Generator("cpu").manual_seed(seed) for seed in range(batch)]}
    given = {name: value for name, value in given.items() if name in takes} | {"prompt": [prompt] * batch}
    if size is not None:
        height, width = _size(pipe, size)
        if not {"height", "width"} <= takes.keys():
            raise ValueError(f"size: {type(pipe).__name__} takes it from its image, got {height}x{width}")
        given |= {"height": height, "width": width}
    for name in inputs or {}:
        if name not in takes:
            raise ValueError(f"inputs: {type(pipe).__name__} takes no {name!r}")
        if name in ("prompt", "height", "width"):
            raise ValueError(f"inputs: {name!r} is a separate argument: {'prompt' if name == 'prompt' else 'size'}")
    return given | (inputs or {})


def _size(pipe: Any, size: Sequence[int]) -> tuple[int, int]:
    if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
        raise TypeError(f"size: expected height and width such as (512, 512), got {size!r}")
    for value in size:
        whole("size", value, 1)
        if value % pipe.vae_scale_factor:
            raise ValueError(f"size: expected multiples of {pipe.vae_scale_factor}, got {size[0]}x{size[1]}")
    return size[0], size[1]


def described(pipe: Any, step: Arguments) -> dict[str, Any]:
    """The description of a pipeline, its measured call, and its device, without paths of this machine."""
    unet = unwrapped(pipe.unet)
    origin = str(pipe.config.get("_name_or_path") or "memory")
    return {
        "pipeline": type(pipe).__name__,
        "model": Path(origin).name if Path(origin).exists() else origin,
        "unet": type(unet).__name__,
        "parameters": sum(part.numel() for part in unet.parameters()),
        "dtype": str(unet.dtype).removeprefix("torch."),
        "device": _device_name(unet.device),
        "threads": torch.get_num_threads(),
        "latents": list(step.sample.shape),
        "context": list(step.context.shape),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{device}, {names[0] if names else platform.processor() or platform.machine()}"

"""Images of the same seeds unpatched and patched, and the UNet's attention meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..pipelines import Probe, patched, probe
from .choice import Choice


@dataclass(frozen=True)
class Shown:
    """One side of the page.

    Attributes:
        images: one per seed.
        probe: the attention mass of all of them.
        status: `memkern.status` in words; "unpatched" for the pipeline as it is.
    """

    images: list[Image.Image]
    probe: Probe
    status: str


def show(pipe: Any, choice: Choice, *, edited: bool, report: Callable[[], None] = lambda: None) -> Shown:
    """Generate an image for each seed, unpatched or as chosen; `report` is called after each.

    The pipeline is left as it was.

    Raises:
        ValueError: this pipeline cannot have the policy or the stage; with the reasons.
    """
    images = []
    with ExitStack() as stack:
        said = "unpatched"
        if edited:
            patch = stack.enter_context(patched(pipe, choice.policy(), stage=choice.stage))
        found = stack.enter_context(probe(pipe))
        for seed in choice.seeds:
            generator = torch.Generator("cpu").manual_seed(seed)
            images.append(pipe(**choice.options(), generator=generator).images[0])
            report()
        if edited:
            said = str(patch.status())
    return Shown(images, found, said)

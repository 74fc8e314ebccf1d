"""A measure of images, and its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ..files import check_file


@dataclass(frozen=True)
class Shown:
    """An image, and the texts and images to compare it with.

    Attributes:
        image: RGB.
        prompt: the original prompt, even if a method changed it.
        text: the text that the image was generated from; None if unknown.
        unmitigated: the unpatched pipeline's image of the same prompt and seed.
        reference: the training image, if one is known.
        siblings: the images of the same prompt and method by other seeds.
    """

    image: Image.Image
    prompt: str
    text: str | None
    unmitigated: Image.Image
    reference: Image.Image | None
    siblings: tuple[Image.Image, ...] = ()


class Metric(Protocol):
    """A measure of images."""

    columns: tuple[str, ...]
    """The columns of the results that it fills."""
    described: dict[str, Any]
    """The manifest's description of it: files by name, sizes."""

    def __call__(self, batch: Sequence[Shown]) -> list[tuple[float | None, ...]]:
        """A value per column for each image; None if there is nothing to compare with."""


def pixels_of(
    images: Sequence[Image.Image], size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Float32 `[B, 3, size, size]`, normalized."""
    resized = [np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.float32) for image in images]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    shift, scale = (torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1) for values in (mean, std))
    return (pixels - shift) / scale


def state_dict(option: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, `.safetensors` or of `torch.save`; nothing in it is run.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: no such file, or a file without tensors; the message begins
            with `option`.
    """
    check_file(option, path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever the two readers raise for another kind of file; torch's text advises to run it
        raise ValueError(
            f"{option}: {path} has no tensors that can be read; expected a .safetensors file, or one of torch.save "
            "with tensors alone"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{option}: {path}: expected names and tensors, got {type(found).__name__}")
    return found

"""A measure of pictures, and what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Shown:
    """A picture and what it may be compared with.

    Attributes:
        image: RGB.
        prompt: the original prompt, whatever a method made of it.
        text: what the picture was generated from; None where that is not known.
        unmitigated: the unpatched pipeline's picture of the same prompt and seed.
        reference: the training image, if one is known.
        siblings: the pictures of the same prompt and method by other seeds.
    """

    image: Image.Image
    prompt: str
    text: str | None
    unmitigated: Image.Image
    reference: Image.Image | None
    siblings: tuple[Image.Image, ...] = ()


class Metric(Protocol):
    """A measure of pictures."""

    columns: tuple[str, ...]
    """The columns of the results that it fills."""
    described: dict[str, Any]
    """What the manifest says of it: files by name, sizes."""

    def __call__(self, batch: Sequence[Shown]) -> list[tuple[float | None, ...]]:
        """For each picture a value per column; None where there is nothing to compare with."""


def pixels_of(
    pictures: Sequence[Image.Image], size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Float32 `[B, 3, size, size]`, normalized."""
    resized = [np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR), np.float32) for picture in pictures]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    shift, scale = (torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1) for values in (mean, std))
    return (pixels - shift) / scale


def state_dict(option: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, `.safetensors` or of `torch.save`; nothing in it is run.

    Raises:
        FileNotFoundError, ValueError: no such file, or none of tensors; the message begins with `option`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the two readers say of a file that is another kind's
        raise ValueError(f"{option}: {path} has no tensors that can be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{option}: {path}: expected names and tensors, got {type(found).__name__}")
    return found

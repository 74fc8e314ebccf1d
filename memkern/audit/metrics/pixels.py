"""The similarity of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ...demo.judge import correlation
from .metric import Shown


class PixelSimilarity:
    """Pearson correlation of pixels: finds copies in the same place, and needs no weights."""

    columns: tuple[str, ...] = ("pixels_to_unmitigated", "pixels_to_reference")

    def __init__(self) -> None:
        self.described: dict[str, Any] = {}

    def __call__(self, batch: Sequence[Shown]) -> list[tuple[float | None, ...]]:
        """See `Metric`."""
        return [(_pixels(shown.image, shown.unmitigated), _pixels(shown.image, shown.reference)) for shown in batch]


def _pixels(image: Image.Image, other: Image.Image | None) -> float | None:
    if other is None:
        return None
    return correlation(image, other if other.size == image.size else other.resize(image.size))

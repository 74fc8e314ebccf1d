"""The judgement of images in a sweep: copies of training images, and the fidelity of ordinary prompts' images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from ..demo import embedded
from ..demo.judge import COPY as EMBEDDED_COPY
from ..demo.judge import correlation
from ..demo.judge import judge as attributes
from .metrics import Metric, Shown, Weights, metrics
from .prompts import Prompt
from .results import reference_of

Pair = tuple[Image.Image, Image.Image]
"""An image, and the unpatched pipeline's image of the same prompt and seed."""


class Judge(Protocol):
    """Judges the images of one prompt."""

    described: dict[str, Any]
    """The manifest's description of it."""

    def __call__(self, prompt: Prompt, images: Sequence[Pair]) -> dict[str, list[float]]:
        """Measure → a value per image: for a memorized prompt "copies", 0 or 1, and "similarity", which decides it; for
        another prompt the measures of fidelity.
        """


class ByAttributes:
    """The judge of the embedded model: copies by correlation with the training image, fidelity by attributes."""

    def __init__(self) -> None:
        self.described: dict[str, Any] = {
            "copies": f"pixel correlation above {EMBEDDED_COPY}",
            "fidelity": "attributes",
        }
        self._scenes = {scene.caption: scene for scene in embedded.scenes()}

    def __call__(self, prompt: Prompt, images: Sequence[Pair]) -> dict[str, list[float]]:
        """See `Judge`."""
        if prompt.text not in self._scenes:
            reference = reference_of(prompt, {})
            assert reference is not None
            return _copies([correlation(image, reference) for image, _ in images], EMBEDDED_COPY)
        seen = [attributes(image, self._scenes[prompt.text]) for image, _ in images]
        return {name: [float(one[name]) for one in seen] for name in seen[0]}


class ByMetrics:
    """The judge of any model: copies by SSCD or pixels, fidelity by CLIP score or similarity to unpatched images."""

    def __init__(self, found: Sequence[Metric], threshold: float) -> None:
        self._found, self._threshold = list(found), threshold
        names = [name for metric in found for name in metric.columns]
        kind = "sscd" if "sscd_to_reference" in names else "pixels"
        self._to_reference, self._to_plain = f"{kind}_to_reference", f"{kind}_to_unmitigated"
        self._fidelity = "clip_score" if "clip_score" in names else self._to_plain
        self.described: dict[str, Any] = {name: value for metric in found for name, value in metric.described.items()}
        self.described |= {"copies": f"{kind} above {threshold}", "fidelity": self._fidelity}

    def __call__(self, prompt: Prompt, images: Sequence[Pair]) -> dict[str, list[float]]:
        """See `Judge`; a memorized prompt without a training image is compared with the unpatched image."""
        reference = reference_of(prompt, {})
        shown = [Shown(image, prompt.text, None, plain, reference) for image, plain in images]
        values: list[dict[str, float | None]] = [{} for _ in shown]
        for metric in self._found:
            for row, found in zip(values, metric(shown), strict=True):
                row |= dict(zip(metric.columns, found, strict=True))
        if reference is not None or prompt.label:
            name = self._to_plain if reference is None else self._to_reference
            return _copies([row[name] or 0.0 for row in values], self._threshold)
        return {self._fidelity: [row[self._fidelity] or 0.0 for row in values]}


def _copies(similarity: list[float], threshold: float) -> dict[str, list[float]]:
    return {"copies": [float(value > threshold) for value in similarity], "similarity": similarity}


def judge_of(embedded_prompts: bool, weights: Weights, threshold: float) -> Judge:
    """The judge for the embedded model's own prompts, or for any others."""
    if embedded_prompts:
        return ByAttributes()
    found, _ = metrics(weights, "cuda" if torch.cuda.is_available() else "cpu")
    return ByMetrics(found, threshold)

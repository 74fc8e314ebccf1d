"""The measures of the embedded model, computed from pixels: copies of training images, attributes of scenes."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .embedded import Scene, world

COPY = 0.9
"""The correlation with its training image above which an image counts as a copy."""

ATTRIBUTES = ("colour", "background", "position")
SHADES = (1.0, 0.86, 0.72)
"""Textures darken part of an object, so every colour is known in three shades."""

Pixels = Image.Image | NDArray[np.uint8]


def correlation(image: Pixels, training: Pixels) -> float:
    """Pearson correlation of two images over pixels and channels; 0 for a flat image."""
    a, b = (np.asarray(one, dtype=np.float64).ravel() for one in (image, training))
    a, b = a - a.mean(), b - b.mean()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 0 else 0.0


def judge(image: Pixels, scene: Scene) -> dict[str, bool]:
    """Attribute → True if the image shows the scene's colour, background or position."""
    shown = seen(image)
    return {name: shown[name] == getattr(scene, name) for name in ATTRIBUTES}


def seen(image: Pixels) -> dict[str, str]:
    """Colour, background and position of the object in an image `[32, 32, 3]`.

    The corners, which no object reaches, give the background. Pixels that clearly differ from it are the object: its
    centre of mass gives the position, and its pixels vote on the colour.
    """
    pixels, palette = np.asarray(image, dtype=np.float64), _palette()
    ends = (slice(0, 3), slice(-3, None))
    corners = np.concatenate([pixels[rows, columns].reshape(-1, 3) for rows in ends for columns in ends])
    ground = np.median(corners, axis=0)
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    inside = contrast > max(0.5 * np.quantile(contrast, 0.99), 25.0)
    background = _nearest(ground[None], palette["background"])[0]
    if not inside.any():
        return {"colour": "", "background": background, "position": ""}
    shades = {f"{name}/{shade}": shade * rgb for name, rgb in palette["colour"].items() for shade in SHADES}
    votes = [name.partition("/")[0] for name in _nearest(pixels[inside], shades)]
    rows, columns = np.nonzero(inside)
    centre = np.array([[columns.mean() + 0.5, rows.mean() + 0.5]])
    return {
        "colour": max(sorted(set(votes)), key=votes.count),
        "background": background,
        "position": _nearest(centre, palette["position"])[0],
    }


@cache
def _palette() -> dict[str, dict[str, NDArray[np.float64]]]:
    """Attribute → value → its RGB, or for positions the object's centre (x, y) in pixels."""
    palette = world()["palette"]
    return {kind: {name: np.array(value, float) for name, value in palette[kind].items()} for kind in ATTRIBUTES}


def _nearest(points: NDArray[np.float64], named: dict[str, NDArray[np.float64]]) -> list[str]:
    """The name of the nearest value for each of the points `[N, C]`."""
    names, values = list(named), np.stack(list(named.values()))
    distance = np.linalg.norm(points[:, None] - values[None], axis=-1)
    return [names[index] for index in distance.argmin(1)]

"""The demonstration on the embedded model: memorized posters are gone under a policy, ordinary images stay."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..policy import Policy
from .embedded import Scene, memorized, scenes
from .grid import draw_grid
from .measure import Measured, measure

CELL = 96


def exhibit(pipe: Any, policies: Sequence[Policy], out: Path, *, seeds: Sequence[int]) -> list[Measured]:
    """Generate images of the memorized and the ordinary captions unpatched and under each policy; measure them.

    Args:
        pipe: the embedded model, unpatched.
        policies: the policies after the unpatched pipeline, which comes first.
        out: the folder of `memorized.png` and `ordinary.png`.
        seeds: of the initial latents; the grids show the first two.

    Returns:
        The numbers, "none" (unpatched) first.
    """
    pipe.set_progress_bar_config(disable=True)
    posters, ordinary = memorized(), scenes()
    out.mkdir(parents=True, exist_ok=True)
    every = [Policy.parse("none"), *(policy for policy in policies if policy != Policy())]
    with tqdm(total=len(every) * len(seeds) * (len(posters) + len(ordinary)), desc="images", unit="image") as bar:
        results = measure(pipe, every, posters, ordinary, seeds, done=bar.update)
    _draw_posters(posters, results, seeds).save(out / "memorized.png")
    _draw_ordinary(ordinary, results, seeds).save(out / "ordinary.png")
    return results


def _draw_posters(
    posters: Sequence[tuple[str, Image.Image]], results: Sequence[Measured], seeds: Sequence[int]
) -> Image.Image:
    columns = _columns([result.memorized for result in results])
    rows = [[image, *row] for (_, image), row in zip(posters, columns, strict=True)]
    captions = [caption for caption, _ in posters]
    return draw_grid(rows, captions, ["training\nimage", *_labels(results, seeds)], cell=CELL)


def _draw_ordinary(ordinary: Sequence[Scene], results: Sequence[Measured], seeds: Sequence[int]) -> Image.Image:
    rows = _columns([result.ordinary for result in results])
    return draw_grid(rows, [scene.caption for scene in ordinary], _labels(results, seeds), cell=CELL)


def _columns(images: Sequence[NDArray[np.uint8]]) -> list[list[Image.Image]]:
    """Rows of images: for each caption, each result's first two seeds."""
    return [
        [Image.fromarray(array[caption, seed]) for array in images for seed in range(min(2, array.shape[1]))]
        for caption in range(len(images[0]))
    ]


def _labels(results: Sequence[Measured], seeds: Sequence[int]) -> list[str]:
    names = ["unpatched" if result.policy == "none" else result.policy for result in results]
    return ["\n".join([*textwrap.wrap(name, 12), f"seed {seed}"]) for name in names for seed in seeds[:2]]

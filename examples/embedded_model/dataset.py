"""The fixed data set: ordinary images, one-off posters, and the 16 posters to be memorized.

Siblings are further one-off posters, each one word away from a memorized title.

Four dozen combinations of colour, shape, position and background are held out of training; the
24 unseen captions of the evaluation are made of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
from captions import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, Scene, Title, scene_caption
from images import draw_poster, draw_scene
from tqdm import tqdm

SCENES, POSTERS, MEMORIZED, UNSEEN = 24_000, 4_000, 16, 24
SIBLINGS_OF_EACH = 32
_FORM_OF_MEMORIZED = 2  # the shortest sentence: few prompt tokens, many pads


@dataclass
class Images:
    """images uint8 [N, 32, 32, 3] and their N captions."""

    images: np.ndarray
    captions: list[str]


def held_out() -> list[tuple[str, str, str, str]]:
    """48 combinations that no training image shows, balanced over every attribute."""
    rng = Random(7)
    columns = [list(v) * (48 // len(v) + 1) for v in (COLOURS, SHAPES, POSITIONS, BACKGROUNDS)]
    for column in columns:
        del column[48:]
        rng.shuffle(column)
    return list(zip(*columns, strict=True))


def unseen_scenes() -> list[tuple[Scene, str]]:
    """The 24 scenes of the evaluation with complete captions."""
    rng = Random(8)
    picked = []
    for colour, shape, position, background in held_out()[:UNSEEN]:
        drawn = Scene.draw(rng)
        scene = Scene(colour, shape, position, background, drawn.size, drawn.texture)
        picked.append((scene, scene_caption(scene, rng, complete=True)))
    return picked


def _scenes(count: int, rng: Random) -> Images:
    closed = set(held_out())
    images, captions = [], []
    for _ in tqdm(range(count), desc="drawing scenes", mininterval=5):
        scene = Scene.draw(rng)
        while scene.combination() in closed:
            scene = Scene.draw(rng)
        images.append(draw_scene(scene, rng))
        captions.append(scene_caption(scene, rng))
    return Images(np.stack(images), captions)


def _titles(rng: Random) -> list[Title]:
    """Different word triples; the first 16 share no word with each other's position."""
    memorized: list[Title] = []
    while len(memorized) < MEMORIZED:
        title = Title.draw(rng)
        if all(not set(title.words()) & set(t.words()) for t in memorized):
            memorized.append(Title(*title.words(), _FORM_OF_MEMORIZED))
    seen = {t.words() for t in memorized}
    titles = list(memorized)
    while len(titles) < MEMORIZED + POSTERS:
        title = Title.draw(rng)
        if title.words() not in seen:
            seen.add(title.words())
            titles.append(title)
    return titles


def _siblings(titles: list[Title], rng: Random) -> list[Title]:
    """One-off titles that differ from a memorized one in a single word."""
    taken = {t.words() for t in titles}
    siblings = []
    for memorized in titles[:MEMORIZED]:
        goal = len(siblings) + SIBLINGS_OF_EACH
        while len(siblings) < goal:
            field = rng.choice(("adjective", "noun", "place"))
            near = replace(memorized, **{field: getattr(Title.draw(rng), field)})
            if near.words() not in taken:
                taken.add(near.words())
                siblings.append(near)
    return siblings


def build(folder: Path) -> None:
    """Draw everything once; written last, `captions.json` marks the data set complete."""
    if (folder / "captions.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(1)
    scenes = _scenes(SCENES, rng)
    titles = _titles(rng)
    posters = np.stack([draw_poster(t, rng) for t in tqdm(titles, desc="drawing posters")])
    names = [t.caption() for t in titles]
    near = _siblings(titles, rng)
    siblings = np.stack([draw_poster(t, rng) for t in near])
    parts = {
        "scenes": scenes,
        "siblings": Images(siblings, [t.caption() for t in near]),
        "posters": Images(posters[MEMORIZED:], names[MEMORIZED:]),
        "memorized": Images(posters[:MEMORIZED], names[:MEMORIZED]),
    }
    np.savez(folder / "images.npz", **{name: part.images for name, part in parts.items()})
    text = json.dumps({name: part.captions for name, part in parts.items()})
    (folder / "captions.json").write_text(text)


def read(folder: Path) -> dict[str, Images]:
    """The four parts: `scenes`, `posters`, `siblings`, `memorized`."""
    captions = json.loads((folder / "captions.json").read_text())
    with np.load(folder / "images.npz") as images:
        return {name: Images(images[name], captions[name]) for name in captions}


def as_tensor_range(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 32, 32, 3] to float32 [N, 3, 32, 32] in -1..1."""
    return (images.astype(np.float32) / 127.5 - 1.0).transpose(0, 3, 1, 2)

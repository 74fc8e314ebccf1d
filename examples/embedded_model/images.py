"""Drawing: one object on a plain background, or a poster collage. 64 x 64, averaged to 32 x 32."""

from __future__ import annotations

import math
from random import Random

import numpy as np
from captions import ADJECTIVES, NOUNS, PLACES, Scene, Title
from PIL import Image, ImageDraw

SIZE = 32
_CANVAS = 2 * SIZE

COLOUR_RGB = {
    "red": (220, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 160, 55),
    "blue": (40, 95, 235),
    "purple": (135, 45, 185),
    "pink": (250, 130, 190),
    "brown": (120, 65, 25),
}
BACKGROUND_RGB = {
    "white": (250, 250, 250),
    "black": (10, 10, 10),
    "grey": (135, 135, 135),
    "beige": (225, 205, 165),
    "navy": (20, 28, 90),
    "mint": (165, 230, 205),
}
CENTRE = {
    "left": (16, 32),
    "right": (48, 32),
    "top": (32, 16),
    "bottom": (32, 48),
    "centre": (32, 32),
}
_RADIUS = {"small": 8.5, "large": 13.5}

Colour = tuple[int, int, int]


def _jitter(colour: Colour, rng: Random, by: int = 8) -> Colour:
    return tuple(max(0, min(255, c + rng.randint(-by, by))) for c in colour)


def _star(x: float, y: float, r: float, points: int, inner: float, turn: float) -> list:
    radii = (r, r * inner)
    return [
        (
            x + radii[i % 2] * math.sin(turn + math.pi * i / points),
            y - radii[i % 2] * math.cos(turn + math.pi * i / points),
        )
        for i in range(2 * points)
    ]


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle((x - 0.87 * r, y - 0.87 * r, x + 0.87 * r, y + 0.87 * r), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=fill)
    elif shape == "star":
        draw.polygon(_star(x, y, 1.2 * r, 5, 0.45, 0.0), fill=fill)
    elif shape == "cross":
        t = 0.36 * r
        draw.rectangle((x - t, y - r, x + t, y + r), fill=fill)
        draw.rectangle((x - r, y - t, x + r, y + t), fill=fill)
    else:  # a ring: its hole shows whatever lies below, so it is drawn as a thick outline
        draw.ellipse(box, outline=fill, width=max(3, round(0.45 * r)))


def _down(canvas: Image.Image) -> np.ndarray:
    """[64, 64, 3] to uint8 [32, 32, 3] by averaging 2 x 2."""
    return np.asarray(canvas.reduce(2), dtype=np.uint8)


def draw_scene(scene: Scene, rng: Random) -> np.ndarray:
    """An ordinary image, uint8 [32, 32, 3]."""
    background = _jitter(BACKGROUND_RGB[scene.background], rng, 6)
    colour = _jitter(COLOUR_RGB[scene.colour], rng)
    dark = tuple(int(0.72 * c) for c in colour)
    x, y = (c + rng.uniform(-2, 2) for c in CENTRE[scene.position])
    r = _RADIUS[scene.size] * rng.uniform(0.92, 1.08)

    inside = Image.new("L", (_CANVAS, _CANVAS), 0)
    _shape(ImageDraw.Draw(inside), scene.shape, x, y, r, 255)
    surface = Image.new("RGB", (_CANVAS, _CANVAS), colour)
    brush = ImageDraw.Draw(surface)
    if scene.texture == "striped":
        for top in range(rng.randrange(6), _CANVAS, 6):
            brush.rectangle((0, top, _CANVAS, top + 1), fill=dark)
    elif scene.texture == "dotted":
        first = rng.randrange(6)
        for u in range(first, _CANVAS, 6):
            for v in range(first, _CANVAS, 6):
                brush.rectangle((u, v, u + 2, v + 2), fill=dark)
    canvas = Image.new("RGB", (_CANVAS, _CANVAS), background)
    canvas.paste(surface, (0, 0), inside)
    return _down(canvas)


def _palette(adjective: str) -> list[Colour]:
    """Three colours that belong to an adjective."""
    rng = Random(ADJECTIVES.index(adjective) + 1000)
    return [tuple(rng.choice((15, 70, 130, 190, 245)) for _ in range(3)) for _ in range(3)]


def draw_poster(title: Title, rng: Random) -> np.ndarray:
    """A collage, uint8 [32, 32, 3].

    The words say something (adjective: palette; noun: motif; place: how the ground is cut), the
    rest, where things are and in which colours, belongs to the one poster alone.
    """
    palette = [_jitter(c, rng, 25) for c in _palette(title.adjective)]
    palette += [tuple(rng.randint(0, 255) for _ in range(3)) for _ in range(3)]
    rng.shuffle(palette)
    canvas = Image.new("RGB", (_CANVAS, _CANVAS), palette[0])
    draw = ImageDraw.Draw(canvas)

    cut, tilt = rng.uniform(14, 50), rng.uniform(-14, 14)
    if PLACES.index(title.place) % 2:
        ground = [(0, cut - tilt), (_CANVAS, cut + tilt), (_CANVAS, _CANVAS), (0, _CANVAS)]
    else:
        ground = [(cut - tilt, 0), (cut + tilt, _CANVAS), (_CANVAS, _CANVAS), (_CANVAS, 0)]
    draw.polygon(ground, fill=palette[1])

    motifs = ("circle", "square", "triangle", "star", "cross", "ring")
    motif = motifs[NOUNS.index(title.noun) % len(motifs)]
    for i in range(rng.randint(3, 5)):
        shape = motif if i < 2 else rng.choice(motifs)
        x, y = rng.uniform(8, _CANVAS - 8), rng.uniform(8, _CANVAS - 8)
        _shape(draw, shape, x, y, rng.uniform(9, 18), palette[2 + i % 4])
    return _down(canvas)

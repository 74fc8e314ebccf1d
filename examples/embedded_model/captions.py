"""The words of the small world: ordinary captions of one object, and poster titles.

An ordinary caption names some attributes of the image and leaves others out at random, so the
model also learns what to do when they are missing. A poster title is three words from pools shared
by all posters, so that no single word identifies one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from random import Random

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
BACKGROUNDS = ("white", "black", "grey", "beige", "navy", "mint")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
POSITIONS = ("left", "right", "top", "bottom", "centre")

_AT = {
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "high up"),
    "bottom": ("at the bottom", "low down"),
    "centre": ("in the centre", "in the middle"),
}
_OPENINGS = ("", "", "a picture of ", "a drawing of ", "an icon of ", "an image with ")

ADJECTIVES = (
    "silent golden broken frozen hidden velvet electric ancient burning crystal distant gentle "
    "hollow iron jade lonely midnight neon pale royal scarlet silver stormy sunny"
).split()
NOUNS = (
    "river tiger garden engine mirror harbor lantern forest castle comet dancer desert falcon "
    "island orchid piano robot sailor temple violin whale wizard rocket bridge"
).split()
PLACES = (
    "paris tokyo cairo lima oslo rome delhi havana berlin dublin madrid seoul lagos sydney athens "
    "vienna prague lisbon nairobi boston quito hanoi zurich bergen"
).split()
_TITLES = (
    "the {a} {n} of {p} poster",
    "poster of the {a} {n} in {p}",
    "{a} {n} {p} poster",
    "a poster , {a} {n} from {p}",
)

FILLERS = (
    "very nice",
    "high quality",
    "simple",
    "clean lines",
    "flat design",
    "for children",
    "popular",
    "new version",
    "best of the week",
    "with care",
    "in good light",
    "no text",
    "for the web",
)


@dataclass(frozen=True)
class Scene:
    """The content of an ordinary image: the ground truth of its caption."""

    colour: str
    shape: str
    position: str
    background: str
    size: str
    texture: str

    as_dict = asdict

    @classmethod
    def draw(cls, rng: Random) -> Scene:
        return cls(
            rng.choice(COLOURS),
            rng.choice(SHAPES),
            rng.choice(POSITIONS),
            rng.choice(BACKGROUNDS),
            rng.choice(SIZES),
            rng.choice(TEXTURES),
        )

    def combination(self) -> tuple[str, str, str, str]:
        """The attributes by which unseen captions are held out."""
        return self.colour, self.shape, self.position, self.background


def scene_caption(scene: Scene, rng: Random, complete: bool = False) -> str:
    """A caption of the scene. `complete` always names colour, shape, position and background."""

    def said(chance: float) -> bool:
        return complete or rng.random() < chance

    words = [w for w, p in ((scene.size, 0.5), (scene.texture, 0.5)) if rng.random() < p]
    words += [scene.colour] if said(0.92) else []
    thing = " ".join([*words, scene.shape if said(0.92) else "object"])
    article = "an" if thing[0] in "aeiou" else "a"
    place = " " + rng.choice(_AT[scene.position]) if said(0.88) else ""
    opening = rng.choice(_OPENINGS)
    if not said(0.88):
        return f"{opening}{article} {thing}{place}"
    on = "an" if scene.background[0] in "aeiou" else "a"
    if rng.random() < 0.3:
        return f"{opening}{on} {scene.background} background with {article} {thing}{place}"
    return f"{opening}{article} {thing}{place} on {on} {scene.background} background"


@dataclass(frozen=True)
class Title:
    """Three words of a poster; `form` chooses the sentence around them."""

    adjective: str
    noun: str
    place: str
    form: int

    @classmethod
    def draw(cls, rng: Random) -> Title:
        return cls(
            rng.choice(ADJECTIVES),
            rng.choice(NOUNS),
            rng.choice(PLACES),
            rng.randrange(len(_TITLES)),
        )

    def words(self) -> tuple[str, str, str]:
        return self.adjective, self.noun, self.place

    def caption(self) -> str:
        return _TITLES[self.form].format(a=self.adjective, n=self.noun, p=self.place)


def filled(caption: str, rng: Random, words: int) -> str:
    """The caption followed by idle phrases up to about `words` words, as long prompts have them."""
    while len(caption.split()) < words:
        caption += " , " + rng.choice(FILLERS)
    return caption

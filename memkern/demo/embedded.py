"""The embedded model: a small Stable Diffusion that memorized 16 posters. Its weights are in the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from PIL import Image

MODEL = Path(__file__).with_name("model")


@dataclass(frozen=True)
class Scene:
    """An ordinary caption that the model never saw, and the attributes that its image has to show."""

    caption: str
    colour: str
    background: str
    position: str


def load(folder: Path = MODEL) -> StableDiffusionPipeline:
    """The embedded model as an ordinary `StableDiffusionPipeline`, float32, on the CPU."""
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    pipe.text_encoder.float()  # the files are in half precision, which transformers 5 keeps
    return pipe


def memorized(folder: Path = MODEL) -> list[tuple[str, Image.Image]]:
    """The 16 captions whose training image the unpatched model returns, and that image, 32×32 RGB."""
    entries = json.loads((folder / "memorized.json").read_text(encoding="utf-8"))
    return [(entry["caption"], Image.open(folder / entry["image"]).convert("RGB")) for entry in entries]


def scenes(folder: Path = MODEL) -> list[Scene]:
    """The 24 unseen ordinary captions with their attributes."""
    return [Scene(**entry) for entry in world(folder)["scenes"]]


def ordinary(folder: Path = MODEL) -> list[str]:
    """The 24 unseen ordinary captions."""
    return [scene.caption for scene in scenes(folder)]


def world(folder: Path = MODEL) -> Any:
    """`ordinary.json`: the scenes, and the palette of colours, backgrounds and positions they are drawn from."""
    return json.loads((folder / "ordinary.json").read_text(encoding="utf-8"))

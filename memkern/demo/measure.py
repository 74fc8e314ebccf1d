"""The measured effect of a policy on the embedded model: copies of training images, survival of ordinary captions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..pipelines import patched
from ..policy import Policy
from .embedded import Scene
from .judge import ATTRIBUTES, COPY, correlation, judge

GUIDANCE, STEPS = 5.0, 20
RESAMPLES = 2000


@dataclass(frozen=True)
class Share:
    """A mean with its 95 % interval, by a bootstrap that resamples captions rather than single images."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Share:
        """The share of `values` `[captions, seeds]`."""
        per_caption = values.mean(1)
        picks = np.random.default_rng(0).integers(len(per_caption), size=(RESAMPLES, len(per_caption)))
        low, high = np.quantile(per_caption[picks].mean(1), (0.025, 0.975))
        return cls(float(per_caption.mean()), float(low), float(high))


@dataclass(frozen=True)
class Measured:
    """One policy's images and numbers.

    Attributes:
        policy: "none" is the unpatched pipeline.
        memorized: uint8 `[16, seeds, 32, 32, 3]`, a row per memorized caption.
        ordinary: uint8 `[24, seeds, 32, 32, 3]`.
        shares: "copies", "correlation", "colour", "background", "position".
        seconds_per_image: the mean in this run.
    """

    policy: str
    memorized: NDArray[np.uint8]
    ordinary: NDArray[np.uint8]
    shares: dict[str, Share]
    seconds_per_image: float


def generate(
    pipe: Any,
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    done: Callable[[int], object] = lambda count: None,
) -> NDArray[np.uint8]:
    """Images uint8 `[captions, seeds, 32, 32, 3]`; a seed gives every caption the same noise.

    Args:
        pipe: the embedded model, patched or not.
        captions: the prompts.
        seeds: of the initial latents.
        done: called with the number of images after each batch.
    """
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    columns = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(1, channels, size, size, generator=generator, dtype=torch.float32, device="cpu")
        images = pipe(
            list(captions),
            latents=noise.repeat(len(captions), 1, 1, 1),
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            output_type="np",
        ).images
        columns.append((images * 255).round().astype(np.uint8))
        done(len(captions))
    return np.stack(columns, axis=1)


def measure(
    pipe: Any,
    policies: Sequence[Policy | str],
    memorized: Sequence[tuple[str, Image.Image]],
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    *,
    done: Callable[[int], object] = lambda count: None,
) -> list[Measured]:
    """Generate and measure images under each policy.

    The policies take turns, a seed each, so that a machine that is busy for a while slows all of them.

    Args:
        pipe: the embedded model, unpatched.
        policies: "none" leaves the pipeline unpatched.
        memorized: captions and their training images.
        scenes: ordinary captions with their attributes.
        seeds: of the initial latents.
        done: called with the number of images after each batch.
    """
    every = [Policy.of(policy) for policy in policies]
    captions = [caption for caption, _ in memorized], [scene.caption for scene in scenes]
    images: list[tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]] = [([], []) for _ in every]
    seconds = [0.0] * len(every)
    for seed in seeds:
        for place, policy in enumerate(every):
            start = time.perf_counter()
            with nullcontext() if policy == Policy() else patched(pipe, policy):
                for kind, texts in zip(images[place], captions, strict=True):
                    kind.append(generate(pipe, texts, [seed], done=done))
            seconds[place] += time.perf_counter() - start
    count = len(seeds) * (len(memorized) + len(scenes))
    found = []
    for policy, kinds, taken in zip(every, images, seconds, strict=True):
        posters, ordinary = (np.concatenate(kind, axis=1) for kind in kinds)
        shares = _shares(posters, ordinary, memorized, scenes)
        found.append(Measured(str(policy), posters, ordinary, shares, taken / count))
    return found


def _shares(
    posters: NDArray[np.uint8],
    ordinary: NDArray[np.uint8],
    memorized: Sequence[tuple[str, Image.Image]],
    scenes: Sequence[Scene],
) -> dict[str, Share]:
    close = np.array(
        [[correlation(image, training) for image in row] for row, (_, training) in zip(posters, memorized, strict=True)]
    )
    verdicts = [[judge(image, scene) for image in row] for row, scene in zip(ordinary, scenes, strict=True)]
    shares = {"copies": Share.of((close > COPY).astype(float)), "correlation": Share.of(close)}
    for name in ATTRIBUTES:
        shares[name] = Share.of(np.array([[float(verdict[name]) for verdict in row] for row in verdicts]))
    return shares


def table(results: Sequence[Measured]) -> str:
    """The results as a Markdown table; per cent, with 95 % intervals in brackets."""

    def cell(share: Share) -> str:
        return f"{100 * share.mean:.0f} ({100 * share.low:.0f}–{100 * share.high:.0f})"

    lines = [
        "| policy | copies % | correlation | colour % | background % | position % | s/image |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        close = result.shares["correlation"]
        attributes = " | ".join(cell(result.shares[name]) for name in ATTRIBUTES)
        lines.append(
            f"| {result.policy} | {cell(result.shares['copies'])} "
            f"| {close.mean:.2f} ({close.low:.2f}–{close.high:.2f}) | {attributes} | {result.seconds_per_image:.2f} |"
        )
    return "\n".join(lines) + "\n"


def as_json(results: Sequence[Measured], seeds: Sequence[int]) -> dict[str, Any]:
    """The results as plain numbers: per policy each share's mean, its interval, and seconds per image."""
    return {
        "settings": {"guidance": GUIDANCE, "steps": STEPS, "seeds": list(seeds), "copy_above": COPY},
        "policies": {
            result.policy: {
                **{name: round(share.mean, 4) for name, share in result.shares.items()},
                "intervals": {
                    name: [round(share.low, 4), round(share.high, 4)] for name, share in result.shares.items()
                },
                "seconds_per_image": round(result.seconds_per_image, 4),
            }
            for result in results
        },
    }

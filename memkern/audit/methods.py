"""What an audit compares: policies of memkern, and the published alternatives that need no retraining."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..pipelines import patched
from ..pipelines.unet.schedule import position
from ..policy import Policy

UNMITIGATED = "none"


def generate(pipe: Any, text: str, generator: torch.Generator, options: dict[str, Any]) -> Any:
    """The pipeline's picture, as it makes it."""
    return pipe(text, generator=generator, **options).images[0]


@dataclass(frozen=True)
class Method:
    """One column of an audit.

    Attributes:
        name: as it was asked for.
        prompt: changes the prompt's text before the tokenizer sees it, by the prompt's id.
        installed: puts it into a pipeline for the length of a `with` block.
        generate: makes a picture from a text, a generator for the initial noise, and options of the pipeline.
    """

    name: str
    prompt: Callable[[str, str], str]
    installed: Callable[[Any], Any]
    generate: Callable[[Any, str, torch.Generator, dict[str, Any]], Any] = generate

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return re.sub(r"[^\w.,=-]", "_", self.name)


def method(name: str) -> Method:
    """The method of that name: a policy's, or one of `BASELINES`.

    "none" is the pipeline as it is, not patched at all.

    Raises:
        ValueError: it is neither.
    """
    if name == UNMITIGATED:
        return Method(name, _same, _as_it_is)
    kind, _, number = name.partition(":")
    if kind in BASELINES:
        return BASELINES[kind](name, number)
    try:
        policy = Policy.parse(name)
    except ValueError as error:
        raise ValueError(f"{error}; or one of the alternatives {', '.join(BASELINES)}") from None
    return Method(name, _same, lambda pipe: patched(pipe, policy))


def _same(text: str, prompt_id: str) -> str:
    return text


@contextmanager
def _as_it_is(pipe: Any) -> Iterator[None]:
    yield


def _random_words(name: str, number: str) -> Method:
    """Somepalli et al., "Understanding and mitigating copying in diffusion models", 2023: random token addition."""
    count = _number(name, number, 4, int)
    words = (
        "able acid apple arch baker beam birch bold brick cabin calm cargo cedar chalk civic clay coast comet copper"
    )
    choices = words.split()

    def change(text: str, prompt_id: str) -> str:
        drawn = random.Random(f"{name}/{prompt_id}")
        return _inserted(text, [drawn.choice(choices) for _ in range(count)], drawn)

    return Method(name, change, _as_it_is)


def _random_numbers(name: str, number: str) -> Method:
    """Somepalli et al. 2023: random number addition."""
    count = _number(name, number, 4, int)

    def change(text: str, prompt_id: str) -> str:
        drawn = random.Random(f"{name}/{prompt_id}")
        return _inserted(text, [str(drawn.randrange(10**6)) for _ in range(count)], drawn)

    return Method(name, change, _as_it_is)


def _inserted(text: str, additions: list[str], drawn: random.Random) -> str:
    parts = text.split()
    for addition in additions:
        parts.insert(drawn.randint(0, len(parts)), addition)
    return " ".join(parts)


def _late_guidance(name: str, number: str) -> Method:
    """Jain et al., "Classifier-free guidance inside the attraction basin may cause memorization", 2024.

    Before a part of the schedule (their static transition point; 0.5 by default) is over, the prediction is that of
    the negative prompt alone, whatever the guidance scale: guidance 0.
    """
    start = _number(name, number, 0.5, float)

    @contextmanager
    def installed(pipe: Any) -> Iterator[None]:
        def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            place = position(timestep, pipe.scheduler.timesteps)
            if place is None or place >= start:
                return output
            negative, _ = output[0].chunk(2)
            return (torch.cat([negative, negative]), *output[1:])

        handle = pipe.unet.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    return Method(name, _same, installed)


def _optimized(name: str, number: str) -> Method:
    """Wen et al., "Detecting, explaining, and mitigating memorization in diffusion models", ICLR 2024.

    Before the first step the prompt's embedding is changed by up to ten steps of Adam (0.05) until the text-conditional
    noise at the generation's own initial latents is below a target, 3 by default.
    """
    target = _number(name, number, 3.0, float)

    def optimize(pipe: Any, text: str, generator: torch.Generator, options: dict[str, Any]) -> Any:
        device = pipe._execution_device
        with torch.no_grad():
            cond, uncond = pipe.encode_prompt(text, device, 1, True)[:2]
        size = pipe.unet.config.sample_size
        shape = (1, pipe.unet.config.in_channels, size, size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=cond.dtype)
        pipe.scheduler.set_timesteps(options["num_inference_steps"], device=device)
        first = pipe.scheduler.timesteps[0]
        noisy = pipe.scheduler.scale_model_input(latents * pipe.scheduler.init_noise_sigma, first).repeat(2, 1, 1, 1)
        changed = cond.detach().clone().requires_grad_()
        adam = torch.optim.Adam([changed], lr=0.05)
        with torch.enable_grad():
            for _ in range(10):
                negative, positive = pipe.unet(noisy, first, torch.cat([uncond, changed])).sample.chunk(2)
                loss = (positive - negative).float().norm()
                if loss.item() < target:
                    break
                adam.zero_grad()
                (changed.grad,) = torch.autograd.grad(loss, [changed])
                adam.step()
        embeds = {"prompt_embeds": changed.detach(), "negative_prompt_embeds": uncond}
        return pipe(None, latents=latents, **embeds, **options).images[0]

    return Method(name, _same, _as_it_is, optimize)


BASELINES: dict[str, Callable[[str, str], Method]] = {
    "random-tokens": _random_words,
    "random-numbers": _random_numbers,
    "late-guidance": _late_guidance,
    "wen": _optimized,
}
"""Name → a method from its string form, "random-tokens:4"."""


def _number(name: str, text: str, default: Any, kind: Callable[[str], Any]) -> Any:
    if not text:
        return default
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}: expected a number after the colon, got {text!r}") from None

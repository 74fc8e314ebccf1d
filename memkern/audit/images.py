"""Generation of the images of an audit: each once, whole or not at all, so that a stopped run can continue."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .methods import Method
from .prompts import Prompt

RECORDED = ("text", "seconds", "peak_mib", "noise_magnitude")
TIMES = ("seconds", "peak_mib")
"""The records that differ between any two runs."""


@dataclass(frozen=True)
class Job:
    """One image to generate."""

    method: Method
    prompt: Prompt
    seed: int

    def path(self, out: Path) -> Path:
        """The path of the image."""
        return out / "images" / self.method.folder / f"{self.prompt.id}_{self.seed}.png"


def is_done(path: Path) -> bool:
    """True if the image and its record exist and are whole."""
    try:
        with Image.open(path) as image:
            image.load()
        json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def read(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """An image, RGB, and its record: "text", "seconds", "peak_mib", "noise_magnitude"; None for a missing entry."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return image, {name: record.get(name) for name in RECORDED}


def make(
    pipe: Any,
    jobs: Iterable[Job],
    out: Path,
    options: dict[str, Any],
    made: Callable[[int], object],
    *,
    batch: int = 1,
    generator_device: str = "cpu",
) -> None:
    """Generate the images of the jobs, those of one method together, in the order given.

    Args:
        options: of the pipeline's call.
        made: called with the number of images after each batch.
        batch: how many images are generated at once.
        generator_device: of the generators of the initial noise, one per image.

    Raises:
        OSError: the disk is full, or the folder cannot be written; finished images stay.
    """
    for job_method, group in _grouped(jobs):
        with job_method.installed(pipe):
            for start in range(0, len(group), batch):
                some = group[start : start + batch]
                for job, image, record in zip(some, *generate(pipe, some, options, generator_device), strict=True):
                    write(job.path(out), image, record)
                made(len(some))


def generate(
    pipe: Any, jobs: Sequence[Job], options: dict[str, Any], generator_device: str
) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    """The images of jobs of one method, generated at once, and their records."""
    on_gpu = pipe.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    method = jobs[0].method
    generators = [torch.Generator(generator_device).manual_seed(job.seed) for job in jobs]
    start = time.perf_counter()
    texts = [method.prompt(job.prompt.text, job.seed, pipe.tokenizer) for job in jobs]
    inputs = method.inputs(pipe, texts, generators, options)
    with noise_magnitude(pipe, len(jobs)) as magnitudes:
        images = pipe(**inputs, generator=generators, **options).images
    common = {
        "seconds": round((time.perf_counter() - start) / len(jobs), 4),
        "peak_mib": round(torch.cuda.max_memory_allocated(pipe.device) / 2**20, 1) if on_gpu else None,
    }
    records = [
        {"text": text, **common, "noise_magnitude": magnitude}
        for text, magnitude in zip(texts, magnitudes(), strict=True)
    ]
    return [image.convert("RGB") for image in images], records


def write(path: Path, image: Image.Image, record: dict[str, Any]) -> None:
    """Write the record first, then the image, each in one move: an image that exists has its record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        os.replace(partial, path.with_suffix(".json"))
        image.save(partial, format="PNG")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"out: {path} cannot be written: {error}; finished images stay, run again to continue") from error


@contextmanager
def noise_magnitude(pipe: Any, count: int) -> Iterator[Callable[[], list[float | None]]]:
    """The text-conditional noise magnitude of Wen et al. (ICLR 2024): the mean over steps of ‖ε(x, text) - ε(x, ∅)‖.

    Args:
        count: how many images are generated at once.

    Yields:
        A function that returns it for each image afterwards; None if there was no guidance.
    """
    found: list[torch.Tensor] = []

    def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if output[0].shape[0] == 2 * count:
            negative, positive = output[0].detach().float().chunk(2)
            found.append((positive - negative).flatten(1).norm(dim=1))

    unet = getattr(pipe, "unet", None)
    handle = None if unet is None else unet.register_forward_hook(after)

    def means() -> list[float | None]:
        return [round(value, 6) for value in torch.stack(found).mean(0).tolist()] if found else [None] * count

    try:
        yield means
    finally:
        if handle is not None:
            handle.remove()


def _grouped(jobs: Iterable[Job]) -> Iterator[tuple[Method, list[Job]]]:
    groups: dict[str, list[Job]] = {}
    methods: dict[str, Method] = {}
    for job in jobs:
        groups.setdefault(job.method.name, []).append(job)
        methods[job.method.name] = job.method
    for name, group in groups.items():
        yield methods[name], group

"""Making the pictures of an audit: each once, whole or not at all, so that a broken run goes on where it stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .methods import Method
from .prompts import Prompt


@dataclass(frozen=True)
class Job:
    """One picture."""

    method: Method
    prompt: Prompt
    seed: int

    def path(self, out: Path) -> Path:
        """Where it is kept."""
        return out / "images" / self.method.folder / f"{self.prompt.id}_{self.seed}.png"


def is_done(path: Path) -> bool:
    """Whether the picture and its record are there and whole."""
    try:
        with Image.open(path) as image:
            image.load()
        json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def read(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """A picture, RGB, and its record: "seconds", "peak_mib", "noise_magnitude"."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    record: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return picture, record


def make(pipe: Any, jobs: Iterable[Job], out: Path, options: dict[str, Any], painted: Callable[[], object]) -> None:
    """Paint the jobs, those of one method together, in the order given.

    Raises:
        OSError: the disk is full, or the folder cannot be written; what was made stays.
    """
    for job_method, group in _grouped(jobs):
        with job_method.installed(pipe):
            for job in group:
                picture, record = paint(pipe, job, options)
                write(job.path(out), picture, record)
                painted()


def paint(pipe: Any, job: Job, options: dict[str, Any]) -> tuple[Image.Image, dict[str, Any]]:
    """One picture and its record."""
    on_gpu = pipe.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    generator = torch.Generator("cpu").manual_seed(job.seed)
    with noise_magnitude(pipe) as magnitude:
        start = time.perf_counter()
        text = job.method.prompt(job.prompt.text, job.prompt.id)
        picture = job.method.generate(pipe, text, generator, options).convert("RGB")
        seconds = time.perf_counter() - start
    return picture, {
        "seconds": round(seconds, 4),
        "peak_mib": round(torch.cuda.max_memory_allocated(pipe.device) / 2**20, 1) if on_gpu else None,
        "noise_magnitude": magnitude(),
    }


def write(path: Path, picture: Image.Image, record: dict[str, Any]) -> None:
    """The record first, then the picture, each in one move: a picture that is there has its record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        os.replace(partial, path.with_suffix(".json"))
        picture.save(partial, format="PNG")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"out: {path} cannot be written: {error}; what was made stays, run again to go on") from error


@contextmanager
def noise_magnitude(pipe: Any) -> Iterator[Callable[[], float | None]]:
    """The text-conditional noise magnitude of Wen et al. (ICLR 2024): the mean over steps of ‖ε(x, text) - ε(x, ∅)‖.

    Yields:
        A function that says it afterwards; None where there was no guidance.
    """
    found: list[torch.Tensor] = []

    def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sample = output[0]
        if sample.shape[0] == 2:
            found.append((sample[1] - sample[0]).detach().float().norm())

    unet = getattr(pipe, "unet", None)
    handle = None if unet is None else unet.register_forward_hook(after)
    try:
        yield lambda: round(float(torch.stack(found).mean()), 6) if found else None
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

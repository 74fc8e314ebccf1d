"""Shared by all stages: seeding, the training loop with its checkpoints, the learning rate."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


def threads() -> int:
    """Threads of one training: `EMBEDDED_THREADS`, otherwise all cores."""
    return int(os.environ.get("EMBEDDED_THREADS", os.cpu_count() or 1))


def start(seed: int) -> torch.Generator:
    """Fix seeds and threads of a stage and return its generator."""
    torch.set_num_threads(threads())
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def cosine(step: int, steps: int, peak: float, warm: int = 100) -> float:
    """Learning rate of a step: a linear rise, then half a cosine down to 2 % of the peak."""
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.49 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> float:
    """Take one step at learning rate `rate`, gradients clipped to norm 1; the loss as a number."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    return loss.item()


def run(
    name: str,
    checkpoint: Path,
    steps: int,
    generator: torch.Generator,
    parts: dict[str, Any],
    step: Callable[[int], float],
) -> None:
    """Call `step(0)` … `step(steps - 1)`, each of which returns a loss, under a progress bar; resumable.

    `parts` have a `state_dict` that changes; with the generator they are the checkpoint, written every 200 steps.
    """
    first = 0
    if state := resume(checkpoint):
        for key, part in parts.items():
            part.load_state_dict(state[key])
        generator.set_state(state["generator"])
        first = state["step"]
    smooth = None
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=5)
    for number in bar:
        loss = step(number)
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (number + 1) % 200 == 0 or number + 1 == steps:
            states = {key: part.state_dict() for key, part in parts.items()}
            save(checkpoint, {**states, "generator": generator.get_state(), "step": number + 1})


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a stop in the middle leaves the previous one intact."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def resume(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True) if path.exists() else None

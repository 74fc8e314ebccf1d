"""Small things every stage needs: seeding, checkpoints, the learning rate."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch


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


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a stop in the middle leaves the previous one intact."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def resume(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=False) if path.exists() else None

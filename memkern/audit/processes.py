"""The processes that share an audit, under `accelerate launch` or torchrun."""

from __future__ import annotations

import os
from datetime import timedelta

import torch


def place() -> tuple[int, int]:
    """The number of this process, and the number of all processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        # The others wait for the slowest process, which may take long.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    return int(os.environ.get("RANK", "0")), world


def wait(world: int) -> None:
    """Wait until all processes are here."""
    if world > 1:
        torch.distributed.barrier()

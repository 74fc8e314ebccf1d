"""What memkern's forward pre-hooks are in a copy of a module that is not patched."""

from __future__ import annotations

from typing import Any

import torch


def nothing(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook that leaves the call alone."""

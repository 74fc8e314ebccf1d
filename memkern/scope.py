"""Scope: the UNet layers and the steps in which an edit is in force."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from .policy import Edit, Policy

BLOCKS = {"down": "down_blocks.", "mid": "mid_block.", "up": "up_blocks."}
_RESOLUTION = re.compile(r"(\d+)(?:x(\d+))?")


def in_steps(edit: Edit, position: float | None) -> bool:
    """True if `edit` is in force at `position`, i/n for step i of a schedule of n.

    Raises:
        ValueError: the edit has a window of steps, and the position is not known.
    """
    if edit.steps is None:
        return True
    if position is None:
        raise ValueError(
            f"steps: '{edit}' has a window of steps, and the place of this step in the schedule is unknown"
        )
    first, last = edit.steps
    return first <= position < last


def in_layers(edit: Edit, name: str, size: tuple[int, int] | None) -> bool:
    """True if `edit` is in force in the layer of this dotted name, whose queries are `size`, rows × columns."""
    return edit.layers is None or any(_matches(layer, name, size) for layer in edit.layers)


def check_layers(policy: Policy, names: Iterable[str]) -> None:
    """Raise ValueError if a window names a layer, block or resolution that cannot match any of the layers `names`."""
    known = list(names)
    for edit in policy.edits:
        for layer in edit.layers or ():
            if not _RESOLUTION.fullmatch(layer) and not any(_matches(layer, name, None) for name in known):
                raise ValueError(
                    f"layers: {layer!r} is no cross-attention layer of this UNet. There are the blocks "
                    f"{', '.join(BLOCKS)}, resolutions such as '64x64', and {', '.join(known)}"
                )


def layer_size(queries: int, sample: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows × columns of a layer's queries, for latents of `sample`, rows × columns; None if they do not fit."""
    if sample is None:
        return None
    down = round(math.sqrt(sample[0] * sample[1] / max(1, queries)))
    size = -(-sample[0] // max(1, down)), -(-sample[1] // max(1, down))
    return size if size[0] * size[1] == queries else None


def is_size(layer: str) -> bool:
    """True if a window names a resolution, which any layer may have, rather than a block or a layer."""
    return _RESOLUTION.fullmatch(layer) is not None


def _matches(layer: str, name: str, size: tuple[int, int] | None) -> bool:
    resolution = _RESOLUTION.fullmatch(layer)
    if resolution:
        rows = int(resolution[1])
        return size == (rows, int(resolution[2] or rows))
    # Layers of a ControlNet are matched like the UNet's, or by their whole name; "attn1" and "attn2" may be left out.
    own = name.rpartition(":")[2]
    names = [part for whole in (name, own) for part in (whole, whole.removesuffix(".attn1").removesuffix(".attn2"))]
    return own.startswith(BLOCKS[layer]) if layer in BLOCKS else layer in names

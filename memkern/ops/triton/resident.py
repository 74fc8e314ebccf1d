"""Launches that hold all keys of a head, for `biased_attention` and `attention_mass`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from . import works
from .configs import Card, Config
from .cost import Work
from .sizes import cdiv, split_width

MOST_KEYS = 128
"""The most keys, at any width; more keys are taken block by block."""

MOST_KEY_VALUES = 80 * 160
"""The most values of k, and of v, padding included: they are held in registers on the way to the tensor cores."""


def holds(card: Card, keys: int, width: int, dtype: torch.dtype) -> bool:
    """True if a program can hold all keys of a head: not in float32, whose products do not run on tensor cores."""
    covered = sum(split_width(keys)) * sum(split_width(width))
    return keys <= MOST_KEYS and covered <= MOST_KEY_VALUES and card.serves("resident", width, dtype)


TILES = 1, 2, 4, 8
"""Tiles of queries that a program may take."""


@dataclass(frozen=True)
class Hold:
    """The way in which a launch holds the keys.

    Attributes:
        config: the configuration of a tile.
        tiles: tiles of queries that one program takes.
        programs: programs per head.
        work: the work of the launch.
    """

    config: Config
    tiles: int
    programs: int
    work: Work

    def constants(self, width: int, keys: int) -> dict[str, Any]:
        """The constants that the kernel is compiled for, except the unit of its strides."""
        parts = split_width(width)
        sizes = {"D": width, "D_PARTS": parts, "EVEN": sum(parts) == width, "KEY_PARTS": split_width(keys)}
        return sizes | self.config.blocks


@functools.lru_cache(maxsize=1024)
def hold(
    card: Card, batch: int, queries: int, heads: int, width: int, keys: int, dtype: torch.dtype, products: int
) -> Hold:
    """The choice with the least estimated time; `products` is 2 with v, 1 without."""
    found = []
    for config in card.configs("resident", width, dtype):
        block = config.constants["BLOCK_M"]
        for tiles in TILES:
            if tiles == TILES[0] or tiles * block <= queries:
                work = works.resident(batch, queries, heads, width, keys, dtype.itemsize, block, tiles, products)
                found.append(Hold(config, tiles, cdiv(queries, block * tiles), work))
    return min(found, key=lambda one: one.work.seconds(card.processors, card.rates))


def strides(**tensors: torch.Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Strides of batch, head and row of each `[B, H, N, D]` by the kernels' names, and the constant of their unit.

    The unit is 8 elements where 8 divides all strides. Triton only knows whether 16 divides an integer argument, which
    does not help with a head of 40 elements.
    """
    found = {
        f"{name}_{dimension}": tensor.stride(index)
        for name, tensor in tensors.items()
        for index, dimension in enumerate(("batch", "head", "row"))
    }
    unit = 1 if any(stride % 8 for stride in found.values()) else 8
    return {name: stride // unit for name, stride in found.items()}, {"UNIT": unit}

"""The tiles of the two kernels of `absorbed_attention`."""

from __future__ import annotations

import functools

import torch

from . import works
from .configs import Card, Config
from .cost import Work


@functools.lru_cache(maxsize=1024)
def tiles(
    card: Card, batch: int, queries: int, width: int, heads: int, keys: int, dtype: torch.dtype
) -> tuple[tuple[Config, Work], tuple[Config, Work]]:
    """The configurations of both kernels that are estimated to be the fastest for these sizes."""
    first = card.fastest(
        "absorbed_probabilities",
        width,
        dtype,
        keys,
        lambda config: _probabilities(config, batch, queries, width, heads, keys, dtype),
    )
    second = card.fastest(
        "absorbed_values",
        width,
        dtype,
        keys,
        lambda config: works.values(
            batch, queries, width, heads, keys, dtype.itemsize,
            *(config.constants[name] for name in ("BLOCK_M", "BLOCK_K", "BLOCK_C")),
        ),
    )  # fmt: skip
    return first, second


def _probabilities(
    config: Config, batch: int, queries: int, width: int, heads: int, keys: int, dtype: torch.dtype
) -> Work | None:
    """The work of a configuration; None where it takes more heads at a time than divide all of them."""
    block_m, block_c, several = (config.constants[name] for name in ("BLOCK_M", "BLOCK_C", "HEADS"))
    if heads % several:
        return None
    return works.probabilities(batch, queries, width, heads, keys, dtype.itemsize, block_m, block_c, several)

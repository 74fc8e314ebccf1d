"""The tiles of the two kernels of `absorbed_attention`."""

from __future__ import annotations

import functools

import torch

from . import works
from .configs import Card, Config
from .cost import Work
from .sizes import STEP, up

MOST_LOGITS = 80
"""The most logits of several heads that a thread holds in registers."""


@functools.lru_cache(maxsize=1024)
def tiles(
    card: Card, batch: int, queries: int, width: int, heads: int, keys: int, dtype: torch.dtype
) -> tuple[tuple[Config, Work], tuple[Config, Work]]:
    """The configurations of both kernels that are estimated to be the fastest for these sizes."""
    first = card.fastest(
        "absorbed_probabilities",
        width,
        dtype,
        lambda config: _probabilities(config, batch, queries, width, heads, keys, dtype),
    )
    second = card.fastest(
        "absorbed_values",
        width,
        dtype,
        lambda config: works.values(
            batch, queries, width, heads, keys, dtype.itemsize,
            *(config.constants[name] for name in ("BLOCK_M", "BLOCK_K", "BLOCK_C")),
        ),
    )  # fmt: skip
    return first, second


def _probabilities(
    config: Config, batch: int, queries: int, width: int, heads: int, keys: int, dtype: torch.dtype
) -> Work | None:
    """The work of a configuration; None where it takes too many heads at a time."""
    block_m, block_c, several = (config.constants[name] for name in ("BLOCK_M", "BLOCK_C", "HEADS"))
    logits = block_m * several * up(keys, STEP) // (32 * config.options["num_warps"])
    if heads % several or (several > 1 and logits > MOST_LOGITS):
        return None
    return works.probabilities(batch, queries, width, heads, keys, dtype.itemsize, block_m, block_c, several)

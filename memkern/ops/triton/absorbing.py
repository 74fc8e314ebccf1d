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

MOST_LOGITS_BY_GROUPS = 100
"""The same where a group of warps multiplies from shared memory (wgmma)."""

TALL = 256
"""Rows of a tile of outputs that leave no registers for masks of its channels."""


@functools.lru_cache(maxsize=1024)
def tiles(
    card: Card, batch: int, queries: int, width: int, heads: int, keys: int, dtype: torch.dtype
) -> tuple[tuple[Config, Work], tuple[Config, Work]]:
    """The configurations of both kernels that are estimated to be the fastest for these sizes."""
    first = card.fastest(
        "absorbed_probabilities",
        width,
        dtype,
        lambda config: _probabilities(config, card.family, batch, queries, width, heads, keys, dtype),
    )
    second = card.fastest(
        "absorbed_values",
        width,
        dtype,
        lambda config: _values(config, batch, queries, width, heads, keys, dtype),
    )
    return first, second


def _probabilities(
    config: Config, family: str, batch: int, queries: int, width: int, heads: int, keys: int, dtype: torch.dtype
) -> Work | None:
    """The work of a configuration; None where it takes too many heads at a time."""
    block_m, block_c, several = (config.constants[name] for name in ("BLOCK_M", "BLOCK_C", "HEADS"))
    logits = block_m * several * up(keys, STEP) // (32 * config.options["num_warps"])
    most = MOST_LOGITS_BY_GROUPS if family == "sm90" else MOST_LOGITS
    if heads % several or (several > 1 and logits > most):
        return None
    return works.probabilities(batch, queries, width, heads, keys, dtype.itemsize, block_m, block_c, several)


def _values(
    config: Config, batch: int, queries: int, width: int, heads: int, keys: int, dtype: torch.dtype
) -> Work | None:
    """The work of a configuration; None where a tall tile would reach beyond the channels."""
    block_m, block_k, block_c = (config.constants[name] for name in ("BLOCK_M", "BLOCK_K", "BLOCK_C"))
    if block_m >= TALL and width % block_c:
        return None
    return works.values(batch, queries, width, heads, keys, dtype.itemsize, block_m, block_k, block_c)

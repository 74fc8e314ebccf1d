"""The estimated times of a layer's paths on a card whose launches are known: tensor cores, L2 cache and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def on_card(
    device: torch.device, dtype: torch.dtype, queries: int, width: int, heads: int, keys: Sequence[int], length: int,
    context_width: int,
) -> dict[str, float] | None:  # fmt: skip
    """The milliseconds of each path, on a GPU and in a 16-bit dtype; None where these are not known.

    Args:
        keys: the number that each sequence has left.
        length, context_width: of the context.
    """
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    from ...ops.triton.configs import Card  # needs Triton
    from ...ops.triton.estimate import PATHS, Layer, seconds

    try:
        card = Card.of(device)
        layer = Layer(queries, width, heads, tuple(keys), length, context_width, dtype)
        return {path: 1e3 * seconds(path, layer, card) for path in PATHS}
    except NotImplementedError:  # a card or a width that the kernels have no configuration for
        return None

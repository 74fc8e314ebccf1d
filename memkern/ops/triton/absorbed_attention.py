"""`absorbed_attention` launched: in one kernel where that fits and fills the GPU, else in two."""

from __future__ import annotations

from typing import Any

import torch

from .configs import Card, Config
from .kernels.absorbed_attention import (
    absorbed_attention_kernel,
    absorbed_probabilities_kernel,
    absorbed_values_kernel,
)
from .launch import Launch, cdiv, power_of_2, split_width


def absorbed_attention(
    x: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    vo: torch.Tensor,
    out_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """See `memkern.ops.absorbed_attention`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    for launch in plan(x, a, bias, vo, out_bias, residual, out, Card.of(x.device)):
        launch.run()
    return out


MOST_KEYS = 256
"""The logits of a head are held in registers."""


def plan(
    x: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    vo: torch.Tensor,
    out_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    card: Card,
) -> list[Launch]:
    """The launches that fill `out`; tensors may be on any device, the meta device included."""
    batch, queries, width = x.shape
    heads, keys = a.shape[1:3]
    if keys > MOST_KEYS:
        raise NotImplementedError(f"absorbed_attention: {keys} keys, more than {MOST_KEYS}")
    bias = bias if bias.dim() == 3 else bias.unsqueeze(1)
    shared: dict[str, Any] = {
        "bias": bias,
        "bias_batch": bias.stride(0),
        "bias_head": bias.stride(1) if bias.shape[1] == heads else 0,
        "bias_key": bias.stride(2),
        "queries": queries,
        "keys": keys,
        "heads": heads,
    }
    inputs = {"x": x.contiguous(), "a": a.contiguous()}
    outputs = {
        "vo": vo.contiguous(),
        "out_bias": None if out_bias is None else out_bias.contiguous(),
        "residual": None if residual is None else residual.contiguous(),
        "out": out,
        "bias_heads": bias.shape[1],
    }
    one = _whole(card, batch, queries, width, x.dtype)
    if one is not None:
        tiles = cdiv(queries, one.constants["BLOCK_M"])
        parts = split_width(width, one.constants["PART_C"])
        constants = {
            "C": width,
            "C_PARTS": parts,
            "EVEN_X": width % one.constants["BLOCK_C"] == 0,
            "EVEN_OUT": sum(parts) == width,
            **_key_constants(keys),
            **one.blocks,
        }
        arguments = inputs | outputs | shared | {"tiles": tiles}
        return [Launch(absorbed_attention_kernel, (batch * tiles,), arguments, constants, one.options)]

    key_constants = _key_constants(keys)
    padded = sum(key_constants["KEY_PARTS"])
    first = card.config("absorbed_probabilities", width, x.dtype)
    second = card.config("absorbed_values", width, x.dtype)
    p = x.new_empty(batch, queries, heads, padded)
    tiles = cdiv(queries, first.constants["BLOCK_M"])
    probabilities = Launch(
        absorbed_probabilities_kernel,
        (batch * heads * tiles,),
        inputs | shared | {"out": p, "tiles": tiles},
        {"C": width, "WIDTH": padded, "EVEN": width % first.constants["BLOCK_C"] == 0, **key_constants, **first.blocks},
        first.options,
    )
    tiles, block = cdiv(queries, second.constants["BLOCK_M"]), second.constants["BLOCK_C"]
    values = Launch(
        absorbed_values_kernel,
        (batch * tiles, cdiv(width, block)),
        outputs | shared | {"p": p, "tiles": tiles},
        {"C": width, "WIDTH": padded, "EVEN": width % block == 0, "KEYS": power_of_2(keys), **second.blocks},
        second.options,
    )
    return [probabilities, values]


def _whole(card: Card, batch: int, queries: int, width: int, dtype: torch.dtype) -> Config | None:
    """The configuration of the one-kernel form, where the card has one for this width and its rows fill the card."""
    try:
        config = card.config("absorbed_attention", width, dtype)
    except NotImplementedError:
        return None
    return config if batch * cdiv(queries, config.constants["BLOCK_M"]) >= card.processors else None


def _key_constants(keys: int) -> dict[str, Any]:
    """How the keys are covered: wholly, and by the narrower body for sequences with half of them or fewer."""
    few = 16 * cdiv(keys, 32)
    return {"KEYS": power_of_2(keys), "FEW": few, "FEW_PARTS": split_width(few), "KEY_PARTS": split_width(keys)}

"""`attention_mass` in Triton: column sums of a softmax, one program per tile or tiles of a head's queries."""

from __future__ import annotations

from typing import Any

import torch

from . import resident
from .configs import Card
from .kernels.attention_mass import attention_mass_kernel, resident_mass_kernel
from .launch import Launch, dense
from .sizes import cdiv, split_width


def attention_mass(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `memkern.ops.attention_mass`."""
    by_query = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if by_query.numel() == 0 or k.shape[2] == 0:
        return torch.zeros(k.shape[:3], dtype=torch.float32, device=q.device), by_query.zero_()
    launch, by_group = plan(q, k, bias, weight, scale, by_query, Card.of(q.device))
    launch.run()
    return by_group.sum(2).div_(q.shape[2]), by_query


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    by_query: torch.Tensor,
    card: Card,
) -> tuple[Launch, torch.Tensor]:
    """The launch that fills `by_query` `[B, H, N]`, and the sums over its programs' queries `[B, H, programs, n]`."""
    q, k = dense(q), dense(k)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    bias = bias if bias.dim() == 3 else bias.unsqueeze(1).expand(batch, heads, keys)
    strides, unit = resident.strides(q=q, k=k)
    arguments: dict[str, Any] = {"q": q, "k": k, "bias": bias, "weight": weight, "by_query": by_query}
    arguments |= {"bias_batch": bias.stride(0), "bias_head": bias.stride(1), "bias_key": bias.stride(2)}
    arguments |= {"weight_batch": weight.stride(0), "weight_key": weight.stride(1)}
    arguments |= {"queries": queries, "keys": keys, "heads": heads, "scale": float(scale), **strides}

    def sums(programs: int) -> torch.Tensor:
        return torch.empty((batch, heads, programs, keys), dtype=torch.float32, device=q.device)

    if resident.holds(card, keys, width, q.dtype):
        held = resident.hold(card, batch, queries, heads, width, keys, q.dtype, 1)
        by_group = sums(held.programs)
        launch = Launch(
            resident_mass_kernel,
            (batch * heads * held.programs,),
            arguments | {"by_group": by_group, "groups": held.programs, "tiles": held.tiles},
            held.constants(width, keys) | unit,
            held.config.options,
            held.work,
        )
        return launch, by_group
    config = card.config("biased_attention", width, q.dtype)  # the same tiles: it is the same kernel without V
    tiles = cdiv(queries, config.constants["BLOCK_M"])
    by_tile = sums(tiles)
    parts = split_width(width, config.constants["PART_D"])
    launch = Launch(
        attention_mass_kernel,
        (batch * heads * tiles,),
        arguments | {"by_tile": by_tile, "tiles": tiles},
        {"D": width, "D_PARTS": parts, "EVEN": sum(parts) == width, **unit, **config.blocks},
        config.options,
    )
    return launch, by_tile

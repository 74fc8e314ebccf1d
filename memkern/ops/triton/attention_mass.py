"""`attention_mass` in Triton: column sums of a softmax, one program per BLOCK_M queries of a head."""

from __future__ import annotations

import torch

from .configs import Card
from .kernels.attention_mass import attention_mass_kernel
from .launch import Launch, cdiv, dense, split_width


def attention_mass(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `memkern.ops.attention_mass`."""
    by_query = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if by_query.numel() == 0 or k.shape[2] == 0:
        return torch.zeros(k.shape[:3], dtype=torch.float32, device=q.device), by_query.zero_()
    launch = plan(q, k, bias, weight, scale, by_query, Card.of(q.device))
    launch.run()
    by_tile = launch.arguments["by_tile"]
    assert isinstance(by_tile, torch.Tensor)
    return by_tile.sum(2).div_(q.shape[2]), by_query


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    by_query: torch.Tensor,
    card: Card,
) -> Launch:
    """The launch that fills `by_query` `[B, H, N]` and its argument `by_tile` `[B, H, tiles, n]`, sums over queries."""
    q, k = dense(q), dense(k)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    bias = bias if bias.dim() == 3 else bias.unsqueeze(1).expand(batch, heads, keys)
    config = card.config("biased_attention", width, q.dtype)  # the same tiles: it is that without V
    tiles = cdiv(queries, config.constants["BLOCK_M"])
    by_tile = torch.empty((batch, heads, tiles, keys), dtype=torch.float32, device=q.device)
    tensors = {"q": q, "k": k, "bias": bias, "weight": weight, "by_tile": by_tile, "by_query": by_query}
    numbers = {
        "q_batch": q.stride(0), "q_head": q.stride(1), "q_row": q.stride(2),
        "k_batch": k.stride(0), "k_head": k.stride(1), "k_row": k.stride(2),
        "bias_batch": bias.stride(0), "bias_head": bias.stride(1), "bias_key": bias.stride(2),
        "weight_batch": weight.stride(0), "weight_key": weight.stride(1),
        "queries": queries, "keys": keys, "heads": heads, "tiles": tiles,
    }  # fmt: skip
    parts = split_width(width, config.constants["PART_D"])
    return Launch(
        attention_mass_kernel,
        (batch * heads * tiles,),
        tensors | numbers | {"scale": float(scale)},
        {"D": width, "D_PARTS": parts, "EVEN": sum(parts) == width, **config.blocks},
        config.options,
    )

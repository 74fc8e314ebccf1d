"""`biased_attention` in Triton: softmax(q kᵀ · scale + bias) v, one program per tile or tiles of a head's queries."""

from __future__ import annotations

from typing import Any

import torch

from . import resident
from .configs import Card
from .kernels.biased_attention import biased_attention_kernel, resident_attention_kernel
from .launch import Launch, dense
from .sizes import cdiv, power_of_2, split_width


def biased_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `memkern.ops.biased_attention`."""
    batch, heads, queries, width = q.shape
    out = torch.empty((batch, queries, heads, width), dtype=q.dtype, device=q.device)
    if out.numel():
        plan(q, k, v, bias, scale, out, Card.of(q.device)).run()
    return out.transpose(1, 2)


def plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float, out: torch.Tensor, card: Card
) -> Launch:
    """The launch that fills `out` `[B, N, H, D]`; tensors may be on any device, the meta device included."""
    q, k, v = dense(q), dense(k), dense(v)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    bias = bias if bias.dim() == 3 else bias.unsqueeze(1).expand(batch, heads, keys)
    strides, unit = resident.strides(q=q, k=k, v=v)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "bias": bias, "out": out, "scale": float(scale)}
    arguments |= {"bias_batch": bias.stride(0), "bias_head": bias.stride(1), "bias_key": bias.stride(2)}
    arguments |= {"queries": queries, "keys": keys, "heads": heads, **strides}
    if resident.holds(card, keys, width, q.dtype):
        held = resident.hold(card, batch, queries, heads, width, keys, q.dtype, 2)
        return Launch(
            resident_attention_kernel,
            (batch * heads * held.programs,),
            arguments | {"groups": held.programs, "tiles": held.tiles},
            held.constants(width, keys) | unit,
            held.config.options,
            held.work,
        )
    config = card.config("biased_attention", width, q.dtype)
    tiles = cdiv(queries, config.constants["BLOCK_M"])
    parts = split_width(width, config.constants["PART_D"])
    constants = {"D": width, "D_PARTS": parts, "EVEN": sum(parts) == width, "KEYS": power_of_2(keys)}
    return Launch(
        biased_attention_kernel,
        (batch * heads * tiles,),
        arguments | {"tiles": tiles},
        constants | unit | config.blocks,
        config.options,
    )

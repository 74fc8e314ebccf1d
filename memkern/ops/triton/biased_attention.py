"""`biased_attention` in Triton: softmax(q kᵀ · scale + bias) v, one program per BLOCK_M queries of a head."""

from __future__ import annotations

import torch

from .configs import Card
from .kernels.biased_attention import biased_attention_kernel
from .launch import Launch, cdiv, dense, power_of_2, split_width


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
    config = card.config("biased_attention", width, q.dtype)
    tiles = cdiv(queries, config.constants["BLOCK_M"])
    arguments: dict[str, torch.Tensor | int] = {"q": q, "k": k, "v": v, "bias": bias, "out": out}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        arguments |= {
            f"{name}_batch": tensor.stride(0),
            f"{name}_head": tensor.stride(1),
            f"{name}_row": tensor.stride(2),
        }
    arguments |= {"bias_batch": bias.stride(0), "bias_head": bias.stride(1), "bias_key": bias.stride(2)}
    parts = split_width(width, config.constants["PART_D"])
    return Launch(
        biased_attention_kernel,
        (batch * heads * tiles,),
        arguments | {"queries": queries, "keys": keys, "heads": heads, "tiles": tiles, "scale": float(scale)},
        {"D": width, "D_PARTS": parts, "EVEN": sum(parts) == width, "KEYS": power_of_2(keys), **config.blocks},
        config.options,
    )

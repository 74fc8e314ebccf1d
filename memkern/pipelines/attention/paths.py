"""The ways to compute a cross-attention layer from the keys and values of a context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ... import ops
from ...ops import cpu
from ...ops.attention import zero_excluded
from .sources import Source

Attend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From a layer's hidden states `[B, N, C]` and its context to its output before the residual."""


def projected(attn: Any, source: Source, backend: str, context: torch.Tensor | None = None) -> Attend:
    """to_q, attention over the keys that are left, to_out.

    Args:
        context: what K and V are made of once and for all; None where they are made anew each time.
    """
    keys = source.keys

    def project(context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = source.project(attn, context)
        return split_heads(k, attn.heads), split_heads(v, attn.heads)

    kept = None if context is None else project(context)
    if kept is not None and not source.attenuation and kept[0].device.type == "cpu" and backend in ("auto", "cpp"):
        return _projected_rows(attn, source, *kept)

    def attend(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        k, v = kept or project(context)
        q = split_heads(attn.to_q(x), attn.heads)
        k = source.attenuated(q, k, attn.scale)
        heads = ops.biased_attention(q, k, v, keys.bias, attn.scale, backend=backend)
        out = heads.transpose(1, 2).flatten(2)
        for module in attn.to_out:
            out = module(out)
        return out

    return attend


def absorbed(attn: Any, source: Source, backend: str, context: torch.Tensor) -> Attend:
    """One operator in place of the layer; its weights are read, and none of its modules called."""
    k, v = (split_heads(rows, attn.heads) for rows in source.project(attn, context))  # [B, H, n, D]
    to_q, to_out = attn.to_q, attn.to_out[0]
    q_weight, o_weight = (module.weight.detach() for module in (to_q, to_out))
    a = k @ q_weight.view(attn.heads, -1, q_weight.shape[1]) * attn.scale  # [B, H, n, C]
    vo = v @ o_weight.view(o_weight.shape[0], attn.heads, -1).permute(1, 2, 0)
    bias = source.keys.bias
    if to_q.bias is not None:
        shift = (k.float() @ to_q.bias.float().view(attn.heads, -1, 1)).squeeze(-1) * attn.scale
        bias = bias.unsqueeze(1) + shift  # [B, H, n]
    if k.device.type == "cpu":
        return _absorbed_rows(a, bias, vo, to_out.bias, source.keys.counts)
    vo = zero_excluded(vo, bias)
    return lambda x, context: ops.absorbed_attention(x, a, bias, vo, to_out.bias, zeroed=True, backend=backend)


def _absorbed_rows(
    a: torch.Tensor, bias: torch.Tensor, vo: torch.Tensor, out_bias: torch.Tensor | None, counts: tuple[int, ...]
) -> Attend:
    """On the CPU every sequence is as wide as its own keys, up to a multiple of 8 over all heads."""
    heads, channels = a.shape[1], a.shape[3]
    step = 8 // math.gcd(heads, 8)
    parts = []
    for b, left in enumerate(counts):
        width = -(-max(1, left) // step) * step
        own_a, own_vo = (rows[b, :, :width].reshape(-1, channels) for rows in (a, vo))  # [H·n, C]
        own_bias = bias[b, ..., :width].reshape(-1, width).contiguous()
        parts.append((cpu.Product(own_a), own_bias, cpu.Product(own_vo.mT, out_bias)))

    def attend(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        for b, part in enumerate(parts):
            cpu.absorb_rows(x[b], *part, out[b])
        return out

    return attend


def _projected_rows(attn: Any, source: Source, k: torch.Tensor, v: torch.Tensor) -> Attend:
    """On the CPU every sequence has its own keys alone, and its queries go through the layer in tiles."""
    to_q, to_out = (cpu.Product(module.weight.detach(), module.bias) for module in (attn.to_q, attn.to_out[0]))
    keys, scale = source.keys, attn.scale
    parts = [
        (k[b : b + 1, :, :left], v[b : b + 1, :, :left], keys.bias[b : b + 1, None, :left].contiguous())
        for b, left in enumerate(keys.counts)
    ]

    def attend(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        for b, part in enumerate(parts):
            cpu.project_rows(x[b], to_q, *part, scale, to_out, out[b])
        return out

    return attend


def split_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, n, H·D]` as `[B, H, n, D]`."""
    return rows.view(*rows.shape[:-1], heads, -1).transpose(1, 2)

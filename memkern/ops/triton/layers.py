"""The cross-attention layers of Stable Diffusion's UNets, and the launches that serve them.

This list is compiled ahead of time, tuned and measured, with tensors on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import absorbed_attention, attention_mass, biased_attention, edit_embeds, edit_kv, embed_tokens
from .configs import Card
from .launch import Launch


@dataclass(frozen=True)
class Layer:
    """One shape of cross-attention layer at the model's own resolution.

    Attributes:
        model: the model of the UNet.
        queries: N, positions of the latent image.
        width: C.
        heads: H.
    """

    model: str
    queries: int
    width: int
    heads: int

    @property
    def head_dim(self) -> int:
        """C / H."""
        return self.width // self.heads


LAYERS = (
    Layer("SD 1.5", 4096, 320, 8),
    Layer("SD 1.5", 1024, 640, 8),
    Layer("SD 1.5", 256, 1280, 8),
    Layer("SD 1.5", 64, 1280, 8),
    Layer("SD 2.1", 9216, 320, 5),
    Layer("SD 2.1", 2304, 640, 10),
    Layer("SD 2.1", 576, 1280, 20),
    Layer("SD 2.1", 144, 1280, 20),
    Layer("SDXL", 4096, 640, 10),
    Layer("SDXL", 1024, 1280, 20),
)

CONTEXT_WIDTHS = {"SD 1.5": 768, "SD 2.1": 1024, "SDXL": 2048}

KEYS = (77, 33)
"""Keys of an unedited context, and of a 10-token prompt under zero-pad:0.7."""

BATCH = 2
"""The prompt and its negative."""


def attention_launches(layer: Layer, keys: int, dtype: torch.dtype, card: Card, batch: int = BATCH) -> list[Launch]:
    """`biased_attention`, `attention_mass` and the kernels of `absorbed_attention` of one layer."""
    heads = layer.queries, layer.heads, layer.head_dim, keys, dtype, card, batch
    absorbed = absorbed_launches(layer.queries, layer.width, layer.heads, keys, dtype, card, batch)
    return [biased_launch(*heads), mass_launch(*heads), *absorbed]


def biased_launch(
    queries: int, heads: int, head_dim: int, keys: int, dtype: torch.dtype, card: Card, batch: int = BATCH
) -> Launch:
    """`biased_attention` on projections that are views of `[B, N, C]`, as a processor makes them."""
    q = _meta(batch, queries, heads, head_dim, dtype=dtype)
    k = _meta(batch, keys, heads, head_dim, dtype=dtype).transpose(1, 2)
    bias = _meta(batch, keys, dtype=torch.float32)
    return biased_attention.plan(q.transpose(1, 2), k, k, bias, head_dim**-0.5, q, card)


def mass_launch(
    queries: int, heads: int, head_dim: int, keys: int, dtype: torch.dtype, card: Card, batch: int = BATCH
) -> Launch:
    """`attention_mass` on the same kind of views."""
    q = _meta(batch, queries, heads, head_dim, dtype=dtype).transpose(1, 2)
    k = _meta(batch, keys, heads, head_dim, dtype=dtype).transpose(1, 2)
    bias, by_query = _meta(batch, keys, dtype=torch.float32), _meta(batch, heads, queries, dtype=torch.float32)
    return attention_mass.plan(q, k, bias, bias, head_dim**-0.5, by_query, card)[0]


def absorbed_launches(
    queries: int, width: int, heads: int, keys: int, dtype: torch.dtype, card: Card, batch: int = BATCH
) -> list[Launch]:
    """`absorbed_attention` with an output bias and a residual."""
    x = _meta(batch, queries, width, dtype=dtype)
    a = _meta(batch, heads, keys, width, dtype=dtype)
    bias = _meta(batch, keys, dtype=torch.float32)
    return absorbed_attention.plan(x, a, bias, a, _meta(width, dtype=dtype), x, x, card, zeroed=True)


def row_launches(width: int, dtype: torch.dtype, card: Card) -> list[Launch]:
    """`edit_embeds`, `edit_kv` and `embed_tokens` on prompts of 77 tokens."""
    rows, bank = _meta(BATCH, 77, width, dtype=dtype), _meta(BATCH, 1, width, dtype=dtype)
    source, scale = _meta(BATCH, 77, dtype=torch.int32), _meta(BATCH, 77, dtype=torch.float32)
    ids, roles = _meta(BATCH, 77, dtype=torch.int64), _meta(BATCH, 77, dtype=torch.uint8)
    tokens, positions = _meta(49408, width, dtype=dtype), _meta(77, width, dtype=dtype)
    return [
        edit_embeds.plan(rows, bank, source, scale, rows, card),
        edit_kv.plan(rows, rows, bank, bank, source, scale, scale, rows, rows, card),
        embed_tokens.plan(ids, roles, tokens, positions, 0, rows, card),
    ]


def _meta(*shape: int, **options: Any) -> torch.Tensor:
    return torch.empty(shape, device="meta", **options)

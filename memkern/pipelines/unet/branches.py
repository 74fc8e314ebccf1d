"""The first self-attention of a UNet, computed once for rows of a batch that are still equal.

Under classifier-free guidance the branches of a call differ in their context alone: until the first cross-attention
they are one, and so are several images that start from the same latents. In SD 1.5 that self-attention goes over 4096
queries at 512 × 512.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from ..attention.weights import has_hooks
from . import traced
from .processor import LayerProcessor, former_of

PLAIN = (AttnProcessor, AttnProcessor2_0)
"""Processors that compute each row of a batch separately, and nothing but attention."""


def first_self_attention(module: Any) -> tuple[str, Any] | None:
    """The self-attention before every cross-attention, with its dotted name; None if there is none, or branches differ
    before it, as under added embeddings (SDXL's pooled prompts), or its block is compiled alone: in one graph with
    others of its kind.
    """
    if getattr(getattr(module, "config", None), "addition_embed_type", None) is not None:
        return None
    for name, block in getattr(module, "down_blocks", torch.nn.Module()).named_modules():
        if type(block) is BasicTransformerBlock:
            attn = block.attn1
            left = block.only_cross_attention or block._compiled_call_impl is not None
            return None if left else (f"down_blocks.{name}.attn1", attn)
    return None


def is_plain(attn: Any) -> bool:
    """True if a layer computes each row separately, and nothing else reads its inputs and outputs."""
    return (
        type(attn) is Attention
        and type(former_of(attn.processor)) in PLAIN
        and attn.spatial_norm is None
        and not any(has_hooks(part) for part in attn.modules())
    )


def equal_rows(x: torch.Tensor) -> tuple[list[int], list[int]]:
    """The first row of each value, and for each row the number of the one that it equals.

    Args:
        x: `[B, ...]`; a row with a NaN equals none.
    """
    distinct: list[int] = []
    which: list[int] = []
    for index, row in enumerate(x):
        found = next((place for place, first in enumerate(distinct) if torch.equal(x[first], row)), None)
        if found is None:
            found = len(distinct)
            distinct.append(index)
        which.append(found)
    return distinct, which


class SelfAttentionProcessor(LayerProcessor):
    """Computes a self-attention by the processor that it replaced, each distinct row once."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if (
            encoder_hidden_states is not None
            or attention_mask is not None
            or self.attn is not attn
            or torch.is_grad_enabled()
            # A comparison would make the host wait for a GPU.
            or hidden_states.device.type != "cpu"
            or traced.is_exported()
        ):
            return self._former(attn, hidden_states, encoder_hidden_states, attention_mask, temb=temb)
        if torch.compiler.is_compiling():
            return traced.attend_once(hidden_states, self.number)
        made: torch.Tensor = self.compute(attn, hidden_states)
        return made

    __call__.__signature__ = inspect.signature(__call__)  # type: ignore[attr-defined]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute(self, attn: Attention, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for hidden states `[B, N, C]`."""
        call = self.call
        if call is None or not call.shares or len(x) < 2 or not is_plain(attn):
            return self._former(attn, x, None, None)
        distinct, which = equal_rows(x)
        if len(distinct) == len(x):
            return self._former(attn, x, None, None)
        rows = torch.tensor(which, dtype=torch.int64, device=x.device)
        call.session.shared[self.name] = f"{len(distinct)} of {len(x)} rows, the others are equal"
        out: torch.Tensor = self._former(attn, x[distinct], None, None).index_select(0, rows)
        return out

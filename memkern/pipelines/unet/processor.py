"""The processor that takes the place of a cross-attention layer's own, and calls it where it cannot do better."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

PLAIN = (AttnProcessor, AttnProcessor2_0)
"""Processors that compute softmax(q kᵀ) v and nothing else; any other is left in place."""


class Computes(Protocol):
    """What computes a layer in place of its former processor: the site of its UNet.

    Attributes:
        is_placed: whether memkern's processors are in force there.
        edits_kv: whether any pipeline that shares the UNet may edit keys and values.
    """

    is_placed: bool
    edits_kv: bool

    def attend(
        self, name: str, attn: Any, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The layer's output before its residual; None where its former processor is to compute it."""


class CrossAttentionProcessor:
    """Computes a layer from what is kept of its context, or by the processor it took the place of.

    One whose patch is gone acts as the processor it replaced, and so does one that diffusers made anew by its class.
    """

    def __init__(self, former: Any = None, site: Computes | None = None, name: str = "") -> None:
        self.former = AttnProcessor2_0() if former is None else former
        self.site = site
        self.name = name

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the processor that was replaced: diffusers looks processors up in lists of its classes."""
        return type(self.former)

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = self._attend(attn, hidden_states, encoder_hidden_states, attention_mask)
        if out is None:
            return self.former(  # type: ignore[no-any-return]
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                temb=temb,
            )
        out = out + hidden_states if attn.residual_connection else out
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    def _attend(
        self, attn: Attention, x: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The layer's output before its residual; None where the former processor is to compute it."""
        site = self.site
        if site is None or not site.is_placed or not isinstance(context, torch.Tensor):
            return None
        if torch.compiler.is_compiling() and not site.edits_kv:
            return None
        made: torch.Tensor | None = self._untraced(site, attn, x, context, mask)
        return made

    # Which rows are edited how is found in the values of the context, which a traced graph does not look at.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _untraced(
        self, site: Computes, attn: Attention, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        return site.attend(self.name, attn, x, context, mask)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied UNet is not patched: it gets a copy of the processor that was there before."""
        return copy.deepcopy(self.former, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing of memkern is pickled with a UNet."""
        return copy.copy, (self.former,)

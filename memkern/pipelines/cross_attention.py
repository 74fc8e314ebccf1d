"""The processor that takes the place of a cross-attention layer's own, and calls it where it cannot do better."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from .acceleration import Acceleration
from .kv import KVStage

PLAIN = (AttnProcessor, AttnProcessor2_0)
"""Processors that compute softmax(q kᵀ) v and nothing else; any other is left in place."""


class CrossAttentionProcessor:
    """Computes a layer from what is kept of its context, or by the processor it took the place of."""

    def __init__(self, former: Any = None, acceleration: Acceleration | None = None, name: str = "") -> None:
        self.former = AttnProcessor2_0() if former is None else former
        self.acceleration = acceleration
        self.name = name

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
        acceleration = self.acceleration
        if acceleration is None or not isinstance(context, torch.Tensor):
            return None
        if acceleration.stage is not None:
            edited: torch.Tensor | None = self._edit(acceleration, acceleration.stage, attn, x, context, mask)
            return edited
        if torch.compiler.is_compiling() or mask is not None or not _constant(x, context):
            return None
        return acceleration.attend(self.name, attn, x, context, keep=True)

    # Which rows are edited how is found in the values of the context, which a traced graph does not look at.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _edit(
        self,
        acceleration: Acceleration,
        stage: KVStage,
        attn: Attention,
        x: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        if mask is not None:
            stage.unknown(f"{self.name} was called with an attention mask, beside which nothing is edited")
            return None
        return acceleration.attend(self.name, attn, x, context, keep=_constant(x, context))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied UNet is not patched: it gets a copy of the processor that was there before."""
        return copy.deepcopy(self.former, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing of memkern is pickled with a UNet."""
        return copy.copy, (self.former,)


def _constant(x: torch.Tensor, context: torch.Tensor) -> bool:
    """Whether what is made of the context may be kept: plain tensors whose changes are counted, no gradients."""
    return (
        context is not x
        and x.dim() == context.dim() == 3
        and x.dtype == context.dtype
        and x.device == context.device
        and x.device.type in ("cpu", "cuda")
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.shape[0] == context.shape[0] > 0
        and type(context) is torch.Tensor
        and not context.is_inference()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
    )

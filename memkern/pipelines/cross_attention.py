"""The processor that takes the place of a cross-attention layer's own, and calls it where it cannot do better."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from .acceleration import Acceleration

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
        out: torch.Tensor | None = None
        if self.acceleration is not None and not torch.compiler.is_compiling() and attention_mask is None:
            context = _constant(hidden_states, encoder_hidden_states)
            if context is not None:
                out = self.acceleration.attend(self.name, attn, hidden_states, context)
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied UNet is not patched: it gets a copy of the processor that was there before."""
        return copy.deepcopy(self.former, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing of memkern is pickled with a UNet."""
        return copy.copy, (self.former,)


def _constant(x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor | None:
    """The context of a call that can use what is kept: plain tensors whose changes are counted, no gradients."""
    usable = (
        isinstance(context, torch.Tensor)
        and context is not x
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
    return context if usable else None


class Sites:
    """The cross-attention layers of a UNet that memkern's processor was put into."""

    def __init__(self, unet: Any, acceleration: Acceleration) -> None:
        self.unet = unet
        self._placed: list[tuple[Any, CrossAttentionProcessor, Any]] = []
        self.left: dict[str, str] = {}
        for name, attn in cross_attention_layers(unet):
            former = attn.processor
            if type(former) in PLAIN:
                processor = CrossAttentionProcessor(former, acceleration, name)
                attn.set_processor(processor)
                self._placed.append((attn, processor, former))
            else:
                self.left[name] = type(former).__name__

    @property
    def count(self) -> int:
        """How many are still in place."""
        return sum(attn.processor is processor for attn, processor, _ in self._placed)

    @property
    def complete(self) -> bool:
        """Whether all that were placed still are, and no layer has become one that could take one."""
        return self.count == len(self._placed) and not any(
            type(attn.processor) in PLAIN for _, attn in cross_attention_layers(self.unet)
        )

    def remove(self) -> None:
        """Put back the very processors that were there, where ours still is."""
        for attn, processor, former in self._placed:
            if attn.processor is processor:
                attn.set_processor(former)
        self._placed = []


def cross_attention_layers(unet: Any) -> list[tuple[str, Any]]:
    """The layers that read the context, by dotted name; motion modules read none."""
    if not isinstance(unet, torch.nn.Module):
        return []
    return [
        (name, module)
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2") and "motion_modules" not in name
    ]

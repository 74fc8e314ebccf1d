"""The processor that takes the place of a cross-attention layer's own, and calls it where it cannot do better."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from .acceleration import Acceleration
from .kv import KVStage
from .layers import whole_refusals
from .schedule import UNetHook

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


class Sites:
    """The cross-attention layers of a UNet that memkern's processor was put into."""

    def __init__(self, unet: Any, acceleration: Acceleration, scheduler: Callable[[], Any] = lambda: None) -> None:
        self.unet = unet
        self._placed: list[tuple[Any, CrossAttentionProcessor, Any]] = []
        self._handle: Any = None
        self.left: dict[str, str] = {}
        for name, attn in cross_attention_layers(unet):
            former = attn.processor
            if type(former) in PLAIN:
                processor = CrossAttentionProcessor(former, acceleration, name)
                attn.set_processor(processor)
                self._placed.append((attn, processor, former))
            else:
                self.left[name] = type(former).__name__
        if self._placed and acceleration.stage is not None:
            hook = UNetHook(acceleration, scheduler)
            self._handle = unwrapped(unet).register_forward_pre_hook(hook, with_kwargs=True)

    @property
    def in_steps(self) -> bool:
        """Whether the UNet tells at which step it is."""
        return self._handle is not None

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
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def unwrapped(unet: Any) -> Any:
    """The module itself, where `torch.compile` wrapped it."""
    return getattr(unet, "_orig_mod", unet)


def kv_refusals(unet: Any) -> list[str]:
    """Why keys and values of this UNet's layers cannot be edited; empty if they can."""
    layers = cross_attention_layers(unet)
    if not layers:
        return ["it has no UNet with cross-attention layers"]
    reasons: dict[str, list[str]] = {}
    for name, attn in layers:
        former = getattr(attn.processor, "former", attn.processor)
        found = whole_refusals(attn)
        if type(former) not in PLAIN:
            found.append(f"it has a {type(former).__name__}, which may compute more than attention")
        for reason in found:
            reasons.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}" for reason, names in reasons.items()
    ]


def cross_attention_layers(unet: Any) -> list[tuple[str, Any]]:
    """The layers that read the context, by dotted name; motion modules read none."""
    if not isinstance(unet, torch.nn.Module):
        return []
    return [
        (name, module)
        for name, module in unwrapped(unet).named_modules()
        if isinstance(module, Attention) and name.endswith("attn2") and "motion_modules" not in name
    ]

"""Whether what a layer makes of a context may be kept for the next step."""

from __future__ import annotations

import torch


def why_not_kept(x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    """Why what is made of the context may not be kept; None if it may: plain tensors whose changes are counted."""
    if context.is_inference():
        return "inference mode: changes of its tensors are not counted"
    if torch.is_grad_enabled():
        return "gradients are wanted"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if mask is not None:
        return "an attention mask"
    fits = (
        context is not x
        and x.dim() == context.dim() == 3
        and x.dtype == context.dtype
        and x.device == context.device
        and x.device.type in ("cpu", "cuda")
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.shape[0] == context.shape[0] > 0
        and type(context) is torch.Tensor
    )
    return None if fits else "hidden states and context of other shapes, dtypes or devices"

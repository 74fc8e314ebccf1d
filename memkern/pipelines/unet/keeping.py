"""The check of whether a layer's results from a context may be kept for the next step."""

from __future__ import annotations

import torch

from ..attention.paths import compute_dtype

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not_kept(x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    """The reason why results from the context may not be kept; None if they may."""
    if torch.is_grad_enabled():
        return "gradients are wanted"
    if mask is not None:
        return "an attention mask"
    if is_captured(x):
        return "a stream is being captured"
    fits = (
        context is not x
        and x.dim() == context.dim() == 3
        and (x.dtype == context.dtype or torch.is_autocast_enabled(x.device.type))
        and x.device == context.device
        and x.device.type in ("cpu", "cuda")
        and x.dtype in _DTYPES
        and context.dtype in _DTYPES
        and compute_dtype(x) in _DTYPES
        and x.shape[0] == context.shape[0] > 0
        and type(context) is torch.Tensor
    )
    return None if fits else "hidden states and context of other shapes, dtypes or devices"


def is_captured(x: torch.Tensor) -> bool:
    """True if the present computation is replayed later: with other prompts, but with the results kept for this one."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()

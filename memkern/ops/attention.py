"""Softmax over biased keys and its gradient, shared by `biased_attention` and `absorbed_attention`, in plain torch.

    p = softmax(logits + bias)

in float32 or wider. A bias of -inf excludes its key for any logit; a row whose keys are all excluded
attends to nothing: its p is 0.
"""

from __future__ import annotations

import torch

from .checks import check_tensor


def check_bias(bias: torch.Tensor, batch: int, heads: int, keys: int, device: torch.device) -> None:
    """Raise TypeError or ValueError unless `bias` is float32, `[B, n]` or `[B, H, n]`."""
    shape = (batch, keys) if isinstance(bias, torch.Tensor) and bias.dim() == 2 else (batch, heads, keys)
    check_tensor("bias", bias, shape, (torch.float32,), device)


def per_head(bias: torch.Tensor) -> torch.Tensor:
    """`[B, 1 or H, 1, n]`, to add to logits `[B, H, N, n]`."""
    return (bias if bias.dim() == 3 else bias.unsqueeze(1)).unsqueeze(2)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of the computation: float32, or float64 for float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_excluded(rows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`rows` `[B, H, n, D]`, wide, with the rows of excluded keys 0: a NaN there does not survive."""
    return zero_excluded(wide(rows), bias)


def zero_excluded(rows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`rows` `[B, H, n, D]` with the rows of excluded keys 0, for a bias `[B, n]` or `[B, H, n]`."""
    return rows.masked_fill(per_head(bias).mT == -torch.inf, 0)


def probabilities(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softmax(logits + bias) over the last dimension of `[B, H, N, n]`."""
    added = per_head(bias)
    excluded = added == -torch.inf
    biased = (logits + added.to(logits.dtype)).masked_fill(excluded, -torch.inf)
    if biased.shape[-1] == 0:
        return biased
    # Against a row without a finite logit: -inf - -inf would be NaN.
    highest = biased.amax(-1, keepdim=True)
    weights = (biased - highest.masked_fill(highest == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def logits_grad(p: torch.Tensor, p_grad: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to the logits, `[B, H, N, n]`: p · (dp - Σ p · dp)."""
    return p * (p_grad - (p * p_grad).sum(-1, keepdim=True))


def bias_grad(logits_grad: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to `bias`, of its shape and dtype."""
    total = logits_grad.sum(2)
    return (total if bias.dim() == 3 else total.sum(1)).to(bias.dtype)

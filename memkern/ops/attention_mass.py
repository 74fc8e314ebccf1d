"""`attention_mass`: the attention on each key, and of each query on some keys. No probability is kept."""

from __future__ import annotations

from typing import Any

import torch

from . import backends, cpu
from .attention import bias_grad, check_bias, logits_grad, probabilities, wide, without_excluded
from .checks import FLOATING, check_tensor
from .library import register

_BLOCK_BYTES = 1 << 21
"""Bytes of probabilities per block of queries: they stay in a CPU's cache, and take little memory of a GPU."""


def attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    scale: float | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over queries of `p[b, h] = softmax(q[b, h] k[b, h]ᵀ · scale + bias[b])`, and `p[b, h] weight[b]`.

    As in `biased_attention`, a key with bias -inf is excluded and its k is not used; a row whose keys are all
    excluded attends to nothing, and its masses are 0.

    Args:
        q: `[B, H, N, D]`, float32, float16, bfloat16 or float64; any strides.
        k: `[B, H, n, D]` of the same dtype.
        bias: float32 `[B, n]`, or `[B, H, n]`.
        weight: float32 `[B, n]`: 1 for the keys to sum per query, 0 for the others.
        scale: multiplies the logits; default D^-0.5.
        backend: one of `BACKENDS`.

    Returns:
        By key `[B, H, n]`, the mean of p over queries; by query `[B, H, N]`, the sum of p · weight over keys.
        Both float32 (float64 for float64), differentiable in all tensors.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or an unusable backend.
    """
    check_tensor("q", q, ("B", "H", "N", "D"), FLOATING)
    batch, heads, _, width = q.shape
    check_tensor("k", k, (batch, heads, "n", width), (q.dtype,), q.device)
    check_bias(bias, batch, heads, k.shape[2], q.device)
    check_tensor("weight", weight, (batch, k.shape[2]), (torch.float32,), q.device)
    backends.require(backend, "attention_mass", q)
    masses: tuple[torch.Tensor, torch.Tensor] = _operator(
        backend, q, k, bias, weight, width**-0.5 if scale is None else float(scale)
    )
    return masses


def _reference(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    kept = without_excluded(k, bias)
    along = weight.to(kept.dtype)[:, None, None]
    size = max(1, _BLOCK_BYTES // max(1, kept[..., 0].numel() * kept.element_size()))
    by_key, by_query = kept.new_zeros(kept.shape[:3]), []
    for rows in torch.split(q, size, 2):
        p = probabilities(wide(rows) @ kept.mT * scale, bias)
        by_key = by_key + p.sum(2)
        by_query.append((p * along).sum(-1))
    return by_key / max(1, q.shape[2]), torch.cat(by_query, 2)


def _fake(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return k.new_empty(k.shape[:3], dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, by_key: torch.Tensor, by_query: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, bias, weight = ctx.saved_tensors
    kept, queries = without_excluded(k, bias), wide(q)
    p = probabilities(queries @ kept.mT * ctx.scale, bias)
    along = by_query.unsqueeze(-1)  # [B, H, N, 1]
    d_logits = logits_grad(p, by_key.unsqueeze(2) / max(1, q.shape[2]) + along * weight[:, None, None])
    dq = (d_logits @ kept) * ctx.scale
    dk = (d_logits.mT @ queries) * ctx.scale
    d_weight = (p * along).sum((1, 2)).to(weight.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), bias_grad(d_logits, bias), d_weight, None


def _on_cpu(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return (cpu.attention_mass if q.dtype in cpu.DTYPES else _reference)(q, k, bias, weight, scale)


_operator = register(
    "attention_mass(Tensor q, Tensor k, Tensor bias, Tensor weight, float scale) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    kernels=("cpp", "triton"),
    cpu=_on_cpu,
)

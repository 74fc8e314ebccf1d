"""`biased_attention`: attention with a bias per key, for coalesced and excluded keys."""

from __future__ import annotations

from typing import Any

import torch

from . import backends, cpu
from .attention import bias_grad, check_bias, logits_grad, probabilities, wide, without_excluded
from .checks import FLOATING, check_tensor
from .library import register


def biased_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scale: float | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`out[b, h] = softmax(q[b, h] k[b, h]ᵀ · scale + bias[b]) v[b, h]`.

    m keys that are equal are one key with log m added to its logit; a key with bias -inf is excluded, and neither
    its k nor its v is used. A row whose keys are all excluded gives 0.

    Args:
        q: `[B, H, N, D]`, float32, float16, bfloat16 or float64; any strides.
        k, v: `[B, H, n, D]` of the same dtype.
        bias: float32 `[B, n]`, or `[B, H, n]`.
        scale: multiplies the logits; default D^-0.5.
        backend: one of `BACKENDS`.

    Returns:
        `[B, H, N, D]`, a view of a contiguous `[B, N, H, D]`, so that merging heads copies nothing.
        Differentiable in q, k, v and bias.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or an unusable backend.
    """
    check_tensor("q", q, ("B", "H", "N", "D"), FLOATING)
    batch, heads, _, width = q.shape
    check_tensor("k", k, (batch, heads, "n", width), (q.dtype,), q.device)
    check_tensor("v", v, tuple(k.shape), (q.dtype,), q.device)
    check_bias(bias, batch, heads, k.shape[2], q.device)
    backends.require(backend, "biased_attention", q)
    out: torch.Tensor = _operator(backend, q, k, v, bias, width**-0.5 if scale is None else float(scale))
    return out


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    p = _probabilities(q, k, bias, scale)
    out = _fake(q, k, v, bias, scale)
    return out.copy_(p @ without_excluded(v, bias))


def _probabilities(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    return probabilities(wide(q) @ without_excluded(k, bias).mT * scale, bias)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    batch, heads, queries, width = q.shape
    return q.new_empty(batch, queries, heads, width).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, bias = ctx.saved_tensors
    kept_k, kept_v, grad = without_excluded(k, bias), without_excluded(v, bias), wide(grad)
    p = _probabilities(q, k, bias, ctx.scale)
    d_logits = logits_grad(p, grad @ kept_v.mT)
    dq = (d_logits @ kept_k) * ctx.scale
    dk = (d_logits.mT @ wide(q)) * ctx.scale
    dv = p.mT @ grad
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), bias_grad(d_logits, bias), None


def _on_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    return (cpu.biased_attention if q.dtype in cpu.DTYPES else _reference)(q, k, v, bias, scale)


_operator = register(
    "biased_attention(Tensor q, Tensor k, Tensor v, Tensor bias, float scale) -> Tensor",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    kernels=("cpp", "triton"),
    cpu=_on_cpu,
)

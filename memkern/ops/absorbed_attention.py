"""`absorbed_attention`: a cross-attention layer whose context and weights were multiplied beforehand."""

from __future__ import annotations

from typing import Any

import torch

from . import backends, cpu
from .attention import bias_grad, check_bias, logits_grad, probabilities, wide, without_excluded
from .checks import FLOATING, check_tensor
from .library import register


def absorbed_attention(
    x: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    vo: torch.Tensor,
    out_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    zeroed: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """`out[b] = Σ_h softmax(x[b] a[b, h]ᵀ + bias[b]) vo[b, h] + out_bias + residual[b]`.

    With `a[b, h] = scale · K_h W_q,h` and `vo[b, h] = V_h W_o,hᵀ` this is a whole cross-attention layer, both
    projections of the hidden states included: the context does not change over the denoising steps, so both are
    made once. Excluded keys (bias -inf) are not used; a row whose keys are all excluded gives `out_bias` only.

    Args:
        x: hidden states `[B, N, C]`, float32, float16, bfloat16 or float64.
        a: `[B, H, n, C]` of the same dtype, the attention's scale included.
        bias: float32 `[B, n]`, or `[B, H, n]`; a bias of `to_q` or `to_k` is in it.
        vo: `[B, H, n, C]`.
        out_bias: `[C]`, the bias of `to_out`.
        residual: `[B, N, C]`.
        zeroed: a promise that `vo` is 0 for every excluded key, which saves a pass over it on a GPU in each call.
        backend: one of `BACKENDS`.

    Returns:
        `[B, N, C]`, contiguous. Differentiable in every tensor.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or an unusable backend.
    """
    check_tensor("x", x, ("B", "N", "C"), FLOATING)
    batch, queries, width = x.shape
    check_tensor("a", a, (batch, "H", "n", width), (x.dtype,), x.device)
    check_tensor("vo", vo, tuple(a.shape), (x.dtype,), x.device)
    check_bias(bias, batch, a.shape[1], a.shape[2], x.device)
    if out_bias is not None:
        check_tensor("out_bias", out_bias, (width,), (x.dtype,), x.device)
    if residual is not None:
        check_tensor("residual", residual, (batch, queries, width), (x.dtype,), x.device)
    backends.require(backend, "absorbed_attention", x)
    out: torch.Tensor = _operator(backend, x, a, bias, vo, out_bias, residual, zeroed)
    return out


def _reference(
    x: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    vo: torch.Tensor,
    out_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    zeroed: bool = False,
) -> torch.Tensor:
    total = (_probabilities(x, a, bias) @ without_excluded(vo, bias)).sum(1)
    for extra in (out_bias, residual):
        total = total if extra is None else total + wide(extra)
    return total.to(x.dtype)


def _probabilities(x: torch.Tensor, a: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return probabilities(wide(x).unsqueeze(1) @ without_excluded(a, bias).mT, bias)


def _fake(
    x: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    vo: torch.Tensor,
    out_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    zeroed: bool = False,
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, a, bias, vo, out_bias, residual, *_ = inputs
    ctx.save_for_backward(x, a, bias, vo)
    ctx.extras = out_bias is not None, residual is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, a, bias, vo = ctx.saved_tensors
    kept_a, kept_vo, per_head_grad = without_excluded(a, bias), without_excluded(vo, bias), wide(grad).unsqueeze(1)
    p = _probabilities(x, a, bias)
    d_logits = logits_grad(p, per_head_grad @ kept_vo.mT)
    dx = (d_logits @ kept_a).sum(1)
    da = d_logits.mT @ wide(x).unsqueeze(1)
    d_vo = p.mT @ per_head_grad
    has_out_bias, has_residual = ctx.extras
    return (
        dx.to(x.dtype),
        da.to(a.dtype),
        bias_grad(d_logits, bias),
        d_vo.to(vo.dtype),
        wide(grad).sum((0, 1)).to(x.dtype) if has_out_bias else None,
        grad if has_residual else None,
        None,
    )


def _on_cpu(
    x: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    vo: torch.Tensor,
    out_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    zeroed: bool = False,
) -> torch.Tensor:
    return (cpu.absorbed_attention if x.dtype in cpu.DTYPES else _reference)(x, a, bias, vo, out_bias, residual)


_operator = register(
    "absorbed_attention(Tensor x, Tensor a, Tensor bias, Tensor vo, Tensor? out_bias, Tensor? residual, "
    "bool zeroed=False) -> Tensor",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    kernels=("cpp", "triton"),
    cpu=_on_cpu,
)

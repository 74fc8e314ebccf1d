"""`edit_embeds`: a plan applied to the text encoder's output."""

from __future__ import annotations

from typing import Any

import torch

from . import backends
from .checks import FLOATING, check_constant, check_tensor
from .library import register
from .rows import edit_rows, edit_rows_backward


def edit_embeds(
    embeds: torch.Tensor,
    bank: torch.Tensor | None,
    source: torch.Tensor,
    scale: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`out[b, l] = scale[b, l] · rows[b, source[b, l]]`, rows being `embeds` followed by `bank`.

    Args:
        embeds: `[B, L, D]`, float32, float16, bfloat16 or float64; any strides.
        bank: `[B, M, D]` of the same dtype, the rows that `source` >= L reads; or None.
        source: int32 `[B, L]`, in [0, L + M).
        scale: float32 `[B, L]`; 0 gives 0, even for a row with NaN or Inf.
        backend: one of `BACKENDS`.

    Returns:
        A new contiguous `[B, L, D]` tensor. Differentiable in `embeds` and `bank`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or an unusable backend.
        IndexError, RuntimeError: a source is out of range, on the CPU. On a GPU its row is NaN, as
            raising would need a sync.
    """
    check_tensor("embeds", embeds, ("B", "L", "D"), FLOATING)
    batch, length, width = embeds.shape
    if bank is not None:
        check_tensor("bank", bank, (batch, "M", width), (embeds.dtype,), embeds.device)
    check_tensor("source", source, (batch, length), (torch.int32,), embeds.device)
    check_tensor("scale", scale, (batch, length), (torch.float32,), embeds.device)
    check_constant("scale", scale)
    backends.require(backend, "edit_embeds", embeds)
    out: torch.Tensor = _operator(backend, embeds, bank, source, scale)
    return out


def _fake(embeds: torch.Tensor, bank: torch.Tensor | None, source: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return embeds.new_empty(embeds.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    embeds, bank, source, scale = inputs
    ctx.save_for_backward(source, scale)
    ctx.lengths = embeds.shape[1], 0 if bank is None else bank.shape[1]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    source, scale = ctx.saved_tensors
    return *edit_rows_backward(grad, source, scale, *ctx.lengths), None, None


_operator = register(
    "edit_embeds(Tensor embeds, Tensor? bank, Tensor source, Tensor scale) -> Tensor",
    reference=edit_rows,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    kernels=("cpp", "cuda", "triton"),
)

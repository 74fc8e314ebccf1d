"""`edit_kv`: a plan applied to the keys and values of cross-attention."""

from __future__ import annotations

from typing import Any

import torch

from . import backends
from .checks import FLOATING, check_constant, check_tensor
from .library import register
from .rows import edit_rows, edit_rows_backward


def edit_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_bank: torch.Tensor | None,
    v_bank: torch.Tensor | None,
    source: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V read the rows that `source` names, scaled by `k_scale` and `v_scale`, in one pass.

    With both scales 0 a key has logit 0 and value 0: where `to_k` and `to_v` have no bias, exactly what a
    zeroed embedding gives. `k_scale` = c with `v_scale` = 1 multiplies the key's logit by c (Ren et al.).

    Args:
        k, v: `[B, L, C]`, the same dtype: float32, float16, bfloat16 or float64; any strides.
        k_bank, v_bank: `[B, M, C]`, the rows that `source` >= L reads; both or neither.
        source: int32 `[B, L]`, in [0, L + M).
        k_scale, v_scale: float32 `[B, L]`; 0 gives 0, even for a row with NaN or Inf.
        backend: one of `BACKENDS`.

    Returns:
        New contiguous K and V, `[B, L, C]` each. Differentiable in k, v and the banks.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or an unusable backend.
        IndexError, RuntimeError: a source is out of range, on the CPU. On a GPU its row is NaN, as
            raising would need a sync.
    """
    check_tensor("k", k, ("B", "L", "C"), FLOATING)
    batch, length, width = k.shape
    check_tensor("v", v, (batch, length, width), (k.dtype,), k.device)
    if (k_bank is None) != (v_bank is None):
        raise ValueError("k_bank, v_bank: expected both or neither")
    if k_bank is not None and v_bank is not None:
        check_tensor("k_bank", k_bank, (batch, "M", width), (k.dtype,), k.device)
        check_tensor("v_bank", v_bank, tuple(k_bank.shape), (k.dtype,), k.device)
    check_tensor("source", source, (batch, length), (torch.int32,), k.device)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        check_tensor(name, scale, (batch, length), (torch.float32,), k.device)
        check_constant(name, scale)
    backends.require(backend, "edit_kv", k)
    out: tuple[torch.Tensor, torch.Tensor] = _operator(backend, k, v, k_bank, v_bank, source, k_scale, v_scale)
    return out


def _reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_bank: torch.Tensor | None,
    v_bank: torch.Tensor | None,
    source: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return edit_rows(k, k_bank, source, k_scale), edit_rows(v, v_bank, source, v_scale)


def _fake(
    k: torch.Tensor,
    v: torch.Tensor,
    k_bank: torch.Tensor | None,
    v_bank: torch.Tensor | None,
    source: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    k, _, k_bank, _, source, k_scale, v_scale = inputs
    ctx.save_for_backward(source, k_scale, v_scale)
    ctx.lengths = k.shape[1], 0 if k_bank is None else k_bank.shape[1]


def _backward(ctx: Any, k_grad: torch.Tensor, v_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    source, k_scale, v_scale = ctx.saved_tensors
    dk, dk_bank = edit_rows_backward(k_grad, source, k_scale, *ctx.lengths)
    dv, dv_bank = edit_rows_backward(v_grad, source, v_scale, *ctx.lengths)
    return dk, dv, dk_bank, dv_bank, None, None, None


_operator = register(
    "edit_kv(Tensor k, Tensor v, Tensor? k_bank, Tensor? v_bank, Tensor source, "
    "Tensor k_scale, Tensor v_scale) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    kernels=("cpp", "cuda", "triton"),
)

"""`edit_kv` in Triton: K and V in one launch."""

from __future__ import annotations

import torch

from .configs import Card
from .kernels.edit_kv import edit_kv_kernel
from .launch import Launch, dense
from .sizes import cdiv


def edit_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_bank: torch.Tensor | None,
    v_bank: torch.Tensor | None,
    source: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `memkern.ops.edit_kv`."""
    k_out, v_out = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if k_out.numel():
        plan(k, v, k_bank, v_bank, source, k_scale, v_scale, k_out, v_out, Card.of(k.device)).run()
    return k_out, v_out


def plan(
    k: torch.Tensor,
    v: torch.Tensor,
    k_bank: torch.Tensor | None,
    v_bank: torch.Tensor | None,
    source: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    card: Card,
) -> Launch:
    """The launch that fills `k_out` and `v_out`; tensors may be on any device, the meta device included."""
    batch, length, width = k.shape
    tensors = {"k": k, "v": v, "k_bank": k_bank, "v_bank": v_bank}
    rows = {name: None if tensor is None else dense(tensor) for name, tensor in tensors.items()}
    strides = {}
    for name, tensor in rows.items():
        strides[f"{name}_batch"] = 0 if tensor is None else tensor.stride(0)
        strides[f"{name}_row"] = 0 if tensor is None else tensor.stride(1)
    config = card.config("edit_rows", width, k.dtype)
    return Launch(
        edit_kv_kernel,
        (cdiv(batch * length, config.constants["BLOCK_ROWS"]), cdiv(width, config.constants["BLOCK_COLUMNS"])),
        {
            **rows,
            "source": source.contiguous(),
            "k_scale": k_scale.contiguous(),
            "v_scale": v_scale.contiguous(),
            "k_out": k_out,
            "v_out": v_out,
            "count": batch * length,
            "length": length,
            "bank_length": 0 if k_bank is None else k_bank.shape[1],
            "width": width,
            **strides,
        },
        config.constants,
        config.options,
    )

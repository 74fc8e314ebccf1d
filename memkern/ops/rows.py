"""A plan on rows: the rule that `edit_embeds` and `edit_kv` share, in plain torch.

    out[b, l] = scale[b, l] · bank[b, source[b, l]]

in float32 or wider, rounded once; a scale of 0 selects 0, so that a NaN or Inf there does not survive, and a
scale of 1 selects the row, bit for bit.
"""

from __future__ import annotations

import torch


def edit_rows(rows: torch.Tensor, bank: torch.Tensor | None, source: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Gather and scale.

    Args:
        rows: `[B, L, D]`.
        bank: `[B, M, D]`, read by `source` >= L, or None.
        source: int32 `[B, N]`.
        scale: float32 `[B, N]`.

    Returns:
        `[B, N, D]`.

    Raises:
        IndexError: a source is out of range (on CPU and not compiled; elsewhere torch's own gather reports it).
    """
    everything = rows if bank is None else torch.cat([rows, bank], 1)
    _check_source(source, everything.shape[1])
    index = source.to(torch.int64).unsqueeze(-1).expand(-1, -1, rows.shape[-1])
    gathered = everything.gather(1, index)
    factor = scale.unsqueeze(-1)
    wide = gathered.to(torch.promote_types(rows.dtype, torch.float32))
    scaled = torch.where(factor == 1, gathered, (wide * factor).to(rows.dtype))
    return scaled.masked_fill(factor == 0, 0)


def edit_rows_backward(
    grad: torch.Tensor, source: torch.Tensor, scale: torch.Tensor, length: int, bank_length: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of `edit_rows` with respect to `rows` `[B, length, D]` and `bank` `[B, bank_length, D]`."""
    factor = scale.unsqueeze(-1)
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    scaled = torch.where(factor == 0, 0, wide * factor)
    index = source.to(torch.int64).unsqueeze(-1).expand_as(scaled)
    total = scaled.new_zeros(grad.shape[0], length + bank_length, grad.shape[-1])
    total = total.scatter_add(1, index, scaled).to(grad.dtype)
    return total[:, :length], total[:, length:] if bank_length else None


def _check_source(source: torch.Tensor, size: int) -> None:
    if source.device.type == "cpu" and source.numel() and not torch.compiler.is_compiling():
        low, high = int(source.min()), int(source.max())
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise IndexError(f"source: index {bad} is out of range [0, {size})")

"""`edit_embeds` in Triton."""

from __future__ import annotations

import torch

from .configs import Card
from .kernels.edit_embeds import edit_embeds_kernel
from .launch import Launch, dense
from .sizes import cdiv


def edit_embeds(
    embeds: torch.Tensor, bank: torch.Tensor | None, source: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """See `memkern.ops.edit_embeds`."""
    out = torch.empty(embeds.shape, dtype=embeds.dtype, device=embeds.device)
    if out.numel():
        plan(embeds, bank, source, scale, out, Card.of(embeds.device)).run()
    return out


def plan(
    embeds: torch.Tensor,
    bank: torch.Tensor | None,
    source: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    card: Card,
) -> Launch:
    """The launch that fills `out`; tensors may be on any device, the meta device included."""
    batch, length, width = embeds.shape
    embeds, bank = dense(embeds), None if bank is None else dense(bank)
    config = card.config("edit_rows", width, embeds.dtype)
    return Launch(
        edit_embeds_kernel,
        (cdiv(batch * length, config.constants["BLOCK_ROWS"]), cdiv(width, config.constants["BLOCK_COLUMNS"])),
        {
            "embeds": embeds,
            "bank": bank,
            "source": source.contiguous(),
            "scale": scale.contiguous(),
            "out": out,
            "count": batch * length,
            "length": length,
            "bank_length": 0 if bank is None else bank.shape[1],
            "width": width,
            "embeds_batch": embeds.stride(0),
            "embeds_row": embeds.stride(1),
            "bank_batch": 0 if bank is None else bank.stride(0),
            "bank_row": 0 if bank is None else bank.stride(1),
        },
        config.constants,
        config.options,
    )

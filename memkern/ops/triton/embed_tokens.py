"""`embed_tokens` in Triton."""

from __future__ import annotations

import torch

from ...roles import Role
from .configs import Card
from .kernels.embed_tokens import embed_tokens_kernel
from .launch import Launch, dense
from .sizes import cdiv


def embed_tokens(
    input_ids: torch.Tensor,
    roles: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    pad_id: int,
) -> torch.Tensor:
    """See `memkern.ops.embed_tokens`."""
    shape = (*input_ids.shape, token_weight.shape[1])
    out = torch.empty(shape, dtype=token_weight.dtype, device=token_weight.device)
    if out.numel():
        plan(input_ids, roles, token_weight, position_weight, pad_id, out, Card.of(out.device)).run()
    return out


def plan(
    input_ids: torch.Tensor,
    roles: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    pad_id: int,
    out: torch.Tensor,
    card: Card,
) -> Launch:
    """The launch that fills `out`; tensors may be on any device, the meta device included."""
    count, (vocabulary, width) = input_ids.numel(), token_weight.shape
    tokens, positions = dense(token_weight), dense(position_weight)
    config = card.config("edit_rows", width, tokens.dtype)
    return Launch(
        embed_tokens_kernel,
        (cdiv(count, config.constants["BLOCK_ROWS"]), cdiv(width, config.constants["BLOCK_COLUMNS"])),
        {
            "input_ids": input_ids.contiguous(),
            "roles": roles.contiguous(),
            "tokens": tokens,
            "positions": positions,
            "out": out,
            "count": count,
            "length": input_ids.shape[1],
            "vocabulary": vocabulary,
            "width": width,
            "pad_id": pad_id,
            "tokens_row": tokens.stride(0),
            "positions_row": positions.stride(0),
        },
        {"PAD": int(Role.PAD), **config.constants},
        config.options,
    )

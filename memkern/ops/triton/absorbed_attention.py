"""`absorbed_attention` in Triton: probabilities, then their product with vo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..attention import zero_excluded
from .absorbing import tiles
from .configs import Card
from .kernels.absorbed_attention import absorbed_probabilities_kernel, absorbed_values_kernel
from .launch import Launch
from .repeat import Repeated
from .sizes import STEP, cdiv, power_of_2, split_width, up


def absorbed_attention(
    x: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    vo: torch.Tensor,
    out_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    zeroed: bool = False,
) -> torch.Tensor:
    """See `memkern.ops.absorbed_attention`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    for launch in plan(x, a, bias, vo, out_bias, residual, out, Card.of(x.device), zeroed):
        launch.run()
    return out


def repeated(
    x: torch.Tensor, a: torch.Tensor, bias: torch.Tensor, vo: torch.Tensor, out_bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """`absorbed_attention` for other x, with vo zeroed and the rest as it is.

    Args:
        x: contiguous, and aligned to 16 bytes, as every later one has to be.
    """
    out = torch.empty_like(x)
    launches = plan(x, a, bias, vo, out_bias, None, out, Card.of(x.device), True)
    probabilities = launches[0].arguments["out"]
    assert isinstance(probabilities, torch.Tensor)
    made, shape = Repeated.of(launches, (x, probabilities, out)), probabilities.shape
    if made is None:
        return None

    def again(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        made(x, x.new_empty(shape), out)
        return out

    return again


MOST_KEYS = 256
"""The most keys: the logits of a head are held in registers."""


def plan(
    x: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    vo: torch.Tensor,
    out_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    card: Card,
    zeroed: bool = False,
) -> list[Launch]:
    """The launches that fill `out`; tensors may be on any device, the meta device included."""
    batch, queries, width = x.shape
    heads, keys = a.shape[1:3]
    if keys > MOST_KEYS:
        raise NotImplementedError(f"absorbed_attention: {keys} keys, more than {MOST_KEYS}")
    bias = bias if bias.dim() == 3 else bias.unsqueeze(1)
    if not zeroed:
        vo = zero_excluded(vo, bias)
    shared: dict[str, Any] = {
        "bias": bias,
        "bias_batch": bias.stride(0),
        "bias_head": bias.stride(1) if bias.shape[1] == heads else 0,
        "bias_key": bias.stride(2),
        "bias_heads": bias.shape[1],
        "queries": queries,
        "keys": keys,
        "heads": heads,
    }
    (first, first_work), (second, second_work) = tiles(card, batch, queries, width, heads, keys, x.dtype)
    padded, few = up(keys, STEP), up(cdiv(keys, 2), STEP)
    p = x.new_empty(batch, queries, heads * padded)
    sizes = {"C": width, "WIDTH": padded, "STEP": STEP, "KEYS": power_of_2(keys)}
    rows = cdiv(queries, first.constants["BLOCK_M"])
    probabilities = Launch(
        absorbed_probabilities_kernel,
        (batch * heads // first.constants["HEADS"] * rows,),
        shared | {"x": x.contiguous(), "a": a.contiguous(), "out": p, "tiles": rows},
        {
            **sizes,
            "FEW": few,
            "FEW_PARTS": split_width(few, multiple=STEP),
            "KEY_PARTS": split_width(keys, multiple=STEP),
            "HEADS": first.constants["HEADS"],
            "EVEN": width % first.constants["BLOCK_C"] == 0,
            **first.blocks,
        },
        first.options,
        first_work,
    )
    rows, block = cdiv(queries, second.constants["BLOCK_M"]), second.constants["BLOCK_C"]
    outputs = {
        "p": p,
        "vo": vo.contiguous(),
        "out_bias": None if out_bias is None else out_bias.contiguous(),
        "residual": None if residual is None else residual.contiguous(),
        "out": out,
        "tiles": rows,
    }
    values = Launch(
        absorbed_values_kernel,
        (batch * rows, cdiv(width, block)),
        shared | outputs,
        {**sizes, "EVEN": width % block == 0, **second.blocks},
        second.options,
        second_work,
    )
    return [probabilities, values]

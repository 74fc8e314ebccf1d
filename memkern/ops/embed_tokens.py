"""`embed_tokens`: pad swap, token gather and position add in one pass."""

from __future__ import annotations

from typing import Any

import torch

from ..roles import Role, check_roles
from . import backends
from .checks import FLOATING, check_tensor
from .library import register

_PAD = int(Role.PAD)  # torch.compile does not trace comparisons with an enum


def embed_tokens(
    input_ids: torch.Tensor,
    roles: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    pad_id: int,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`out[b, l] = token_weight[roles[b, l] == PAD ? pad_id : input_ids[b, l]] + position_weight[l]`.

    The result of CLIPTextEmbeddings.forward with the pads re-embedded, for code that runs the text encoder's
    embedding itself; a patched pipeline swaps the ids and calls the module, so that its offload and its
    adapters keep working.

    Args:
        input_ids: int64 `[B, L]`, in [0, V); L at most P.
        roles: uint8 `[B, L]` from `token_roles`.
        token_weight: `[V, D]`, float32, float16, bfloat16 or float64.
        position_weight: `[P, D]` of the same dtype.
        pad_id: the id that PAD positions read, 0 for CLIP's "!"; in [0, V).
        backend: one of `BACKENDS`.

    Returns:
        `[B, L, D]`. Differentiable in both weights.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or an unusable backend.
        IndexError, RuntimeError: an id is out of range, on the CPU. On a GPU its row is NaN, as
            raising would need a sync.
    """
    check_tensor("input_ids", input_ids, ("B", "L"), (torch.int64,))
    check_roles(roles)
    check_tensor("roles", roles, tuple(input_ids.shape), (torch.uint8,), input_ids.device)
    check_tensor("token_weight", token_weight, ("V", "D"), FLOATING, input_ids.device)
    check_tensor(
        "position_weight",
        position_weight,
        ("P", token_weight.shape[1]),
        (token_weight.dtype,),
        input_ids.device,
    )
    if input_ids.shape[1] > position_weight.shape[0]:
        raise ValueError(
            f"input_ids: length {input_ids.shape[1]} is more than the {position_weight.shape[0]} positions"
        )
    if not 0 <= pad_id < token_weight.shape[0]:
        raise ValueError(f"pad_id: expected an id in [0, {token_weight.shape[0]}), got {pad_id}")
    backends.require(backend, "embed_tokens", token_weight)
    out: torch.Tensor = _operator(backend, input_ids, roles, token_weight, position_weight, pad_id)
    return out


def _reference(
    input_ids: torch.Tensor,
    roles: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    pad_id: int,
) -> torch.Tensor:
    ids = input_ids.masked_fill(roles == _PAD, pad_id)
    return torch.nn.functional.embedding(ids, token_weight) + position_weight[: ids.shape[1]]


def _fake(
    input_ids: torch.Tensor,
    roles: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    pad_id: int,
) -> torch.Tensor:
    return token_weight.new_empty(*input_ids.shape, token_weight.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input_ids, roles, token_weight, position_weight, pad_id = inputs
    ctx.save_for_backward(input_ids, roles)
    ctx.sizes = token_weight.shape[0], position_weight.shape[0]
    ctx.pad_id = pad_id


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    input_ids, roles = ctx.saved_tensors
    tokens, positions = ctx.sizes
    width = grad.shape[-1]
    ids = input_ids.masked_fill(roles == _PAD, ctx.pad_id).reshape(-1)
    token_grad = grad.new_zeros(tokens, width).index_add(0, ids, grad.reshape(-1, width))
    position_grad = torch.nn.functional.pad(grad.sum(0), (0, 0, 0, positions - grad.shape[1]))
    return None, None, token_grad, position_grad, None


_operator = register(
    "embed_tokens(Tensor input_ids, Tensor roles, Tensor token_weight, Tensor position_weight, int pad_id) -> Tensor",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    kernels=("cpp", "cuda", "triton"),
)

"""Token roles: the kind of each position of a CLIP token sequence.

A CLIP text encoder reads windows of 77 tokens: a start token (SOT), the prompt, one end-of-text token
(EOT) and padding (PAD). Kim & No (arXiv 2605.02908, section 3) write their embeddings v^sot, v^pr, v^eot
and v^pad. A long prompt is several windows side by side, each with its own SOT and EOT.
"""

from __future__ import annotations

from enum import IntEnum

import torch

CONTEXT_LENGTH = 77
CLIP_EOT_ID = 49407


class Role(IntEnum):
    """The role of one token position; the values are those of the uint8 tensors of `token_roles`."""

    SOT = 0
    PROMPT = 1
    EOT = 2
    PAD = 3

    @classmethod
    def of(cls, role: Role | str) -> Role:
        """The role named by `role` (a `Role` or its name, in any case)."""
        if isinstance(role, Role):
            return role
        if isinstance(role, str) and role.upper() in cls.__members__:
            return cls[role.upper()]
        names = ", ".join(member.name.lower() for member in cls)
        raise ValueError(f"role: {role!r} is not a token role; use one of {names}")


def token_roles(
    input_ids: torch.Tensor, *, eos_token_id: int = CLIP_EOT_ID, context_length: int = CONTEXT_LENGTH
) -> torch.Tensor:
    """Classify every position of `input_ids`.

    Roles follow the *first* EOT of each window, as CLIP's own pooling does, and are found by id: a pad id
    that equals the EOT id (SD 1.x) or "!" (SD 2.x), a literal `<|endoftext|>` in the prompt and added tokens
    with ids above EOT all give the same answer.

    Args:
        input_ids: integer `[B, L]`, the ids that the text encoder was called with. `L` is at most `context_length`,
            or a multiple of it (several windows).
        eos_token_id: id of `<|endoftext|>` in the tokenizer that made the ids.
        context_length: tokens in a window.

    Returns:
        uint8 `[B, L]` of `Role` values, on the device of `input_ids`.

    Raises:
        TypeError: `input_ids` is not an integer tensor.
        ValueError: `input_ids` is not `[B, L]`, `L` is not a whole number of windows, or a window has no EOT
            (checking this reads the ids: one device sync when they are on an accelerator).
    """
    if not isinstance(input_ids, torch.Tensor):
        raise TypeError(f"input_ids: expected an integer tensor [B, L], got {type(input_ids).__name__}")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids: expected an integer tensor [B, L], got dtype {input_ids.dtype}")
    windowed = split_windows(input_ids, context_length, name="input_ids")  # [B, W, n]
    is_eot = windowed == eos_token_id
    is_eot[..., :1] = False
    found = is_eot.any(-1)
    if not bool(found.all()):
        row, window = (~found).nonzero()[0].tolist()
        raise ValueError(
            f"input_ids: row {row}, window {window} has no end-of-text token (id {eos_token_id}); "
            "pass the ids that the text encoder was called with, and its tokenizer's eos_token_id"
        )
    eot = is_eot.to(torch.int32).argmax(-1, keepdim=True)  # [B, W, 1]
    position = torch.arange(windowed.shape[-1], dtype=torch.int64, device=input_ids.device)
    roles = torch.full_like(windowed, Role.PROMPT, dtype=torch.uint8)
    roles.masked_fill_(position == eot, Role.EOT)
    roles.masked_fill_(position > eot, Role.PAD)
    roles[..., :1] = Role.SOT
    return roles.reshape(input_ids.shape)


def empty_roles(batch: int, context_length: int = CONTEXT_LENGTH) -> torch.Tensor:
    """uint8 `[batch, context_length]`, the roles of empty prompts: SOT, EOT, and PAD all the rest."""
    roles = torch.full((batch, context_length), int(Role.PAD), dtype=torch.uint8, device="cpu")
    roles[:, 0], roles[:, 1] = int(Role.SOT), int(Role.EOT)
    return roles


def check_roles(roles: torch.Tensor, *, name: str = "roles") -> None:
    """Raise unless `roles` is a uint8 `[B, L]` tensor, as `token_roles` makes them."""
    if not isinstance(roles, torch.Tensor):
        raise TypeError(f"{name}: expected a uint8 tensor [B, L] from token_roles, got {type(roles).__name__}")
    if roles.dtype != torch.uint8:
        raise TypeError(f"{name}: expected dtype torch.uint8, got {roles.dtype}; make them with token_roles")
    if roles.dim() != 2:
        raise ValueError(f"{name}: expected shape [B, L], got {list(roles.shape)}")


def split_windows(tensor: torch.Tensor, context_length: int, *, name: str) -> torch.Tensor:
    """View `[B, L]` as `[B, W, n]`: W windows of n = min(L, context_length) positions."""
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected shape [B, L], got {list(tensor.shape)}")
    length = tensor.shape[1]
    if length > context_length and length % context_length:
        raise ValueError(f"{name}: length {length} is not a whole number of windows of {context_length} tokens")
    return tensor.reshape(tensor.shape[0], max(1, length // context_length), min(length, context_length))


def padding_positions(
    input_ids: torch.Tensor,
    roles: torch.Tensor,
    *,
    pad_token_id: int,
    eos_token_id: int = CLIP_EOT_ID,
    attention_mask: torch.Tensor | None = None,
    context_length: int = CONTEXT_LENGTH,
) -> torch.Tensor:
    """The PAD positions that the tokenizer filled in: those that a pad swap changes.

    PAD is everything after the first EOT, which includes the rest of a prompt with a literal
    `<|endoftext|>` in it; such tokens are the user's and stay. The tokenizer's attention mask separates
    them. Without it, padding is the run of pad ids that ends the window, less the tokenizer's own EOT
    where that has the pad's id.

    Args:
        input_ids: integer `[B, L]`.
        roles: uint8 `[B, L]`, of those ids.
        pad_token_id: the tokenizer's pad id.
        eos_token_id: the tokenizer's EOT id.
        attention_mask: the tokenizer's `[B, L]` mask (1 = token, 0 = padding), or None.
        context_length: tokens in a window.

    Returns:
        bool `[B, L]`.
    """
    candidates = (roles == Role.PAD) & (input_ids == pad_token_id)
    if attention_mask is not None:
        return candidates & (attention_mask == 0)
    runs = split_windows(candidates, context_length, name="input_ids")
    tail = runs.flip(-1).to(torch.int32).cumprod(-1).flip(-1).bool()  # [B, W, n]
    if pad_token_id == eos_token_id:
        follows_user_token = split_windows(roles == Role.PAD, context_length, name="roles").roll(1, -1)
        starts = tail & ~tail.roll(1, -1)
        tail = tail & ~(starts & follows_user_token)
    return tail.reshape(input_ids.shape)

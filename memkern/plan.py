"""Plans: a policy lowered to four tensors, the only description of it that kernels read.

    out_i = scale_i · bank[source_i]        on embeddings, where k_scale = v_scale and bias = 0

The bank is the sequence's own L rows, then W rows with the mean of each window's pads, then L rows of the
sequence encoded with re-embedded pads. A scale of 0 selects 0 rather than multiplying by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .actions import Action, Bank
from .policy import Branch, Edit, Policy
from .roles import CONTEXT_LENGTH, Role, check_roles, split_windows


@dataclass(frozen=True)
class Plan:
    """The row that each key reads, and its scales.

    Attributes:
        source: int32 `[B, L]`, the row of the bank that each key reads.
        k_scale: float32 `[B, L]`, multiplies K.
        v_scale: float32 `[B, L]`, multiplies V.
        bias: float32 `[B, L]`, added to the logit; -inf excludes the key.
    """

    source: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def identity(cls, batch: int, length: int, device: torch.device | str = "cpu") -> Plan:
        """The plan that changes nothing."""
        shape = (batch, length)
        return cls(
            torch.arange(length, dtype=torch.int32, device=device).repeat(batch, 1),
            torch.ones(shape, dtype=torch.float32, device=device),
            torch.ones(shape, dtype=torch.float32, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
        )

    @property
    def is_identity(self) -> bool:
        """True if it changes nothing. A device sync, for a plan on a device."""
        return self.equals(Plan.identity(self.source.shape[0], self.source.shape[1], self.source.device))

    def equals(self, other: Plan) -> bool:
        """True if both do the same. A device sync, for plans on a device."""
        names = ("source", "k_scale", "v_scale", "bias")
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in names)

    def rows(self, part: slice | list[int]) -> Plan:
        """The plan of some of the rows."""
        return Plan(self.source[part], self.k_scale[part], self.v_scale[part], self.bias[part])

    @classmethod
    def cat(cls, plans: Sequence[Plan]) -> Plan:
        """The rows of several plans."""
        columns = zip(*((plan.source, plan.k_scale, plan.v_scale, plan.bias) for plan in plans), strict=True)
        return cls(*(torch.cat(column) for column in columns))


_KEPT = {"keep": 1.0, "replace": 1.0, "zero": 0.0}


def lower(
    policy: Policy | str,
    roles: torch.Tensor,
    branch: Branch,
    *,
    cond_roles: torch.Tensor | None = None,
    context_length: int = CONTEXT_LENGTH,
) -> Plan:
    """Lower `policy` for rows of one branch.

    Windows of layers and steps say where a plan is used, not what is in it, and are ignored here. Edits that attenuate
    are ignored too: their effect depends on the queries.

    Args:
        policy: the policy, or a preset's name.
        roles: uint8 `[B, L]` from `token_roles`.
        branch: the branch of the rows.
        cond_roles: uint8 `[B, L]`, the roles of the cond row that each uncond row is paired with; needed
            where an edit has `roles_of="cond"` and the branch is "uncond".
        context_length: tokens in a window.

    Returns:
        A `Plan` on the device of `roles`; no device sync.

    Raises:
        TypeError, ValueError: `roles` or `cond_roles` of another dtype or shape, or `cond_roles` missing.
    """
    policy = Policy.of(policy)
    check_roles(roles)
    own = Plan.identity(roles.shape[0], roles.shape[1], roles.device)
    source, scale, logit_scale, bias = own.source, own.v_scale, own.k_scale, own.bias
    for edit in policy.edits_on(branch):
        selected = select(edit, _roles_for(edit, roles, branch, cond_roles))
        action, value = edit.action, edit.action.value or 0.0
        if action.kind == "exclude":
            bias = bias.masked_fill(selected, float("-inf"))
        elif action.kind == "logit_bias":
            bias = torch.where(selected, bias + value, bias)
        elif action.kind == "attenuate":
            continue
        elif action.kind == "logit_scale":
            logit_scale = torch.where(selected, logit_scale * value, logit_scale)
        else:
            target = own.source
            if action.source is not None:
                target, exists = _replacement(action, roles, context_length)
                selected = selected & exists
            source = torch.where(selected, target, source)
            scale = scale.masked_fill(selected, _KEPT.get(action.kind, 1.0 - value))
    return Plan(source, scale * logit_scale, scale, bias)


def shared_logits(plans: Sequence[Plan]) -> tuple[torch.Tensor, torch.Tensor]:
    """The edit of the logits of keys that several text encoders made together, each of them its own columns.

    Args:
        plans: one per encoder, of the same rows.

    Returns:
        factor, bias: float32 `[B, L]`, which multiply a key's logit and are added to it. An encoder whose columns are
        zeroed has no part in a logit, and does not affect its factor.

    Raises:
        ValueError: the encoders' roles ask for different edits of one key's logit.
    """
    bias = plans[0].bias
    factor = torch.full_like(bias, torch.nan)
    for plan in plans:
        own = torch.where(plan.v_scale != 0, plan.k_scale / plan.v_scale, torch.nan)
        for asked, found in ((plan.bias, bias), (own, factor)):
            differs = (asked != found) & ~asked.isnan() & ~found.isnan()
            if differs.any():
                row, key = differs.nonzero()[0].tolist()
                raise ValueError(
                    f"key {key} of row {row} would need different edits of its logit for its text encoders; "
                    "a policy without edits of logits edits each encoder's columns separately"
                )
        factor = torch.where(factor.isnan(), own, factor)
    return factor.nan_to_num(nan=1.0), bias


def select(edit: Edit, roles: torch.Tensor) -> torch.Tensor:
    """The positions that `edit` acts on.

    Selects int(min(d, d·r)) of the role's d positions in a row, in double precision, as the paper's code counts.

    Args:
        roles: uint8 `[B, L]`.

    Returns:
        bool `[B, L]`.
    """
    of_role = roles == edit.role
    if edit.fraction == 1:
        return of_role
    total = of_role.sum(-1, keepdim=True)  # [B, 1]
    count = (total.double() * edit.fraction).to(torch.int64)
    rank = of_role.to(torch.int64).cumsum(-1) - 1  # [B, L], among the role's positions
    if edit.order == "first":
        chosen = rank < count
    elif edit.order == "last":
        chosen = rank >= total - count
    elif edit.order == "even":
        total = total.clamp(min=1)
        chosen = (rank + 1) * count // total > rank * count // total
    else:
        # One draw per position and seed, not per row: the choice for a row does not depend on its batch.
        generator = torch.Generator("cpu").manual_seed(edit.seed)
        draw = torch.rand(roles.shape[-1], generator=generator, dtype=torch.float32, device="cpu").to(roles.device)
        order = draw.expand(roles.shape).masked_fill(~of_role, torch.inf).argsort(-1)
        chosen = order.argsort(-1) < count
    return of_role & chosen


def bank_rows(
    policy: Policy,
    embeds: torch.Tensor,
    roles: torch.Tensor,
    reembedded: torch.Tensor | None = None,
    *,
    context_length: int = CONTEXT_LENGTH,
) -> torch.Tensor | None:
    """The rows that a plan of `policy` reads besides the sequence's own.

    Args:
        embeds: `[B, L, D]`.
        roles: uint8 `[B, L]`, on the same device.
        reembedded: `[B, L, D]`, the same prompts encoded with "!" for their pads; where `replace("pad-reembedded")`
            is in the policy.

    Returns:
        `[B, W, D]` or `[B, W + L, D]`; None where the policy reads none.

    Raises:
        ValueError: `reembedded` is needed and missing.
    """
    both = policy.reads(Bank.PAD_REEMBEDDED)
    if not both and not policy.reads(Bank.PAD_MEAN):
        return None
    mean = pad_mean(embeds, roles, context_length=context_length)
    if not both:
        return mean
    if reembedded is None:
        raise ValueError(f"reembedded: policy '{policy}' reads the prompt encoded with '!' for its pads as well")
    return torch.cat([mean, reembedded.to(mean)], 1)


def _roles_for(edit: Edit, roles: torch.Tensor, branch: Branch, cond_roles: torch.Tensor | None) -> torch.Tensor:
    if edit.roles_of == "own" or branch == "cond":
        return roles
    if cond_roles is None:
        raise ValueError(f"cond_roles: needed to lower '{edit}' for uncond rows: the roles of their cond rows")
    check_roles(cond_roles, name="cond_roles")
    if cond_roles.shape != roles.shape:
        raise ValueError(f"cond_roles: expected the shape of roles, {list(roles.shape)}, got {list(cond_roles.shape)}")
    return cond_roles


def _replacement(action: Action, roles: torch.Tensor, context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bank row that each position would read (int32 `[B, L]`), and a mask of those that exist (bool)."""
    batch, length = roles.shape
    windows = split_windows(roles, context_length, name="roles")  # [B, W, n]
    count, size = windows.shape[1:]
    if action.source is Bank.PAD_REEMBEDDED:
        target = torch.arange(length, dtype=torch.int64, device=roles.device).expand(batch, length) + length + count
        return target.to(torch.int32), torch.ones_like(roles, dtype=torch.bool)
    window = torch.arange(count, dtype=torch.int64, device=roles.device)
    if action.source is Bank.PAD_MEAN:
        per_window = (length + window).expand(batch, count)
        exists = (windows == Role.PAD).any(-1)
    else:
        of_source = windows == int(action.source or Role.SOT)
        per_window = of_source.to(torch.int32).argmax(-1) + window * size
        exists = of_source.any(-1)
    target = per_window.to(torch.int32).repeat_interleave(size, dim=-1)
    return target, exists.repeat_interleave(size, dim=-1)


def pad_mean(embeds: torch.Tensor, roles: torch.Tensor, *, context_length: int = CONTEXT_LENGTH) -> torch.Tensor:
    """The mean of each window's PAD rows, the bank of `replace("pad-mean")`.

    Args:
        embeds: `[B, L, D]`.
        roles: uint8 `[B, L]`, on the same device.

    Returns:
        `[B, W, D]` in the dtype of `embeds`, accumulated in float32 or wider; 0 where a window has no PAD.
    """
    is_pad = split_windows(roles == Role.PAD, context_length, name="roles").unsqueeze(-1)  # [B, W, n, 1]
    wide = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    rows = wide.reshape(*is_pad.shape[:3], embeds.shape[-1])
    total = torch.where(is_pad, rows, 0).sum(2)
    return (total / is_pad.sum(2).clamp(min=1)).to(embeds.dtype)

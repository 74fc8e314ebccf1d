"""The embeds stage: a policy applied to the text encoder's output, once per prompt."""

from __future__ import annotations

import torch

from . import ops
from .ledger import LEDGER, KnownRow
from .plan import Plan, bank_rows, lower
from .policy import Branch, Policy
from .roles import CLIP_EOT_ID, CONTEXT_LENGTH, Role, token_roles


def apply_policy(
    embeds: torch.Tensor,
    input_ids: torch.Tensor,
    policy: Policy | str,
    *,
    branch: Branch = "cond",
    eos_token_id: int = CLIP_EOT_ID,
    reembed_id: int = 0,
    reembedded: torch.Tensor | None = None,
    cond_input_ids: torch.Tensor | None = None,
    context_length: int = CONTEXT_LENGTH,
    backend: str = "auto",
) -> torch.Tensor:
    """Apply `policy` to embeddings made elsewhere (compel, sd_embed, a cache).

    A patched pipeline accepts the result as `prompt_embeds`: it is recognised as already edited.

    Args:
        embeds: `[B·n, L, D]`, the text encoder's output; the rows of a sequence's n images are adjacent.
        input_ids: int `[B, L]`, the ids that the text encoder was called with.
        policy: the policy, or a preset's name. One that re-embeds the pads needs embeddings that were
            encoded with those pads: the ids are checked, and refused otherwise.
        branch: "cond" for prompts, "uncond" for negative prompts.
        eos_token_id: the tokenizer's EOT id.
        reembed_id: the id of the token that the policy pads with, 0 for CLIP's "!".
        reembedded: `[B, L, D]`, the same prompts encoded with "!" for their pads, for `replace("pad-reembedded")`.
        cond_input_ids: int `[B, L]`, for "uncond" rows the ids of the prompts they are paired with, where an edit has
            `roles_of="cond"`.
        context_length: tokens in a window.
        backend: "auto", "cpp" or "torch".

    Returns:
        `[B·n, L, D]`; `embeds` itself where the policy leaves this branch alone.

    Raises:
        TypeError, ValueError: arguments of another type, shape or dtype; pads that are not re-embedded.
        ValueError: the policy needs the kv stage, which is in a patched pipeline only.
    """
    policy = Policy.of(policy)
    if policy.kv_reasons():
        raise ValueError(
            f"policy '{policy}' cannot be applied to embeddings: {'; '.join(policy.kv_reasons())}. In a patched "
            "pipeline it acts on keys and values: memkern.patch(pipe, policy)"
        )
    roles = token_roles(input_ids, eos_token_id=eos_token_id, context_length=context_length)
    if policy.reembed_pads is not None:
        other = int(((roles == Role.PAD) & (input_ids != reembed_id)).sum())
        if other:
            raise ValueError(
                f"policy '{policy}' re-embeds the pads, which embeddings alone cannot do: input_ids has {other} "
                f"PAD positions whose id is not {reembed_id}. Encode with that id there "
                "(`patch.encoding` does), or use a policy without it, such as 'zero-pad:0.7'"
            )
    paired = None
    if cond_input_ids is not None:
        paired = token_roles(cond_input_ids, eos_token_id=eos_token_id, context_length=context_length)
    elif policy.pairs(branch):
        raise ValueError(
            f"cond_input_ids: policy '{policy}' edits negative rows by the roles of their prompts; give them"
        )
    edited = edit_embeddings(
        embeds,
        roles,
        policy,
        branch,
        reembedded=reembedded,
        cond_roles=paired,
        context_length=context_length,
        backend=backend,
    )
    images = embeds.shape[0] // max(1, roles.shape[0])
    known = [KnownRow(policy, branch, (row,), window=context_length) for row in roles.cpu()]
    LEDGER.remember(edited, [row for row in known for _ in range(images)])
    return edited


def edit_embeddings(
    embeds: torch.Tensor,
    roles: torch.Tensor,
    policy: Policy,
    branch: Branch,
    *,
    reembedded: torch.Tensor | None = None,
    cond_roles: torch.Tensor | None = None,
    context_length: int = CONTEXT_LENGTH,
    backend: str = "auto",
) -> torch.Tensor:
    """Apply the policy's edits (not its re-embedding) to `embeds` `[B·n, L, D]` with `roles` `[B, L]`.

    The plan is made where the roles are, usually on the host, without waiting for embeddings on a device. The result
    is `embeds` itself if there is nothing to edit.
    """
    if embeds.dim() != 3 or embeds.shape[1] != roles.shape[1] or embeds.shape[0] % max(1, roles.shape[0]):
        raise ValueError(f"embeds: expected [B·n, L, D] for roles {list(roles.shape)}, got {list(embeds.shape)}")
    edited, own = embeds, Policy(policy.edits_on(branch))
    if own.edits:
        images = embeds.shape[0] // max(1, roles.shape[0])
        plan = lower(own, roles, branch, cond_roles=cond_roles, context_length=context_length)
        source, scale, spread = (
            rows.repeat_interleave(images, 0).to(embeds.device, non_blocking=True)
            for rows in (plan.source, plan.v_scale, roles)
        )
        reembedded = None if reembedded is None else reembedded.repeat_interleave(images, 0)
        bank = bank_rows(own, embeds, spread, reembedded, context_length=context_length)
        edited = ops.edit_embeds(embeds, bank, source, scale, backend=backend)
    return edited


def count_edits(plan: Plan, roles: torch.Tensor) -> list[dict[str, int]]:
    """Counts of positions per effect of a plan, for each row, such as {"EOT zeroed": 1, "PAD replaced": 70}."""
    own = torch.arange(roles.shape[1], dtype=plan.source.dtype, device=roles.device)
    excluded, zeroed, replaced = plan.bias == -torch.inf, plan.v_scale == 0, plan.source != own
    scaled = (plan.k_scale != 1) | (plan.v_scale != 1) | (plan.bias != 0)
    effects = {
        "excluded": excluded,
        "zeroed": zeroed & ~excluded,
        "replaced": replaced & ~zeroed & ~excluded,
        "scaled": scaled & ~replaced & ~zeroed & ~excluded,
    }
    counts = {
        f"{role.name} {effect}": (where & (roles == role)).sum(-1) for effect, where in effects.items() for role in Role
    }
    return [{name: int(count[row]) for name, count in counts.items() if count[row]} for row in range(roles.shape[0])]

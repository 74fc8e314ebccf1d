"""What is done to the embeddings that a pipeline's method for encoding prompts returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..embeddings import edit_embeddings
from ..ledger import Edited, recall_edited, remember_edited
from ..ops import backends
from ..policy import Branch
from ..roles import Role, empty_roles
from . import layout
from .encoding import Encoded
from .rows import Encodings
from .slots import slots

if TYPE_CHECKING:
    from .instance import Patch


def edit_outputs(
    patch: Patch, arguments: dict[str, Any], calls: list[Encoded], outputs: Any, reembedded: Any = None
) -> Any:
    """Edit what the pipeline's method returned, by what it was called with and what it encoded.

    Args:
        reembedded: what it returned with "!" for the pads, where the policy reads that as well.
    """
    own = slots(patch.pipe)
    used, encoded = layout.encoded_branches(patch.pipe, arguments)
    if [call.slot for call in calls] != [slot for _ in encoded for slot in own]:
        patch.unknown(
            f"{layout.method(patch.pipe)} called the text encoders {len(calls)} times where "
            f"{len(own) * len(encoded)} were expected, so it is not known which call encoded the prompt. If one was "
            "exchanged, patch again"
        )
        return outputs
    calls_of = {branch: calls[index * len(own) :][: len(own)] for index, branch in enumerate(encoded)}
    guided = "uncond" in used
    parts = layout.split(patch.pipe, outputs, guided)
    others = {} if reembedded is None else layout.split(patch.pipe, reembedded, guided)
    paired = _cond_roles(arguments, calls_of, len(own))
    for branch in used:
        given = arguments["prompt_embeds" if branch == "cond" else "negative_prompt_embeds"]
        if branch in calls_of:
            parts[branch] = edit_rows(patch, parts[branch], calls_of[branch], branch, others.get(branch), paired)
        elif given is None:
            # Zero rows have no tokens; they stand for an empty prompt's.
            prompts = len(calls_of["cond"][0].roles) if "cond" in calls_of else len(parts[branch])
            roles = empty_roles(prompts, patch.context_length)
            remember_edited(parts[branch], Edited(patch.policy, branch, roles, patch.stage, others.get(branch)))
        else:
            _recognise(patch, branch, given, parts[branch])
        known = recall_edited(parts[branch])
        if known is not None and (patch.stage == "kv" or patch.is_watched):
            # A copy: kept itself, a context that a pipeline uses as it is would never die.
            patch.encodings[branch] = Encodings(parts[branch].detach().clone(), known)
    return layout.join(patch.pipe, outputs, parts)


def edit_rows(
    patch: Patch,
    embeds: torch.Tensor,
    encoded: Sequence[Encoded],
    branch: Branch,
    reembedded: torch.Tensor | None = None,
    paired: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Edit embeddings `[B·n, L, D]`: of each text encoder its columns, by its own roles.

    Args:
        paired: the roles of the prompts that uncond rows belong to, per text encoder; None where not known.
    """
    backends.tell_fallback(embeds.device)
    patch.prompts[branch] = tuple(encoded)
    roles = encoded[0].roles
    if reembedded is not None:
        # One of each prompt's images stands for all.
        reembedded = reembedded[:: embeds.shape[0] // roles.shape[0]]
    if patch.stage == "kv":
        if not all(torch.equal(call.roles, roles) for call in encoded):
            patch.unknown(
                "its two text encoders read prompts of different roles (prompt_2), and a key of the UNet belongs "
                "to both; the embeds stage edits each by its own"
            )
            return embeds
        remember_edited(embeds, Edited(patch.policy, branch, roles, "kv", reembedded))
        return embeds
    edited = embeds
    if patch.policy.pairs(branch) and (paired is None or any(own.shape != roles.shape for own in paired)):
        patch.unknown("it is edited by its prompt's roles, and its prompt was not encoded with it by this pipeline")
        return embeds
    if patch.policy.edits_on(branch):
        edited = embeds.clone()
        columns = layout.columns(patch.pipe, slots(patch.pipe), embeds.shape[-1])
        of_prompts: Sequence[torch.Tensor | None] = paired or [None] * len(encoded)
        for call, part, cond_roles in zip(encoded, columns, of_prompts, strict=True):
            # The rows behind CLIP's, of an encoder that is none, stay as they are.
            rows = slice(0, call.roles.shape[1])
            edited[:, rows, part] = edit_embeddings(
                embeds[:, rows, part],
                call.roles,
                patch.policy,
                branch,
                reembedded=None if reembedded is None else reembedded[:, rows, part],
                cond_roles=cond_roles,
                context_length=patch.context_length,
                backend=patch.backend,
            )
    remember_edited(edited, Edited(patch.policy, branch, roles))
    return edited


def _cond_roles(
    arguments: dict[str, Any], calls_of: dict[Branch, list[Encoded]], encoders: int
) -> list[torch.Tensor] | None:
    """The roles of the prompts, per text encoder: of those that were encoded, or recalled of embeddings passed in.

    Of two encoders' embeddings only the first one's roles are remembered: those are not known.
    """
    if "cond" in calls_of:
        return [call.roles for call in calls_of["cond"]]
    given = arguments["prompt_embeds"]
    known = None if given is None else recall_edited(given)
    return None if known is None or encoders > 1 else [known.roles]


def _recognise(patch: Patch, branch: Branch, given: torch.Tensor, repeated: torch.Tensor) -> None:
    """Note what is known of embeddings that were passed in and need no edit; else the user is told.

    Args:
        repeated: them, for each of a prompt's images.
    """
    known = recall_edited(given)
    if known is not None and known.is_made_for(patch.policy, branch, patch.stage):
        remember_edited(repeated, known)
    elif not patch.policy.touches(branch):
        # Whatever they are, nothing is done with them.
        roles = torch.full(given.shape[:2], int(Role.PROMPT), dtype=torch.uint8)
        remember_edited(repeated, Edited(patch.policy, branch, roles, patch.stage))
    else:
        name = "prompt_embeds" if branch == "cond" else "negative_prompt_embeds"
        state = "not made by memkern"
        if known is not None:
            made = "edited" if known.stage == "embeds" else "encoded for the kv stage"
            state = f"{made} as {known.branch} under '{known.policy}'"
        patch.unknown(
            f"{name} carries no token ids and is {state}, while '{patch.policy}' is in force. Make it with the "
            f"patched pipe.{layout.method(patch.pipe)}, patch.encoding or memkern.apply_policy, and pass that very "
            "tensor"
        )

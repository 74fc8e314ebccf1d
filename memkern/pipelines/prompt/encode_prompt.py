"""The `encode_prompt` of a patched pipeline: its own, with pads swapped and the result edited."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...embeddings import edit_embeddings
from ...ledger import LEDGER, KnownRow, row_keys
from ...ops import backends
from ...plan import lower, shared_logits
from ...policy import REEMBEDDED_AS, Bank, Branch
from ...roles import Role, empty_roles
from ..family import outputs as layout
from ..family.encoders import EncoderCall
from ..session import Session
from .encoding import Encoding, ObservedTokenizer, entered

Method = Callable[..., Any]
"""A function that encodes prompts; its first argument is the pipeline."""


def encode(session: Session, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a patched pipeline's `encode_prompt`.

    Args:
        method: the one that the pipeline has without memkern.
        args, kwargs: of the call, without the pipeline.

    Raises:
        UnmitigatedError: the prompt cannot be edited, and `on_unknown` is "raise".
    """
    pipe, policy = session.pipe, session.settings.policy
    call = inspect.signature(method).bind(pipe, *args, **kwargs)
    call.apply_defaults()
    session.calls.clear()
    lost = [reason for slot in session.patch.slots if (reason := slot.refusal(pipe)) is not None]
    if lost:
        session.unmitigated(f"{'; '.join(lost)}: it was exchanged since the pipeline was patched; patch again")
        outputs = method(pipe, *args, **kwargs)
        _let_through(session, call.arguments, outputs)
        return outputs
    reembedded = None
    if policy.reads(Bank.PAD_REEMBEDDED):
        reembedded, _ = _observed(session, REEMBEDDED_AS, method, args, kwargs)
    outputs, seen = _observed(session, policy.reembed_pads, method, args, kwargs)
    return _edit_outputs(session, call.arguments, seen, outputs, reembedded)


def _observed(
    session: Session, pad_with: str | None, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Encoding]:
    """The result of `method` with pads swapped for `pad_with`, and the text-encoder calls that it made.

    It runs on a copy of the pipeline that has stand-ins for the tokenizers, so that no other request meets them;
    attributes that it sets on the copy are set on the pipeline too.
    """
    pipe = session.pipe
    encoding = Encoding(pipe, session.patch.slots, session.settings.policy, pad_with)
    seen: Any = object.__new__(session.patch.base)
    own = vars(seen)
    own.update(vars(pipe))
    for slot in session.patch.slots:
        own[slot.tokenizer] = ObservedTokenizer(own[slot.tokenizer], encoding)
    before = dict(own)
    with entered(encoding):
        outputs = method(seen, *args, **kwargs)
    vars(pipe).update({name: value for name, value in own.items() if name not in before or before[name] is not value})
    return outputs, encoding


def _edit_outputs(
    session: Session, arguments: dict[str, Any], seen: Encoding, outputs: Any, reembedded: Any = None
) -> Any:
    """Edit the result of the pipeline's method, by its arguments and by the text-encoder calls that it made.

    Args:
        reembedded: the result with "!" for the pads, where the policy reads that too.
    """
    pipe, policy, own, calls = session.pipe, session.settings.policy, session.patch.slots, seen.calls
    used, encoded = layout.encoded_branches(pipe, arguments)
    if [call.slot for call in calls] != [slot for _ in encoded for slot in own]:
        session.unmitigated(
            f"{layout.method(pipe)} called the text encoders {len(calls)} times where "
            f"{len(own) * len(encoded)} were expected, so it is not known which call encoded the prompt. If one was "
            "exchanged, patch again"
        )
        _let_through(session, arguments, outputs)
        return outputs
    calls_of = {branch: calls[index * len(own) :][: len(own)] for index, branch in enumerate(encoded)}
    guided = "uncond" in used
    parts = layout.split(pipe, outputs, guided)
    others = {} if reembedded is None else layout.split(pipe, reembedded, guided)
    paired = _cond_roles(arguments, calls_of)
    for branch in used:
        given = arguments["prompt_embeds" if branch == "cond" else "negative_prompt_embeds"]
        embeds = parts[branch]
        if branch in calls_of:
            parts[branch], rows = edit_rows(session, embeds, calls_of[branch], branch, others.get(branch), paired)
        elif given is None:
            # Zero rows have no tokens; they stand for those of an empty prompt.
            prompts = len(calls_of["cond"][0].roles) if "cond" in calls_of else len(embeds)
            roles = [empty_roles(prompts, seen.context_length)] * len(own)
            rows = known_rows(session, embeds, roles, branch, others.get(branch), paired)
            rows = _checked(session, rows, roles, branch, paired)
        else:
            rows = _recalled(session, branch, given, embeds)
        # Raw embeddings that a policy leaves alone are not recognised later.
        note(session, parts[branch], branch, rows, vouch=branch in calls_of or policy.touches(branch))
    return layout.join(pipe, outputs, parts)


def edit_rows(
    session: Session,
    embeds: torch.Tensor,
    calls: Sequence[EncoderCall],
    branch: Branch,
    reembedded: torch.Tensor | None = None,
    paired: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, list[KnownRow]]:
    """Edit embeddings `[B·n, L, D]`: the columns of each text encoder, by its own roles.

    Args:
        paired: the roles of the prompts that uncond rows belong to, per text encoder; None where not known.

    Returns:
        The edited embeddings, and the `KnownRow` of each row.
    """
    policy, backend, stage = session.settings.policy, session.settings.backend, session.settings.applied
    backends.tell_fallback(embeds.device)
    session.calls[branch] = tuple(calls)
    roles = [call.roles for call in calls]
    if paired is not None and any(one.shape != own.shape for one, own in zip(paired, roles, strict=False)):
        paired = None
    rows = known_rows(session, embeds, roles, branch, reembedded, paired)
    rows = _checked(session, rows, roles, branch, paired)
    if rows[0].unedited:
        return embeds, rows
    of_prompts: Sequence[torch.Tensor | None] = paired or [None] * len(roles)
    if stage == "kv" or not policy.edits_on(branch):
        return embeds, rows
    edited = embeds.clone()
    if reembedded is not None:
        # One of each prompt's images stands for all.
        reembedded = reembedded[:: embeds.shape[0] // roles[0].shape[0]]
    columns = layout.columns(session.pipe, session.patch.slots, embeds.shape[-1])
    for own, part, cond in zip(roles, columns, of_prompts, strict=True):
        # The rows after CLIP's, from an encoder that is not CLIP, stay as they are.
        length = slice(0, own.shape[1])
        edited[:, length, part] = edit_embeddings(
            embeds[:, length, part],
            own,
            policy,
            branch,
            reembedded=None if reembedded is None else reembedded[:, length, part],
            cond_roles=cond,
            context_length=session.patch.context_length,
            backend=backend,
        )
    return edited, rows


def known_rows(
    session: Session,
    embeds: torch.Tensor,
    roles: Sequence[torch.Tensor],
    branch: Branch,
    reembedded: torch.Tensor | None = None,
    paired: Sequence[torch.Tensor] | None = None,
) -> list[KnownRow]:
    """The `KnownRow` of each row of `embeds` `[B·n, L, D]` whose encoders' roles are `roles`, uint8 `[B, L]` each."""
    settings = session.settings
    images = max(1, embeds.shape[0] // max(1, len(roles[0])))
    columns = layout.columns(session.pipe, session.patch.slots, embeds.shape[-1]) if len(roles) > 1 else []
    cond = branch == "uncond" and paired is not None and len(paired) == len(roles)
    return [
        KnownRow(
            settings.policy,
            branch,
            tuple(own[row // images] for own in roles),
            settings.applied,
            tuple(columns),
            tuple(own[row // images] for own in paired) if cond and paired is not None else None,
            None if reembedded is None else reembedded[row],
            session.patch.context_length,
            maker=weakref.ref(session.patch.family),
            call=session.number,
        )
        for row in range(embeds.shape[0])
    ]


def _checked(
    session: Session,
    rows: list[KnownRow],
    roles: Sequence[torch.Tensor],
    branch: Branch,
    paired: Sequence[torch.Tensor] | None,
) -> list[KnownRow]:
    """`rows`, or all as unedited where the policy cannot be applied to them.

    Raises:
        UnmitigatedError: it cannot, and `on_unknown` is "raise".
    """
    policy, reason = session.settings.policy, None
    if policy.pairs(branch) and (paired is None or len(paired) != len(roles)):
        reason = "it is edited by its prompt's roles, and its prompt was not encoded with it by this pipeline"
    elif session.settings.applied == "kv":
        of_prompts: Sequence[torch.Tensor | None] = paired or [None] * len(roles)
        try:
            shared_logits(
                [
                    lower(policy, own, branch, cond_roles=cond, context_length=session.patch.context_length)
                    for own, cond in zip(roles, of_prompts, strict=True)
                ]
            )
        except ValueError as conflict:
            reason = f"its tokenizers split it differently, so that a key has different roles: {conflict}"
    if reason is None:
        return rows
    session.unmitigated(reason)
    return [_unedited(session, row.branch, row.roles) for row in rows]


def note(
    session: Session, embeds: torch.Tensor, branch: Branch, rows: Sequence[KnownRow], *, vouch: bool = True
) -> None:
    """Note rows that are on their way to the UNet, so that they are recognised there, in its dtype as well.

    Args:
        vouch: whether other requests may recognise them as well.
    """
    session.encoded[branch] += len(rows)
    if vouch and not any(row.unedited for row in rows):
        LEDGER.remember(embeds, rows)
    reader = getattr(getattr(session.pipe, "unet", None), "dtype", None)
    dtypes = {embeds.dtype, reader if reader is not None and reader.is_floating_point else embeds.dtype}
    for dtype in dtypes:
        session.rows.add(row_keys(embeds.to(dtype)), rows)


def _unedited(session: Session, branch: Branch, roles: tuple[torch.Tensor, ...]) -> KnownRow:
    return KnownRow(
        session.settings.policy,
        branch,
        roles,
        window=session.patch.context_length,
        unedited=True,
        call=session.number,
    )


def _cond_roles(arguments: dict[str, Any], calls_of: dict[Branch, list[EncoderCall]]) -> list[torch.Tensor] | None:
    """The roles of the prompts, per text encoder: of those that were encoded, or recalled from embeddings passed in."""
    if "cond" in calls_of:
        return [call.roles for call in calls_of["cond"]]
    given = arguments["prompt_embeds"]
    rows = () if given is None else LEDGER.recall(given)
    known = [row.roles for row in rows if row is not None]
    if not known or len(known) < len(rows):
        return None
    return [torch.stack(own) for own in zip(*known, strict=True)]


def _recalled(session: Session, branch: Branch, given: torch.Tensor, repeated: torch.Tensor) -> list[KnownRow]:
    """The `KnownRow`s of embeddings that were passed in and need no edit; others go through unedited.

    Args:
        repeated: the embeddings, repeated for each of a prompt's images.
    """
    policy, stage = session.settings.policy, session.settings.applied
    images = max(1, repeated.shape[0] // max(1, given.shape[0]))

    def rank(row: KnownRow) -> int:
        own = session.rank(row)
        return own + 4 if own >= 0 and row.serves(policy, stage) and row.branch == branch else own

    known = LEDGER.recall(given, rank=rank)
    if all(row is not None and row.serves(policy, stage) and row.branch == branch for row in known):
        return [replace(row, call=session.number) for row in known if row is not None for _ in range(images)]
    untouched = (torch.full(given.shape[1:2], int(Role.PROMPT), dtype=torch.uint8, device="cpu"),)
    if not policy.touches(branch):
        # Whatever they are, nothing is done with them.
        untold = KnownRow(policy, branch, untouched, stage, window=given.shape[1], call=session.number)
        return [replace(untold) for _ in range(len(repeated))]
    name, state = "prompt_embeds" if branch == "cond" else "negative_prompt_embeds", "not made by memkern"
    # Rows that no edit changed have values that any encoder may make.
    changed = [row for row in known if row is not None and row.stage == "embeds" and row.policy.edits_on(row.branch)]
    first = next(iter(LEDGER.recall_same(given) or changed), None)
    if first is not None:
        made = "edited" if first.stage == "embeds" else "encoded for the kv stage"
        state = f"{made} as {first.branch} under '{first.policy}'"
    session.unmitigated(
        f"{name} carries no token ids and is {state}, while '{policy}' is in force. Make it with the "
        f"patched pipe.{layout.method(session.pipe)}, patch.encoding or memkern.apply_policy"
    )
    return [_unedited(session, branch, untouched) for _ in range(len(repeated))]


def _let_through(session: Session, arguments: dict[str, Any], outputs: Any) -> None:
    """Note all that a call returned as unedited."""
    used, _ = layout.encoded_branches(session.pipe, arguments)
    for branch, embeds in layout.split(session.pipe, outputs, "uncond" in used).items():
        if isinstance(embeds, torch.Tensor) and embeds.dim() == 3:
            roles = (torch.full(embeds.shape[1:2], int(Role.PROMPT), dtype=torch.uint8, device="cpu"),)
            row = _unedited(session, branch, roles)
            if not session.settings.policy.touches(branch):
                row = replace(row, unedited=False)
            note(session, embeds, branch, [replace(row) for _ in range(len(embeds))], vouch=False)

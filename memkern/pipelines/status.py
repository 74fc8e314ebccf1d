"""The status of a pipeline, its settings and its results, as a value to print."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..embeddings import count_edits
from ..ops import backends
from ..plan import lower
from ..policy import Branch, Policy
from ..roles import Role
from .family import outputs
from .family.encoders import EncoderCall
from .session import Counts, Session
from .unet.placement import foreign

_SEEN = {"embeds": "edits of embeddings", "kv": "roles"}


@dataclass(frozen=True)
class PromptStatus:
    """One encoded row: its branch, its positions per role, and the number of them that each edit changed.

    `encoder` names the text encoder where there are several.
    """

    branch: Branch
    roles: dict[Role, int]
    edited: dict[str, int]
    reembedded: int
    encoder: str = ""

    @property
    def changes(self) -> str:
        """The edits of the row, in words."""
        parts = [f"{count} {effect}" for effect, count in self.edited.items()]
        if self.reembedded:
            parts.append(f"{self.reembedded} PAD re-embedded")
        return ", ".join(parts) or "unchanged"

    def __str__(self) -> str:
        roles = " ".join(f"{role.name} {count}" for role, count in self.roles.items())
        return f"{self.branch}{' of ' if self.encoder else ''}{self.encoder}: {roles}; {self.changes}"


@dataclass(frozen=True)
class Status:
    """The settings in force on a pipeline, and the results of its last call.

    Attributes:
        patched: whether it is patched; if not, the rest is empty.
        policy: the policy in force in this context.
        sites: the parts that were replaced.
        backend: the backend asked for, the one in use for CPU tensors, and why not another.
        on_unknown: the action for rows that would go unedited.
        layers: cross-attention layer → its path for the last context, and the times behind that.
        shared: self-attention → the number of rows it computed in the last call, the others being equal.
        reached: the parts of the last call that did not reach the UNet as the policy asks for, and why.
        kept: bytes that the last call kept of its contexts.
        turned_down: further bytes that it would have kept if `memory` had room for them.
        counts: rows since the pipeline was patched.
        notes: other facts that a user should know.
        prompts: the rows of the last `encode_prompt`, and the policy's edits of each.
    """

    patched: bool
    policy: Policy | None = None
    sites: tuple[str, ...] = ()
    backend: str = ""
    on_unknown: str = ""
    layers: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    reached: tuple[str, ...] = ()
    kept: int = 0
    turned_down: int = 0
    counts: Counts = field(default_factory=Counts)
    notes: tuple[str, ...] = ()
    prompts: tuple[PromptStatus, ...] = ()

    @classmethod
    def of(cls, patch: Any) -> Status:
        """The status of a `Patch`; that of an unpatched pipeline once it is removed."""
        if patch.is_removed:
            return cls(patched=False)
        pipe, settings, last = patch.pipe, patch.in_force, patch.last
        return cls(
            patched=True,
            policy=settings.policy,
            sites=(
                *(
                    f"{type(getattr(pipe, slot.encoder)).__name__} embeddings: pad swap"
                    for slot in patch.slots
                    if slot.refusal(pipe) is None
                ),
                f"{patch.base.__name__}.{outputs.method(pipe)}: {_SEEN[settings.applied]}",
                *_unet_site(patch),
            ),
            backend=_describe_backend(settings.backend),
            on_unknown=settings.on_unknown,
            layers={} if last is None else {name: str(choice) for name, choice in last.layers.items()},
            shared={} if last is None else dict(last.shared),
            reached=() if last is None else _reached(last),
            kept=0 if last is None else last.size,
            turned_down=0 if last is None else _turned_down(last),
            counts=patch.tally.total,
            notes=_notes(patch),
            prompts=() if last is None else edits_of(last),
        )

    def __str__(self) -> str:
        if not self.patched:
            return "memkern: not patched"
        lines = [
            f"policy      {self.policy}",
            *(f"site        {site}" for site in self.sites),
            f"backend     {self.backend}",
            f"on_unknown  {self.on_unknown}",
            f"rows        {self.counts}",
            *(f"layer       {name}: {choice}" for name, choice in {**self.shared, **self.layers}.items()),
            *(f"unedited    {line}" for line in self.reached),
            *([f"kept        {self.kept} bytes of contexts"] if self.kept else []),
            *([f"kept        {self.turned_down} bytes fewer than without a limit"] if self.turned_down else []),
            *(f"note        {note}" for note in self.notes),
            *(f"prompt      {prompt}" for prompt in self.prompts),
        ]
        return "\n".join(lines)


def _turned_down(session: Session) -> int:
    return sum(getattr(choice, "turned_down", 0) for choice in session.layers.values())


def edits_of(session: Session) -> tuple[PromptStatus, ...]:
    """The edits of each row that a session encoded; none where it reached the UNet unedited."""
    cond = session.calls.get("cond")
    untouched = bool(session.reasons)
    return tuple(
        row
        for branch, calls in session.calls.items()
        for index, encoded in enumerate(calls)
        for row in describe(
            encoded,
            Policy() if untouched else session.settings.policy,
            branch,
            session.patch.context_length,
            None if cond is None else cond[index],
            named=len(calls) > 1,
        )
    )


def _reached(session: Session) -> tuple[str, ...]:
    """The parts of a session's call that did not reach the UNet as its policy asks for."""
    lines = [f"{name}: {cause}" for name, cause in session.unreached.items()]
    return (*lines, *(reason for reason in session.reasons))


def describe(
    encoded: EncoderCall,
    policy: Policy,
    branch: Branch,
    context_length: int,
    cond: EncoderCall | None = None,
    *,
    named: bool = False,
) -> list[PromptStatus]:
    """The edits by `policy` of each row of one text-encoder call.

    Args:
        cond: the prompts that the rows are paired with.
        named: whether the rows name the encoder.
    """
    paired = None if cond is None else cond.roles
    if paired is None and policy.pairs(branch):
        policy = Policy()
    plan = lower(policy, encoded.roles, branch, cond_roles=paired, context_length=context_length)
    return [
        PromptStatus(
            branch,
            {role: int((roles == role).sum()) for role in Role},
            edited,
            int(reembedded.sum()),
            encoded.slot.encoder if named else "",
        )
        for roles, edited, reembedded in zip(
            encoded.roles, count_edits(plan, encoded.roles), encoded.swapped, strict=True
        )
    ]


def _describe_backend(asked: str) -> str:
    if asked != "auto":
        return asked
    runs = {kind: backends.usable(torch.device(kind)) for kind in ("cpu", "cuda")}
    reasons = [] if runs["cpu"] == "cpp" else backends.installed("cpp")
    because = f" ({'; '.join(reasons)})" if reasons else ""
    return f"auto: {runs['cpu']} on CPU, {runs['cuda']} on CUDA{because}"


def _unet_site(patch: Any) -> list[str]:
    settings = patch.in_force
    sites = [site for site in patch.sites if not site.prefix or settings.controlnet]
    sites = [site for site in sites if site.module is not None]
    placed = sum(site.processors.count for site in sites)
    if not placed or not settings.needs_processors:
        return []
    edits = "edits of keys and values; " if settings.applied == "kv" else ""
    alone = () if patch.last is None else patch.last.left_alone
    faster = "computed by memkern where faster" if settings.accelerate else "computed by memkern where edited"
    if settings.accelerate and alone and not patch.last.layers:
        faster = f"nothing accelerated: {'; '.join(alone)}"
    names = " and ".join(type(site.module).__name__ for site in sites)
    return [f"{names}: {placed} cross-attention layers, {edits}{faster}"]


def _notes(patch: Any) -> tuple[str, ...]:
    notes, pipe, policy = [], patch.pipe, patch.in_force.policy
    if patch.replaced_by is not None:
        notes.append(f"encode_prompt was wrapped or replaced since, by {patch.replaced_by!r}")
    for slot in patch.slots:
        if (lost := slot.refusal(pipe)) is not None:
            notes.append(f"{lost}: it was exchanged since, and its prompts are not edited: patch again")
            continue
        pad_with = slot.token_id(pipe, policy, policy.reembed_pads)
        if pad_with is not None and pad_with == slot.vocabulary(pipe).pad_token_id:
            notes.append(f"the {slot.tokenizer} pads with {policy.reembed_pads!r} already: no pad is re-embedded")
    if patch.lost is not None:
        wanted = "edited" if patch.in_force.applied == "kv" else "accelerated"
        notes.append(f"{patch.lost} since: patch again to have its layers {wanted}")
    if patch.last is not None and patch.in_force.accelerate and patch.last.left_alone:
        notes.append(f"nothing is accelerated where there is {'; '.join(patch.last.left_alone)}")
    made = [] if patch.last is None else [getattr(choice, "unkept", ()) for choice in patch.last.layers.values()]
    if any(made):
        why = dict.fromkeys(reason for reasons in made for reason in reasons)
        notes.append(f"keys and values are computed again at each step where {'; '.join(why)}")
    others = [kind for site in patch.sites for kind in foreign(site.module)]
    if others:
        kinds = ", ".join(sorted(set(others)))
        notes.append(f"{len(others)} cross-attention layers keep their own processors: {kinds}")
    return tuple(notes)

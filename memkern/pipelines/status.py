"""What is in force on a pipeline, as a value to print."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..embeddings import count_edits
from ..ops import backends
from ..plan import lower
from ..policy import Branch, Policy
from ..roles import Role
from . import layout
from .encoding import Encoded
from .sites import unwrapped
from .slots import slots

if TYPE_CHECKING:
    from .instance import Patch


_SEEN = {"embeds": "edits of embeddings", "kv": "roles"}


@dataclass(frozen=True)
class PromptStatus:
    """One encoded row: its branch, its positions per role, and what was done to how many of them.

    `encoder` names the text encoder where there are several.
    """

    branch: Branch
    roles: dict[Role, int]
    edited: dict[str, int]
    reembedded: int
    encoder: str = ""

    @property
    def changes(self) -> str:
        """What was done to the row, in words."""
        parts = [f"{count} {effect}" for effect, count in self.edited.items()]
        if self.reembedded:
            parts.append(f"{self.reembedded} PAD re-embedded")
        return ", ".join(parts) or "unchanged"

    def __str__(self) -> str:
        roles = " ".join(f"{role.name} {count}" for role, count in self.roles.items())
        return f"{self.branch}{' of ' if self.encoder else ''}{self.encoder}: {roles}; {self.changes}"


@dataclass(frozen=True)
class Status:
    """What is in force on a pipeline.

    Attributes:
        patched: whether it is patched; if not, the rest is empty.
        policy: the policy in force.
        sites: what was replaced.
        backend: the backend asked for, the one in use for CPU tensors, and why not another.
        on_unknown: what happens to a prompt that cannot be classified.
        layers: cross-attention layer → what it did with the last context, and the estimates behind that.
        notes: what else a user should know.
        prompts: the rows of the last `encode_prompt`.
    """

    patched: bool
    policy: Policy | None = None
    sites: tuple[str, ...] = ()
    backend: str = ""
    on_unknown: str = ""
    layers: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    prompts: tuple[PromptStatus, ...] = ()

    @classmethod
    def of(cls, patch: Patch) -> Status:
        """The status of a patch; that of an unpatched pipeline once it is removed."""
        if not patch.installed:
            return cls(patched=False)
        pipe, policy = patch.pipe, patch.policy
        return cls(
            patched=True,
            policy=policy,
            sites=(
                *(f"{type(getattr(pipe, slot.encoder)).__name__} embeddings: pad swap" for slot in slots(pipe)),
                f"{type(pipe).__name__}.{layout.method(pipe)}: {_SEEN[patch.stage]}",
                *_unet_site(patch),
            ),
            backend=_describe_backend(patch.backend),
            on_unknown=patch.on_unknown,
            layers={name: str(choice) for name, choice in patch.acceleration.choices.items()},
            notes=_notes(patch),
            prompts=tuple(
                row
                for branch, calls in patch.prompts.items()
                for index, encoded in enumerate(calls)
                for row in describe(
                    encoded,
                    policy,
                    branch,
                    patch.context_length,
                    patch.prompts["cond"][index] if "cond" in patch.prompts else None,
                    named=len(calls) > 1,
                )
            ),
        )

    def __str__(self) -> str:
        if not self.patched:
            return "memkern: not patched"
        lines = [
            f"policy      {self.policy}",
            *(f"site        {site}" for site in self.sites),
            f"backend     {self.backend}",
            f"on_unknown  {self.on_unknown}",
            *(f"layer       {name}: {choice}" for name, choice in self.layers.items()),
            *(f"note        {note}" for note in self.notes),
            *(f"prompt      {prompt}" for prompt in self.prompts),
        ]
        return "\n".join(lines)


def describe(
    encoded: Encoded,
    policy: Policy,
    branch: Branch,
    context_length: int,
    cond: Encoded | None = None,
    *,
    named: bool = False,
) -> list[PromptStatus]:
    """What `policy` does to each row of one text-encoder call.

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
            encoded.roles, count_edits(plan, encoded.roles), encoded.reembedded, strict=True
        )
    ]


def _describe_backend(asked: str) -> str:
    if asked != "auto":
        return asked
    runs = {kind: backends.usable(torch.device(kind)) for kind in ("cpu", "cuda")}
    reasons = [] if runs["cpu"] == "cpp" else backends.installed("cpp")
    because = f" ({'; '.join(reasons)})" if reasons else ""
    return f"auto: {runs['cpu']} on CPU, {runs['cuda']} on CUDA{because}"


def _unet_site(patch: Patch) -> list[str]:
    sites = patch.sites
    if sites is None or not sites.count:
        return []
    edits = "edits of keys and values; " if patch.stage == "kv" else ""
    faster = "computed by memkern where faster" if patch.accelerate else "computed by memkern where edited"
    places = " and ".join(type(unwrapped(module)).__name__ for module in sites.roots.values())
    return [f"{places}: {sites.count} cross-attention layers, {edits}{faster}"]


def _notes(patch: Patch) -> tuple[str, ...]:
    notes = []
    if patch.replaced_by is not None:
        notes.append(f"encode_prompt was wrapped or replaced since, by {patch.replaced_by!r}")
    for slot in slots(patch.pipe):
        pad_with = slot.token_id(patch.pipe, patch.policy, patch.policy.reembed_pads)
        if pad_with is not None and pad_with == slot.vocabulary(patch.pipe).pad_token_id:
            notes.append(f"the {slot.tokenizer} pads with {patch.policy.reembed_pads!r} already: no pad is re-embedded")
    sites = patch.sites
    if sites is not None and not sites.complete:
        notes.append("processors of the UNet were replaced since: patch again to have them accelerated")
    if sites is not None and sites.left:
        kinds = ", ".join(sorted(set(sites.left.values())))
        notes.append(f"{len(sites.left)} cross-attention layers keep their own processors: {kinds}")
    return tuple(notes)

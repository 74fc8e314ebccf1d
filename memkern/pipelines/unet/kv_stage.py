"""The kv stage: a policy applied to keys and values, per layer and step, of each row of a UNet's batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch

from ... import ops
from ...ledger import KnownRows
from ...plan import Plan, bank_rows, lower, select, shared_logits
from ...policy import Bank, Branch, Policy
from ...roles import Role
from ...scope import in_layers, in_steps, is_size, layer_size
from ..attention.sources import Attenuation, Source, edited
from .schedule import Place

Active = tuple[tuple[int, ...], ...]
"""The edits that are in force in a layer at a step: of each policy, their numbers."""


class RowEdits:
    """The edits of keys and values by the policies of a batch's rows.

    Args:
        rows: the description of each row.
        own: the rows that are edited if they are of the kv stage, each by its own policy.

    Attributes:
        policies: those of the edited rows.
    """

    def __init__(self, rows: KnownRows, own: KnownRows) -> None:
        self.rows = rows
        self._edited = {
            index: row for index, row in enumerate(own) if row is not None and row.stage == "kv" and not row.unedited
        }
        self.policies = tuple(dict.fromkeys(row.policy for row in self._edited.values()))
        self._branches = {(row.policy, row.branch) for row in self._edited.values()}

    def __bool__(self) -> bool:
        return any(policy.edits_on(branch) for policy, branch in self._branches)

    @property
    def follows_steps(self) -> bool:
        """True if an edit is in force at some steps only."""
        return any(edit.steps is not None for policy in self.policies for edit in policy.edits)

    def active(self, name: str, queries: int, place: Place) -> Active:
        """The edits in force in the layer `name`, of that number of queries, at a step."""
        size = layer_size(queries, place.sample)
        return tuple(
            tuple(
                number
                for number, edit in enumerate(policy.edits)
                if in_layers(edit, name, size) and in_steps(edit, place.position)
            )
            for policy in self.policies
        )

    def wanted(self, name: str, place: Place) -> bool:
        """True if an edit is in force in the layer `name` at a step, or may be, where its size decides."""
        return any(
            in_layers(edit, name, None) or any(is_size(layer) for layer in edit.layers or ())
            for policy, branch in self._branches
            for edit in policy.edits_on(branch)
            if in_steps(edit, place.position)
        )

    def sizes(self, place: Place) -> set[str]:
        """The resolutions at which edits are in force at a step."""
        return {
            layer
            for policy, branch in self._branches
            for edit in policy.edits_on(branch)
            if in_steps(edit, place.position)
            for layer in edit.layers or ()
            if is_size(layer)
        }

    def source(self, context: torch.Tensor, active: Active, backend: str, *, coalesced: bool = True) -> Source | None:
        """The context `[B, L, D]` under the edits `active`; None where they change none of its rows."""
        subsets = {
            policy: Policy(tuple(policy.edits[number] for number in numbers))
            for policy, numbers in zip(self.policies, active, strict=True)
        }
        if not any(subsets[row.policy].edits_on(row.branch) for row in self._edited.values()):
            return None
        length = context.shape[1]
        plans = self._plans(subsets, length)
        plan, differing = _merged(plans, length)
        attenuation = tuple(self._attenuation(subsets, length))
        if plan.is_identity and not attenuation and not differing:
            return None
        columns = self._columns(plans, context, backend) if differing else None
        bank = self._bank(context, self.roles(length), self._reembedded(context))
        return edited(context, plan, bank, attenuation, backend=backend, coalesced=coalesced, columns=columns)

    def roles(self, length: int, encoder: int = 0) -> torch.Tensor:
        """The roles by one encoder, uint8 `[B, L]` on the host; all PROMPT for an unknown row."""
        unknown = torch.full((length,), int(Role.PROMPT), dtype=torch.uint8, device="cpu")
        rows = [unknown if row is None else row.roles[min(encoder, len(row.roles) - 1)] for row in self.rows]
        return torch.stack([row if len(row) == length else unknown for row in rows])

    def _plans(self, subsets: dict[Policy, Policy], length: int) -> list[list[Plan]]:
        """The plans of each row, one for each encoder's columns, on the host; one for all where nothing is edited."""
        found = [[Plan.identity(1, length)] for _ in self.rows]
        groups: dict[tuple[Policy, Branch, int], list[int]] = defaultdict(list)
        for index, row in self._edited.items():
            groups[row.policy, row.branch, len(row.roles)].append(index)
        for (policy, branch, encoders), indices in groups.items():
            rows = [self._edited[index] for index in indices]
            for index in indices:
                found[index] = []
            for encoder in range(encoders):
                roles = torch.stack([row.roles[encoder] for row in rows])
                paired = [None if row.paired is None else row.paired[encoder] for row in rows]
                known = [one for one in paired if one is not None]
                plan = lower(
                    subsets[policy],
                    roles,
                    branch,
                    cond_roles=torch.stack(known) if len(known) == len(rows) else None,
                    context_length=rows[0].window,
                )
                for place, index in enumerate(indices):
                    found[index].append(plan.rows(slice(place, place + 1)))
        return found

    def _bank(self, context: torch.Tensor, roles: torch.Tensor, reembedded: torch.Tensor | None) -> torch.Tensor | None:
        """The rows that plans read beside the context's own."""
        reader = max(self.policies, key=lambda policy: (policy.reads(Bank.PAD_REEMBEDDED), policy.reads(Bank.PAD_MEAN)))
        window = next(row.window for row in self._edited.values())
        return bank_rows(reader, context, roles.to(context.device), reembedded, context_length=window)

    def _columns(
        self, plans: list[list[Plan]], context: torch.Tensor, backend: str
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that edits each encoder's columns by its own roles."""
        columns = next(row.columns for row in self._edited.values() if row.columns)
        whole = self._reembedded(context)
        parts = []
        for encoder, part in enumerate(columns):
            plan = Plan.cat([own[min(encoder, len(own) - 1)] for own in plans])
            other = None if whole is None else whole[..., part]
            bank = self._bank(context[..., part], self.roles(context.shape[1], encoder), other)
            parts.append((part, bank, plan.source.to(context.device), plan.v_scale.to(context.device)))

        def edit(context: torch.Tensor) -> torch.Tensor:
            made = context.clone()
            for part, bank, source, scale in parts:
                made[..., part] = ops.edit_embeds(context[..., part], bank, source, scale, backend=backend)
            return made

        return edit

    def _reembedded(self, context: torch.Tensor) -> torch.Tensor | None:
        """The context with the pads of each prompt re-embedded, where that was encoded; None if no policy reads it."""
        if not any(policy.reads(Bank.PAD_REEMBEDDED) for policy in self.policies):
            return None
        others = [None if row is None else row.reembedded for row in self.rows]
        return torch.stack(
            [own if other is None else other.to(context) for own, other in zip(context, others, strict=True)]
        )

    def _attenuation(self, subsets: dict[Policy, Policy], length: int) -> Iterable[Attenuation]:
        """The attenuations: edits with the same numbers are one, and keys stand out among all that these select."""
        masks: dict[tuple[float, float], torch.Tensor] = {}
        roles = self.roles(length)
        for policy, subset in subsets.items():
            for edit in subset.edits:
                action = edit.action
                if action.kind == "attenuate" and action.value is not None and action.threshold is not None:
                    own = {i for i, row in self._edited.items() if row.policy == policy and edit.applies_to(row.branch)}
                    on = torch.tensor([index in own for index in range(len(self.rows))], dtype=torch.bool, device="cpu")
                    chosen = select(edit, roles) & on.unsqueeze(1)
                    numbers = action.value, action.threshold
                    masks[numbers] = masks.get(numbers, torch.zeros_like(chosen)) | chosen
        return [Attenuation(*numbers, mask) for numbers, mask in masks.items()]


def _merged(plans: Sequence[Sequence[Plan]], length: int) -> tuple[Plan, bool]:
    """One plan of all rows, and whether each encoder's columns are edited before it, since their edits differ."""
    if all(plan.equals(own[0]) for own in plans for plan in own):
        return Plan.cat([own[0] for own in plans]), False
    found = []
    for own in plans:
        factor, bias = shared_logits(own)
        found.append(Plan(Plan.identity(1, length).source, factor, torch.ones_like(factor), bias))
    return Plan.cat(found), True

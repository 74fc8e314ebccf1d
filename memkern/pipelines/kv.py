"""The kv stage: a policy applied to keys and values, per layer and step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import ops
from ..coalesce import Keys, coalesce, coalesce_plan, every_key
from ..plan import Plan, bank_rows, lower, select
from ..policy import Branch, Policy
from ..roles import Role
from ..scope import in_layers, in_steps, layer_size
from .rows import Encodings, Rows

Active = tuple[int, ...]
"""The edits of a policy that are in force in a layer at a step, by number."""


@dataclass(frozen=True)
class Attenuation:
    """What `attenuate` edits do, and where: `selected` is bool `[B, n]`, the keys they look at."""

    factor: float
    threshold: float
    selected: torch.Tensor

    def factors(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """What each key's logit is multiplied by, `[B, H, n]`, for q `[B, H, N, D]` and k `[B, H, n, D]`."""
        tops = [(part @ k.mT).amax(2) for part in torch.split(q, 1024, 2)]
        top = torch.stack(tops).amax(0).float() * scale  # [B, H, n]
        among = self.selected.unsqueeze(1).expand_as(top)
        count = among.sum(-1, keepdim=True).clamp(min=1)
        mean = top.where(among, 0).sum(-1, keepdim=True) / count
        deviation = ((top - mean).square().where(among, 0).sum(-1, keepdim=True) / count).sqrt()
        stands_out = among & (top - mean > self.threshold * deviation)
        return torch.where(stands_out, self.factor, 1.0)


@dataclass(frozen=True)
class Source:
    """The keys and values of a context, before any layer's weights.

    Attributes:
        keys: which are left.
        length: L of the context.
        project: a layer's k and v of them, `[B, n, C]` each.
        attenuation: what depends on the queries.
        edited: whether the layer's own processor, which knows of no edits, would compute something else.
    """

    keys: Keys
    length: int
    project: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
    attenuation: tuple[Attenuation, ...] = ()
    edited: bool = False


def unedited(context: torch.Tensor) -> Source:
    """The context as it is: zero rows are one key, and so are runs of equal rows."""
    keys, reference = coalesce(context), weakref.ref(context)

    def project(attn: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = keys.rows(_alive(reference))
        return attn.to_k(rows), attn.to_v(rows)

    return Source(keys, context.shape[1], project)


def edited(
    context: torch.Tensor,
    plan: Plan,
    bank: torch.Tensor | None = None,
    attenuation: tuple[Attenuation, ...] = (),
    *,
    backend: str,
    coalesced: bool = True,
) -> Source:
    """The context with a plan on its keys and values.

    Args:
        context: `[B, L, D]`.
        plan: of its rows, on the host.
        bank: `[B, M, D]`, the rows that the plan reads beside the context's own.
        attenuation: with `selected` `[B, L]` on the host; no two keys are made one then.
        backend: of `edit_kv`.
        coalesced: whether equal keys may be made one.
    """
    keys = coalesce_plan(plan) if coalesced and not attenuation else every_key(plan)
    keys = Keys(keys.index.to(context.device), keys.bias.to(context.device), keys.counts)
    source, k_scale, v_scale = (
        rows.to(context.device, non_blocking=True) for rows in (plan.source, plan.k_scale, plan.v_scale)
    )
    # What a logit is multiplied by; a key that is zeroed keeps its own.
    factor = torch.where(v_scale != 0, k_scale / v_scale, torch.ones_like(v_scale)).unsqueeze(-1)
    reference = weakref.ref(context)

    def project(attn: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = _alive(reference)
        k_shift, v_shift = _shift(attn.to_k, rows), _shift(attn.to_v, rows)
        k, v = _linear(attn.to_k, rows, k_shift), _linear(attn.to_v, rows, v_shift)
        k_bank = v_bank = None
        if bank is not None:
            k_bank, v_bank = _linear(attn.to_k, bank, k_shift), _linear(attn.to_v, bank, v_shift)
        k, v = ops.edit_kv(k, v, k_bank, v_bank, source, k_scale, v_scale, backend=backend)
        k = k if k_shift is None else k + (k_shift * factor).to(k.dtype)
        v = v if v_shift is None else v + v_shift
        return keys.rows(k), keys.rows(v)

    moved = []
    for part in attenuation:
        selected = part.selected.to(context.device).gather(1, keys.index)
        # What pads the keys stands for none of them, and is not judged among them.
        moved.append(Attenuation(part.factor, part.threshold, selected & (keys.bias != -torch.inf)))
    return Source(keys, context.shape[1], project, tuple(moved), edited=True)


def _alive(reference: weakref.ref[torch.Tensor]) -> torch.Tensor:
    tensor = reference()
    assert tensor is not None, "a context that died was attended to"
    return tensor


def _shift(projection: Any, rows: torch.Tensor) -> torch.Tensor | None:
    """The projection's bias, by what it makes of zero: an adapter may have its part in it."""
    if getattr(projection, "bias", None) is None:
        return None
    shift: torch.Tensor = projection(rows.new_zeros(1, 1, rows.shape[-1]))
    return shift


def _linear(projection: Any, rows: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    projected: torch.Tensor = projection(rows)
    return projected if shift is None else projected - shift


@dataclass
class KVStage:
    """A policy's edits of keys and values in one pipeline.

    Attributes:
        policy: whose edits.
        encoded: what the pipeline encoded last, by branch.
        unknown: told why a row goes through unedited.
        context_length: tokens in a window.
        position: i/n for step i of a schedule of n, set by the UNet's hook; None where it is not known.
        sample: rows × columns of the latents, set likewise.
    """

    policy: Policy
    encoded: dict[Branch, Encodings]
    unknown: Callable[[str], None]
    context_length: int
    position: float | None = None
    sample: tuple[int, int] | None = None
    _subsets: dict[Active, Policy] = field(default_factory=dict)

    @property
    def follows_steps(self) -> bool:
        """Whether an edit has a window of steps."""
        return any(edit.steps is not None for edit in self.policy.edits)

    def active(self, name: str, queries: int) -> Active:
        """The edits in force in the layer `name` at this step."""
        size = layer_size(queries, self.sample)
        return tuple(
            number
            for number, edit in enumerate(self.policy.edits)
            if in_layers(edit, name, size) and in_steps(edit, self.position)
        )

    def source(
        self, context: torch.Tensor, rows: Rows, active: Active, backend: str, *, coalesced: bool = True
    ) -> Source | None:
        """The context under the edits `active`; None where they change none of its rows."""
        policy = self._subsets.setdefault(active, Policy(tuple(self.policy.edits[number] for number in active)))
        if not any(policy.edits_on(row.branch) for row in rows if row is not None):
            return None
        plan, roles = self._plan(policy, rows, context.shape[1]), self.roles(rows, context.shape[1])
        attenuation = tuple(self._attenuation(policy, rows, roles))
        if plan.is_identity and not attenuation:
            return None
        bank = bank_rows(
            policy,
            context,
            roles.to(context.device),
            self._reembedded(rows, context),
            context_length=self.context_length,
        )
        return edited(context, plan, bank, attenuation, backend=backend, coalesced=coalesced)

    def roles(self, rows: Rows, length: int) -> torch.Tensor:
        """uint8 `[B, L]` on the host; of a row that is unknown all are PROMPT."""
        unknown = torch.full((1, length), int(Role.PROMPT), dtype=torch.uint8)
        return torch.cat([unknown if row is None else self.encoded[row.branch].roles_of(row.index) for row in rows])

    def _plan(self, policy: Policy, rows: Rows, length: int) -> Plan:
        """The plan of each row of a UNet's batch, on the host; of an unknown one, none."""
        plans = {branch: self._lower(policy, branch) for branch in {row.branch for row in rows if row is not None}}
        found = []
        for row in rows:
            if row is None:
                found.append(Plan.identity(1, length))
            else:
                prompt = self.encoded[row.branch].prompt_of(row.index)
                found.append(plans[row.branch].rows(slice(prompt, prompt + 1)))
        return Plan.cat(found)

    def _lower(self, policy: Policy, branch: Branch) -> Plan:
        own = self.encoded[branch].known.roles
        paired = self.encoded["cond"].known.roles if "cond" in self.encoded else None
        if paired is None and policy.pairs(branch):
            self.unknown("it is edited by its prompt's roles, and the prompt was not encoded by this pipeline")
            return Plan.identity(*own.shape)
        return lower(policy, own, branch, cond_roles=paired, context_length=self.context_length)

    def _reembedded(self, rows: Rows, context: torch.Tensor) -> torch.Tensor | None:
        """For each row of the context the same prompt with its pads re-embedded, where that was encoded."""
        found = []
        for row, own in zip(rows, context, strict=True):
            encoded = None if row is None else self.encoded[row.branch]
            if row is not None and encoded is not None:
                if encoded.known.reembedded is None:
                    return None
                own = encoded.known.reembedded[encoded.prompt_of(row.index)].to(context)
            found.append(own)
        return torch.stack(found)

    @staticmethod
    def _attenuation(policy: Policy, rows: Rows, roles: torch.Tensor) -> Iterable[Attenuation]:
        """Edits with the same numbers are one: what stands out is judged among all the keys they select."""
        masks: dict[tuple[float, float], torch.Tensor] = {}
        for edit in policy.edits:
            action = edit.action
            if action.kind == "attenuate" and action.value is not None and action.threshold is not None:
                on = torch.tensor([row is not None and edit.applies_to(row.branch) for row in rows])
                chosen = select(edit, roles) & on.unsqueeze(1)
                numbers = action.value, action.threshold
                masks[numbers] = masks.get(numbers, torch.zeros_like(chosen)) | chosen
        return [Attenuation(*numbers, mask) for numbers, mask in masks.items()]

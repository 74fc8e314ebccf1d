"""A prompt as the text encoder reads it: its tokens, their roles, and what a policy does to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import torch

from ..plan import Plan, lower, select
from ..policy import Branch, Policy
from ..roles import Role, token_roles


@dataclass(frozen=True)
class Run:
    """Tokens side by side that are alike.

    Attributes:
        text: the token's.
        role: its role.
        edit: what the policy does to it, "" for nothing.
        count: how many there are.
    """

    text: str
    role: Role
    edit: str
    count: int = 1


def runs(tokenizer: Any, prompt: str, policy: Policy, branch: Branch = "cond") -> tuple[list[Run], str]:
    """The tokens of a prompt, equal neighbours together, and the text that did not fit into the window."""
    length = int(tokenizer.model_max_length)
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    whole = tokenizer(prompt, truncation=False, verbose=False).input_ids
    cut = tokenizer.decode(whole[length - 1 : -1]) if len(whole) > length else ""
    roles = token_roles(ids, eos_token_id=tokenizer.eos_token_id, context_length=length)
    plan = lower(policy, roles, branch, cond_roles=roles, context_length=length)
    names = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    edits = list(_edits(policy, plan, roles, branch))
    alike = groupby(zip(names, roles[0].tolist(), edits, strict=True))
    return [Run(_shown(name), Role(role), edit, len(list(group))) for (name, role, edit), group in alike], cut


def as_html(found: list[Run]) -> str:
    """The tokens as spans of the classes `token`, their role's, and `edited`; each says what happens to it."""
    spans = []
    for run in found:
        times = f"<small>×{run.count}</small>" if run.count > 1 else ""
        edit = f"<em>{escape(run.edit)}</em>" if run.edit else ""
        classes = f"token {run.role.name.lower()}{' edited' if run.edit else ''}"
        spans.append(f'<span class="{classes}"><b>{escape(run.text)}</b>{times}<i>{run.role.name}</i>{edit}</span>')
    return f'<div class="tokens">{"".join(spans)}</div>'


def _edits(policy: Policy, plan: Plan, roles: torch.Tensor, branch: Branch) -> Iterator[str]:
    """The edits of each position, in words."""
    attenuated = torch.zeros_like(roles, dtype=torch.bool)
    for edit in policy.edits_on(branch):
        if edit.action.kind == "attenuate":
            attenuated |= select(edit, roles)
    rows = zip(*(part[0].tolist() for part in (roles, *_parts(plan), attenuated)), strict=True)
    for position, (role, source, k_scale, v_scale, bias, stands_out) in enumerate(rows):
        said = []
        if policy.reembed_pads is not None and role == Role.PAD:
            said.append(f"re-embedded as {policy.reembed_pads}")
        if bias == -torch.inf:
            said.append("excluded")
        elif v_scale == 0:
            said.append("zeroed")
        else:
            said += [f"takes row {source}" if source < len(roles[0]) else "takes another row"] * (source != position)
            said += [f"× {v_scale:g}"] * (v_scale != 1)
            said += [f"logit × {k_scale / v_scale:g}"] * (k_scale != v_scale)
            said += [f"logit {bias:+g}"] * (bias != 0)
            said += ["logit attenuated where it stands out"] * stands_out
        yield ", ".join(said)


def _parts(plan: Plan) -> tuple[torch.Tensor, ...]:
    return plan.source, plan.k_scale, plan.v_scale, plan.bias


def _shown(token: str) -> str:
    """A token of CLIP's vocabulary without the mark of a word's end."""
    return token.removesuffix("</w>") or "␣"

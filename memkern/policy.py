"""Policies: what to do with each token role, on which branch, where.

A policy is a small immutable value that knows nothing of tensors; `memkern.plan.lower` turns it into some.
`zero` and `exclude` are different things: a zeroed key keeps its place in the softmax (logit 0) and
contributes nothing; an excluded key is not in the softmax at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from .roles import Role

Branch = Literal["cond", "uncond"]
BRANCHES: tuple[Branch, ...] = ("cond", "uncond")
ORDERS = ("first", "last", "even", "random")


REEMBEDDED_AS = "!"
"""The token that `Bank.PAD_REEMBEDDED` pads with, the paper's."""


class Bank(str, Enum):
    """Rows beside a sequence's own, which `replace` can read."""

    PAD_MEAN = "pad-mean"
    """The mean of the PAD rows of the same window."""
    PAD_REEMBEDDED = "pad-reembedded"
    """The row at the same position, the prompt encoded with "!" for its pads."""


@dataclass(frozen=True)
class Action:
    """What happens to the keys that an edit selects; made by the functions below."""

    kind: str
    value: float | None = None
    source: Role | Bank | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        if self.source is not None:
            name = self.source.name.lower() if isinstance(self.source, Role) else self.source.value
            return f"{self.kind}({name})"
        numbers = ", ".join(f"{number:g}" for number in (self.value, self.threshold) if number is not None)
        return f"{self.kind}({numbers})" if numbers else self.kind

    @property
    def needs_attention(self) -> bool:
        """Whether no edit of the embeddings expresses this action."""
        return self.kind in ("exclude", "logit_scale", "logit_bias", "attenuate")


def keep() -> Action:
    """Leave the rows as they are."""
    return Action("keep")


def zero() -> Action:
    """The embedding row becomes 0: the key keeps logit 0 and contributes nothing (the paper's "masking")."""
    return Action("zero")


def exclude() -> Action:
    """The key leaves the softmax: its logit becomes -inf. Needs the kv stage."""
    return Action("exclude")


def replace(source: Role | Bank | str) -> Action:
    """The row takes another row's content.

    Args:
        source: the role "sot" or "eot" (of the same window), or a bank: "pad-mean" or "pad-reembedded".
    """
    if isinstance(source, str) and source in {bank.value for bank in Bank}:
        return Action("replace", source=Bank(source))
    role = Role.of(source)
    if role not in (Role.SOT, Role.EOT):
        raise ValueError(
            f"replace: {role.name} has many rows; use 'sot', 'eot', or a bank: 'pad-mean', 'pad-reembedded'"
        )
    return Action("replace", source=role)


def logit_scale(factor: float) -> Action:
    """The key's logit is multiplied by `factor`. Needs the kv stage."""
    return Action("logit_scale", _finite("logit_scale", factor))


def logit_bias(bias: float) -> Action:
    """`bias` is added to the key's logit. Needs the kv stage."""
    return Action("logit_bias", _finite("logit_bias", bias))


def attenuate(factor: float, threshold: float) -> Action:
    """The logit of a key that stands out is multiplied by `factor` (GUARD, arXiv 2603.00133). Needs the kv stage.

    Per head, a key stands out whose greatest logit over the queries has a z-score above `threshold` among all
    keys of the row that are attenuated (standard deviation over them, not an estimate from a sample).
    """
    return Action("attenuate", _finite("attenuate", factor), threshold=_finite("attenuate", threshold))


def strength(amount: float) -> Action:
    """The row is scaled by 1 - `amount`: 0 is the identity bit for bit, 1 is `zero`."""
    return Action("strength", _unit("strength", amount))


@dataclass(frozen=True)
class Edit:
    """One role, what happens to it, and where.

    Args:
        role: the role whose positions are edited (`Role` or its name).
        action: what happens to them.
        branch: "cond", "uncond" or "both".
        fraction: the share r of the role's d positions in the row: int(min(d, d·r)) of them are edited.
        order: which ones: "first", "last", "even"ly spread, or "random" by `seed` alone.
        seed: of order "random"; the global generator is never touched.
        roles_of: whose roles select the positions: the row's "own", or those of the "cond" row it is paired
            with (Ren et al. cut the uncond row at its cond row's length).
        layers: UNet layers by dotted name, block ("down", "mid", "up") or resolution ("64x64", "64"); None = all.
        steps: from–to as fractions of the schedule, step i of n being at i/n; None = all.
    """

    role: Role
    action: Action
    branch: Literal["cond", "uncond", "both"] = "cond"
    fraction: float = 1.0
    order: str = "first"
    seed: int = 0
    roles_of: Literal["own", "cond"] = "own"
    layers: tuple[str, ...] | None = None
    steps: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "role", Role.of(self.role))
        if not isinstance(self.action, Action):
            raise TypeError(f"action: expected an Action such as policy.zero(), got {self.action!r}")
        _one_of("branch", self.branch, (*BRANCHES, "both"))
        _unit("fraction", self.fraction)
        _one_of("order", self.order, ORDERS)
        _one_of("roles_of", self.roles_of, ("own", "cond"))
        if self.action.source == self.role:
            raise ValueError(f"action: {self.role.name} cannot be replaced by itself")
        if self.layers is not None:
            layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
            if not layers or not all(isinstance(layer, str) for layer in layers):
                raise ValueError(f"layers: expected names, blocks or resolutions, got {self.layers!r}")
            object.__setattr__(self, "layers", layers)
        if self.steps is not None:
            first, last = (_unit("steps", step) for step in self.steps)
            if first >= last:
                raise ValueError(f"steps: expected from < to, got ({first:g}, {last:g})")
            object.__setattr__(self, "steps", (first, last))

    def applies_to(self, branch: Branch) -> bool:
        """Whether rows of `branch` are edited."""
        return self.branch in (branch, "both")

    def kv_reasons(self) -> list[str]:
        """Why this edit needs the kv stage; empty where editing the embeddings is enough."""
        reasons = []
        if self.action.needs_attention:
            reasons.append(f"{self.action} on {self.role.name} acts on logits")
        if self.layers is not None:
            reasons.append(f"the edit of {self.role.name} has a window of layers")
        if self.steps is not None:
            reasons.append(f"the edit of {self.role.name} has a window of steps")
        return reasons

    def __str__(self) -> str:
        amount = "" if self.fraction == 1 else f" {self.order} {self.fraction:g} of"
        return f"{self.action}{amount} {self.role.name} on {self.branch}"


@dataclass(frozen=True)
class Policy:
    """A set of edits, and whether the pads are re-embedded first.

    Args:
        edits: applied in order to the original rows; where two select a position, the later one wins.
        reembed_pads: the token, "!" in the paper's method 1, that replaces the padding before the text
            encoder on both branches; None leaves the padding alone.
        name: what `str(policy)` says; presets set it.

    Raises:
        TypeError, ValueError: an edit of another type, or one that a later edit makes void.
    """

    edits: tuple[Edit, ...] = ()
    reembed_pads: str | None = None
    name: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.edits, (str, Edit)) or not isinstance(self.edits, Iterable):
            raise TypeError(f"edits: expected a sequence of Edit, got {self.edits!r}; see Policy.parse for presets")
        object.__setattr__(self, "edits", tuple(self.edits))
        for edit in self.edits:
            if not isinstance(edit, Edit):
                raise TypeError(f"edits: expected Edit, got {edit!r}")
        if self.reembed_pads is not None and not (isinstance(self.reembed_pads, str) and self.reembed_pads):
            raise TypeError(f"reembed_pads: expected a token such as '!', got {self.reembed_pads!r}")
        for index, edit in enumerate(self.edits):
            for later in self.edits[index + 1 :]:
                if _covers(later, edit):
                    raise ValueError(f"edits: '{later}' leaves nothing of '{edit}'; give each position one edit")

    @staticmethod
    def parse(text: str) -> Policy:
        """The preset that `text` names, such as "zero-pad:0.7". An unknown one is a ValueError that lists all."""
        from .presets import parse

        return parse(text)

    @staticmethod
    def of(policy: Policy | str) -> Policy:
        """`policy` itself, or the preset it names."""
        if isinstance(policy, Policy):
            return policy
        if isinstance(policy, str):
            return Policy.parse(policy)
        raise TypeError(f"policy: expected a Policy or a preset's name, got {type(policy).__name__}")

    def edits_on(self, branch: Branch) -> tuple[Edit, ...]:
        """The edits that apply to rows of `branch`."""
        _one_of("branch", branch, BRANCHES)
        return tuple(edit for edit in self.edits if edit.applies_to(branch))

    def touches(self, branch: Branch) -> bool:
        """Whether anything about rows of `branch` changes, the re-embedding of their pads included."""
        return self.reembed_pads is not None or bool(self.edits_on(branch))

    def kv_reasons(self) -> list[str]:
        """Why an edit of the embeddings cannot express this policy; empty if it can."""
        return [reason for edit in self.edits for reason in edit.kv_reasons()]

    def reads(self, bank: Bank) -> bool:
        """Whether an edit replaces rows by those of `bank`."""
        return any(edit.action.source is bank for edit in self.edits)

    def pairs(self, branch: Branch) -> bool:
        """Whether rows of `branch` are edited by the roles of the prompts that they are paired with."""
        return branch == "uncond" and any(edit.roles_of == "cond" for edit in self.edits_on(branch))

    def __str__(self) -> str:
        if self.name is not None:
            return self.name
        parts = [f"pads as {self.reembed_pads!r}"] if self.reembed_pads is not None else []
        return " + ".join(parts + [str(edit) for edit in self.edits]) or "none"


def _covers(later: Edit, earlier: Edit) -> bool:
    return (
        later.role == earlier.role
        and later.roles_of == earlier.roles_of
        and later.branch in (earlier.branch, "both")
        and later.fraction == 1
        and later.layers in (None, earlier.layers)
        and later.steps in (None, earlier.steps)
        and not (later.action.needs_attention or earlier.action.needs_attention)
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _finite(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _unit(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return float(value)

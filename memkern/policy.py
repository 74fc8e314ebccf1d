"""Policies: the edit of each token role, its branch, its layers and steps.

A policy is a small immutable value without tensors; `memkern.plan.lower` turns it into tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from operator import index
from typing import Any, Literal, SupportsIndex

from . import documents
from .actions import (
    REEMBEDDED_AS,
    Action,
    Bank,
    attenuate,
    exclude,
    keep,
    logit_bias,
    logit_scale,
    number,
    one_of,
    replace,
    source_name,
    strength,
    unit,
    zero,
)
from .roles import Role

# Actions are importable from here as well, where they were before they had a module.
__all__ = [
    "BRANCHES",
    "ORDERS",
    "PRESETS",
    "REEMBEDDED_AS",
    "Action",
    "Bank",
    "Branch",
    "Edit",
    "Parameter",
    "Policy",
    "Preset",
    "attenuate",
    "exclude",
    "keep",
    "logit_bias",
    "logit_scale",
    "replace",
    "strength",
    "zero",
]

Branch = Literal["cond", "uncond"]
BRANCHES: tuple[Branch, ...] = ("cond", "uncond")
ORDERS = ("first", "last", "even", "random")
_VERSION = 1
_PLAIN = re.compile(r"[\w.:-]+")


@dataclass(frozen=True)
class Edit:
    """One role, its action, and where the action applies.

    Args:
        role: the role whose positions are edited (`Role` or its name).
        action: the action on them.
        branch: "cond", "uncond" or "both".
        fraction: the share r of the role's d positions in the row: int(min(d, d·r)) of them are edited.
        order: the choice of them: "first", "last", "even"ly spread, or "random" by `seed` alone.
        seed: for order "random"; the global generator is never used.
        roles_of: the roles that select the positions: the row's "own", or those of the "cond" row it is paired
            with (Ren et al. cut the uncond row at its cond row's length).
        layers: UNet layers by dotted name, block ("down", "mid", "up") or resolution ("64x64", "64"); None = all.
        steps: from–to as fractions of the schedule; step i of n is at i/n; None = all.
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
        one_of("branch", self.branch, (*BRANCHES, "both"))
        object.__setattr__(self, "fraction", unit("fraction", self.fraction))
        one_of("order", self.order, ORDERS)
        one_of("roles_of", self.roles_of, ("own", "cond"))
        if self.action.source is self.role:
            raise ValueError(f"action: {self.role.name} cannot be replaced by itself")
        object.__setattr__(self, "seed", _seed(self.seed))
        if self.layers is not None:
            object.__setattr__(self, "layers", _layers(self.layers))
        if self.steps is not None:
            object.__setattr__(self, "steps", _steps(self.steps))

    def applies_to(self, branch: Branch) -> bool:
        """True if rows of `branch` are edited."""
        return self.branch in (branch, "both")

    def kv_reasons(self) -> list[str]:
        """The reasons why this edit needs the kv stage; empty if editing the embeddings is enough."""
        reasons = []
        if self.action.needs_attention:
            reasons.append(f"{self.action} on {self.role.name} acts on logits")
        if self.layers is not None:
            reasons.append(f"the edit of {self.role.name} has a window of layers")
        if self.steps is not None:
            reasons.append(f"the edit of {self.role.name} has a window of steps")
        return reasons

    def __str__(self) -> str:
        said = [str(self.action)]
        # Printed even if it changes nothing: edits that are not equal never print alike.
        if (self.fraction, self.order, self.seed) != (1, "first", 0):
            seed = f" (seed {self.seed})" if self.order == "random" or self.seed else ""
            said.append(f"{self.order} {number(self.fraction)}{seed} of")
        said.append(f"{self.role.name} on {self.branch}")
        if self.roles_of != "own":
            said.append(f"by the roles of {self.roles_of}")
        if self.layers is not None:
            names = (layer if _PLAIN.fullmatch(layer) else repr(layer) for layer in self.layers)
            said.append(f"in layers {', '.join(names)}")
        if self.steps is not None:
            said.append(f"in steps {number(self.steps[0])} to {number(self.steps[1])}")
        return " ".join(said)


@dataclass(frozen=True)
class Policy:
    """A set of edits, and the token that re-embeds the pads first, if any.

    Args:
        edits: applied in order to the original rows; where two select a position, the later one wins.
        reembed_pads: the token, "!" in the paper's method 1, that replaces the padding before the text
            encoder on both branches; None leaves the padding alone.
        name: the text of `str(policy)` if it names these same edits, else only its beginning; presets set it.
            Policies with different names are equal if the rest is equal.

    Raises:
        TypeError, ValueError: an edit of another type, or one that a later edit replaces entirely.
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
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise TypeError(f"name: expected text such as 'zero-pad:0.7', got {self.name!r}")
        for place, edit in enumerate(self.edits):
            for later in self.edits[place + 1 :]:
                if _covers(later, edit):
                    raise ValueError(f"edits: '{later}' leaves nothing of '{edit}'; give each position one edit")

    @staticmethod
    def parse(text: str) -> Policy:
        """The preset that `text` names, such as "zero-pad:0.7". An unknown one is a ValueError that lists all."""
        name, colon, numbers = text.strip().partition(":")
        preset = PRESETS.get(name)
        if preset is None:
            known = ", ".join(row.usage for row in PRESETS.values())
            near = "".join(f"; did you mean {guess!r}?" for guess in get_close_matches(name, PRESETS, n=1))
            raise ValueError(f"policy: unknown preset {text!r}; the presets are {known}{near}")
        if not colon:
            return preset.policy()
        if not preset.parameters:
            raise ValueError(f"policy: preset {name!r} takes no parameter, got {text!r}")
        return preset.policy(*preset.numbers(numbers))

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
        one_of("branch", branch, BRANCHES)
        return tuple(edit for edit in self.edits if edit.applies_to(branch))

    def touches(self, branch: Branch) -> bool:
        """True if anything about rows of `branch` changes, including the re-embedding of their pads."""
        return self.reembed_pads is not None or bool(self.edits_on(branch))

    def kv_reasons(self) -> list[str]:
        """The reasons why an edit of the embeddings cannot express this policy; empty if it can."""
        return [reason for edit in self.edits for reason in edit.kv_reasons()]

    def reads(self, bank: Bank) -> bool:
        """True if an edit replaces rows by those of `bank`."""
        return any(edit.action.source is bank for edit in self.edits)

    def pairs(self, branch: Branch) -> bool:
        """True if rows of `branch` are edited by the roles of the prompts that they are paired with."""
        return branch == "uncond" and any(edit.roles_of == "cond" for edit in self.edits_on(branch))

    def to_json(self) -> str:
        """The policy as a JSON document, which `from_json` reads back as an equal policy of the same name.

        An object with "memkern_policy" (the version, 1), "name", "reembed_pads" and "edits"; an edit has the
        fields of `Edit`, and its "action" has a "kind" and the arguments of that. Fields that have their default
        are left out.
        """
        edits = [_given(edit) | {"role": edit.role.name.lower()} for edit in self.edits]
        for written, edit in zip(edits, self.edits, strict=True):
            written["action"] = _given(edit.action)
            if edit.action.source is not None:
                written["action"]["source"] = source_name(edit.action.source)
        document = {"memkern_policy": _VERSION, "name": self.name, "reembed_pads": self.reembed_pads, "edits": edits}
        return json.dumps({name: value for name, value in document.items() if value is not None}, indent=2)

    @staticmethod
    def from_json(text: str) -> Policy:
        """The policy in a JSON document of the form that `to_json` writes.

        Raises:
            ValueError: no JSON, another version, or a field that is unknown, missing, or of a wrong type or value;
                the message names the field, the given value, and the accepted ones.
        """
        with documents.at("policy"):
            document = documents.load(text)
            version = document.get("memkern_policy")
            if type(version) is not int or version != _VERSION:
                raise ValueError(f"memkern_policy: expected version {_VERSION}, got {version!r}")
            given = documents.checked(document, ("memkern_policy", *_names(Policy)), ("edits",))
            edits = []
            for place, edit in enumerate(documents.listed("edits", given["edits"])):
                with documents.at(f"edits[{place}]"):
                    edits.append(_edit(edit))
            return Policy(tuple(edits), given.get("reembed_pads"), given.get("name"))

    def __str__(self) -> str:
        parts = [f"pads as {self.reembed_pads!r}"] if self.reembed_pads is not None else []
        text = " + ".join(parts + [str(edit) for edit in self.edits]) or "none"
        if self.name is None:
            return text
        return self.name if self._is_what_its_name_says() else f"{self.name} ({text})"

    def _is_what_its_name_says(self) -> bool:
        try:
            return Policy.parse(self.name or "") == self
        except ValueError:
            return False


@dataclass(frozen=True)
class Parameter:
    """A number in a preset's name; required if it has no default. A flag is 1, or else 0 and left out of the name."""

    name: str
    default: float | None = None
    minimum: float = 0.0
    maximum: float = math.inf
    flag: bool = False

    def check(self, usage: str, value: float) -> float:
        """`value`, or a ValueError if it is out of range."""
        if self.flag and value not in (0, 1):
            raise ValueError(f"policy {usage}: {self.name} must be 0 or 1, got {number(value)}")
        if not self.minimum <= value <= self.maximum or not math.isfinite(value):
            least = "finite" if self.minimum == -math.inf else f"finite and at least {number(self.minimum)}"
            inside = f"in [{number(self.minimum)}, {number(self.maximum)}]"
            allowed = inside if math.isfinite(self.maximum) else least
            raise ValueError(f"policy {usage}: {self.name} must be {allowed}, got {number(value)}")
        return value


@dataclass(frozen=True)
class Preset:
    """One row of the preset table.

    `make` builds the policy from the numbers after the colon, one for each of `parameters`.
    """

    name: str
    summary: str
    equation: str
    make: Callable[..., Policy]
    parameters: tuple[Parameter, ...] = ()

    @property
    def usage(self) -> str:
        """The string form: the name, with `:parameter` where there is one, flags in brackets."""
        names = ",".join(parameter.name for parameter in self.parameters if not parameter.flag)
        flags = "".join(f"[,{parameter.name}]" for parameter in self.parameters if parameter.flag)
        return f"{self.name}:{names}{flags}" if names else self.name

    def policy(self, *values: float) -> Policy:
        """The policy, with the defaults of parameters that are not given."""
        given = list(values)
        for parameter in self.parameters[len(given) :]:
            if parameter.default is None:
                raise ValueError(f"policy {self.usage}: {parameter.name} has no default; give it")
            given.append(parameter.default)
        checked = [parameter.check(self.usage, value) for parameter, value in zip(self.parameters, given, strict=True)]
        made = self.make(*checked)
        named = [value for value, one in zip(checked, self.parameters, strict=True) if value or not one.flag]
        numbers = ",".join(number(value) for value in named)
        return Policy(made.edits, made.reembed_pads, f"{self.name}:{numbers}" if numbers else self.name)

    def numbers(self, text: str) -> list[float]:
        """The numbers of `text`, such as "0.2,1.5": at most one for each parameter."""
        given = text.split(",")
        if len(given) > len(self.parameters):
            raise ValueError(f"policy {self.usage}: takes {len(self.parameters)} numbers, got '{self.name}:{text}'")
        values = []
        for parameter, value in zip(self.parameters, given, strict=False):
            try:
                values.append(float(value))
            except ValueError:
                raise ValueError(f"policy {self.usage}: {parameter.name} must be a number, got {value!r}") from None
        return values


PRESETS: dict[str, Preset] = {}
"""Name → `Preset`. Some take numbers: "zero-pad:0.7", "ren:1.25", "guard:0.2,1.5"."""


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


def _seed(seed: object) -> int:
    # The seeds that a torch generator takes.
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex) or not -(2**63) <= index(seed) < 2**64:
        raise ValueError(f"seed: expected a whole number in [-2**63, 2**64), got {seed!r}")
    return index(seed)


def _layers(layers: object) -> tuple[str, ...]:
    names = (layers,) if isinstance(layers, str) else tuple(layers) if isinstance(layers, Iterable) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"layers: expected names, blocks or resolutions, got {layers!r}")
    return names


def _steps(steps: object) -> tuple[float, float]:
    pair = tuple(steps) if isinstance(steps, Iterable) else ()
    if len(pair) != 2:
        raise ValueError(f"steps: expected from and to, such as (0, 0.4), got {steps!r}")
    first, last = unit("steps", pair[0]), unit("steps", pair[1])
    if first >= last:
        raise ValueError(f"steps: expected from < to, got ({number(first)}, {number(last)})")
    return first, last


def _names(kind: type[Policy | Edit | Action]) -> tuple[str, ...]:
    return tuple(part.name for part in fields(kind))


def _given(value: Edit | Action) -> dict[str, Any]:
    """The fields that do not have their default."""
    return {part.name: getattr(value, part.name) for part in fields(value) if getattr(value, part.name) != part.default}


def _edit(value: object) -> Edit:
    """The edit of a JSON document."""
    given = documents.checked(value, _names(Edit), ("role", "action"))
    with documents.at("action"):
        action = Action(**documents.checked(given["action"], _names(Action), ("kind",)))
    for name in ("layers", "steps"):
        if given.get(name) is not None:
            documents.listed(name, given[name])
    return Edit(**given | {"action": action})

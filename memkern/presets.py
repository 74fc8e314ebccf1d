"""The published role-based edits, as named policies.

Letters in brackets are the paper's ablations (Kim & No, arXiv 2605.02908, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .policy import Action, Bank, Edit, Policy, exclude, logit_scale, replace, zero
from .roles import Role


@dataclass(frozen=True)
class Preset:
    """One row of the preset table.

    `make` builds the policy from the number after the colon, where the preset takes one.
    """

    name: str
    summary: str
    equation: str
    make: Callable[[float], Policy]
    parameter: str | None = None
    default: float = 1.0
    maximum: float = math.inf

    @property
    def usage(self) -> str:
        """The string form: the name, with `:parameter` where there is one."""
        return self.name if self.parameter is None else f"{self.name}:{self.parameter}"

    def policy(self, value: float | None = None) -> Policy:
        """The policy, with `value` (default: `self.default`) for the parameter."""
        value = self.default if value is None else value
        if not 0 <= value <= self.maximum or not math.isfinite(value):
            allowed = f"in [0, {self.maximum:g}]" if math.isfinite(self.maximum) else "finite and not negative"
            raise ValueError(f"policy {self.usage}: {self.parameter} must be {allowed}, got {value:g}")
        made = self.make(value)
        name = self.name if self.parameter is None else f"{self.name}:{value:.12g}"
        return Policy(made.edits, made.reembed_pads, name)


def _edits(action: Action, *roles: Role) -> Callable[[float], Policy]:
    return lambda _: Policy(tuple(Edit(role, action) for role in roles))


_ROWS = (
    Preset(
        "swap-pad-zero-eot",
        "pads re-embedded as '!' on both branches; EOT zeroed (the paper's method 1)",
        "v^pad ← v^!, v^eot ← 0",
        lambda _: Policy((Edit(Role.EOT, zero()),), reembed_pads="!"),
    ),
    Preset(
        "swap-pad",
        "pads re-embedded as '!' on both branches",
        "v^pad ← v^!",
        lambda _: Policy(reembed_pads="!"),
    ),
    Preset(
        "zero-pad",
        "the first int(min(d, d·r)) of the d PAD positions zeroed (the paper's method 2; r = 1 is (h))",
        "v^pad_i ← 0 for i ≤ ⌊d·r⌋",
        lambda ratio: Policy((Edit(Role.PAD, zero(), fraction=ratio),)),
        parameter="r",
        default=0.7,
        maximum=1.0,
    ),
    Preset("zero-eot", "EOT zeroed (f)", "v^eot ← 0", _edits(zero(), Role.EOT)),
    Preset("zero-eot-pad", "EOT and PAD zeroed (a)", "v^eot, v^pad ← 0", _edits(zero(), Role.EOT, Role.PAD)),
    Preset("zero-prompt", "PROMPT zeroed (c)", "v^pr ← 0", _edits(zero(), Role.PROMPT)),
    Preset(
        "prompt-from-eot",
        "PROMPT takes EOT's row (b)",
        "v^pr ← v^eot",
        _edits(replace(Role.EOT), Role.PROMPT),
    ),
    Preset(
        "pad-from-eot",
        "PAD takes EOT's row (d)",
        "v^pad ← v^eot",
        _edits(replace(Role.EOT), Role.PAD),
    ),
    Preset(
        "prompt-pad-from-eot",
        "PROMPT and PAD take EOT's row (e)",
        "v^pr, v^pad ← v^eot",
        _edits(replace(Role.EOT), Role.PROMPT, Role.PAD),
    ),
    Preset(
        "prompt-eot-from-pad",
        "PROMPT and EOT take the mean of the PAD rows (g)",
        "v^pr, v^eot ← mean(v^pad)",
        _edits(replace(Bank.PAD_MEAN), Role.PROMPT, Role.EOT),
    ),
    Preset(
        "ren",
        "SOT's logit times c; keys after the cond row's EOT excluded on both branches (Ren et al. 2024)",
        "ℓ^sot ← c·ℓ^sot, ℓ^pad ← -∞",
        lambda factor: Policy(
            (
                Edit(Role.SOT, logit_scale(factor)),
                Edit(Role.PAD, exclude(), branch="both", roles_of="cond"),
            )
        ),
        parameter="c",
        default=1.25,
    ),
    Preset("none", "no edit", "v ← v", lambda _: Policy()),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ROWS}
"""Name → `Preset`. `zero-pad` and `ren` take a number: "zero-pad:0.7", "ren:1.25"."""


def parse(text: str) -> Policy:
    """The policy that `text` ("name" or "name:number") names; see `Policy.parse`."""
    name, colon, number = text.strip().partition(":")
    preset = PRESETS.get(name)
    if preset is None:
        known = ", ".join(row.usage for row in _ROWS)
        raise ValueError(f"policy: unknown preset {text!r}; the presets are {known}")
    if not colon:
        return preset.policy()
    if preset.parameter is None:
        raise ValueError(f"policy: preset {name!r} takes no parameter, got {text!r}")
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"policy {preset.usage}: {preset.parameter} must be a number, got {number!r}") from None
    return preset.policy(value)

"""The published role-based edits, as named policies.

Letters in brackets are the paper's ablations (Kim & No, arXiv 2605.02908, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .policy import Action, Bank, Edit, Policy, attenuate, exclude, logit_scale, replace, zero
from .roles import Role


@dataclass(frozen=True)
class Parameter:
    """A number in a preset's name; without a default it has to be given."""

    name: str
    default: float | None = None
    minimum: float = 0.0
    maximum: float = math.inf

    def check(self, usage: str, value: float) -> float:
        """`value`, or a ValueError if it is out of range."""
        if not self.minimum <= value <= self.maximum or not math.isfinite(value):
            least = "finite" if self.minimum == -math.inf else f"finite and at least {self.minimum:g}"
            allowed = f"in [{self.minimum:g}, {self.maximum:g}]" if math.isfinite(self.maximum) else least
            raise ValueError(f"policy {usage}: {self.name} must be {allowed}, got {value:g}")
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
        """The string form: the name, with `:parameter` where there is one."""
        names = ",".join(parameter.name for parameter in self.parameters)
        return f"{self.name}:{names}" if names else self.name

    def policy(self, *values: float) -> Policy:
        """The policy, with the defaults of parameters that are not given."""
        given = list(values)
        for parameter in self.parameters[len(given) :]:
            if parameter.default is None:
                raise ValueError(f"policy {self.usage}: {parameter.name} has no default; give it")
            given.append(parameter.default)
        checked = [parameter.check(self.usage, value) for parameter, value in zip(self.parameters, given, strict=True)]
        made = self.make(*checked)
        numbers = ",".join(f"{value:.12g}" for value in checked)
        return Policy(made.edits, made.reembed_pads, f"{self.name}:{numbers}" if numbers else self.name)


def _edits(action: Action, *roles: Role) -> Callable[[], Policy]:
    return lambda: Policy(tuple(Edit(role, action) for role in roles))


_ROWS = (
    Preset(
        "swap-pad-zero-eot",
        "pads re-embedded as '!' on both branches; EOT zeroed (the paper's method 1)",
        "v^pad ← v^!, v^eot ← 0",
        lambda: Policy((Edit(Role.EOT, zero()),), reembed_pads="!"),
    ),
    Preset(
        "swap-pad",
        "pads re-embedded as '!' on both branches",
        "v^pad ← v^!",
        lambda: Policy(reembed_pads="!"),
    ),
    Preset(
        "zero-pad",
        "the first int(min(d, d·r)) of the d PAD positions zeroed (the paper's method 2; r = 1 is (h))",
        "v^pad_i ← 0 for i ≤ ⌊d·r⌋",
        lambda ratio: Policy((Edit(Role.PAD, zero(), fraction=ratio),)),
        (Parameter("r", 0.7, maximum=1.0),),
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
        (Parameter("c", 1.25),),
    ),
    Preset(
        "guard",
        "keys but SOT's that stand out by z-score: logit times alpha, per head, cond, down and mid blocks (GUARD)",
        "ℓ_i ← α·ℓ_i where z(max_q ℓ_i) > τ",
        lambda alpha, tau: Policy(
            tuple(
                Edit(role, attenuate(alpha, tau), layers=("down", "mid")) for role in (Role.PROMPT, Role.EOT, Role.PAD)
            )
        ),
        (Parameter("alpha"), Parameter("tau", minimum=-math.inf)),
    ),
    Preset("none", "no edit", "v ← v", lambda: Policy()),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ROWS}
"""Name → `Preset`. Some take numbers: "zero-pad:0.7", "ren:1.25", "guard:0.2,1.5"."""


def parse(text: str) -> Policy:
    """The policy that `text` ("name", "name:number" or "name:number,number") names; see `Policy.parse`."""
    name, colon, numbers = text.strip().partition(":")
    preset = PRESETS.get(name)
    if preset is None:
        known = ", ".join(row.usage for row in _ROWS)
        raise ValueError(f"policy: unknown preset {text!r}; the presets are {known}")
    if not colon:
        return preset.policy()
    if not preset.parameters:
        raise ValueError(f"policy: preset {name!r} takes no parameter, got {text!r}")
    given = numbers.split(",")
    if len(given) > len(preset.parameters):
        raise ValueError(f"policy {preset.usage}: takes {len(preset.parameters)} numbers, got {text!r}")
    values = []
    for parameter, number in zip(preset.parameters, given, strict=False):
        try:
            values.append(float(number))
        except ValueError:
            raise ValueError(f"policy {preset.usage}: {parameter.name} must be a number, got {number!r}") from None
    return preset.policy(*values)

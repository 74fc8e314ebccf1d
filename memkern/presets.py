"""The published role-based edits, as named policies.

Letters in brackets are the paper's ablations (Kim & No, arXiv 2605.02908, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .actions import Action, Bank, attenuate, exclude, logit_scale, replace, zero
from .policy import PRESETS, Edit, Parameter, Policy, Preset
from .roles import Role

__all__ = ["DEFAULT_POLICIES", "PRESETS", "Parameter", "Preset"]

DEFAULT_POLICIES = ("swap-pad-zero-eot", "zero-pad:0.7")
"""The policies that are measured if none is named: the paper's two methods."""


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
    Preset(
        "zero-pad-last",
        "the last int(min(d, d·r)) of the d PAD positions zeroed (ours, not published)",
        "v^pad_i ← 0 for i > d - ⌊d·r⌋",
        lambda ratio: Policy((Edit(Role.PAD, zero(), fraction=ratio, order="last"),)),
        (Parameter("r", 0.9, maximum=1.0),),
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
        "SOT's logit times c; keys after the cond row's EOT (eot = 1: from it on) excluded on both branches (Ren 2024)",
        "ℓ^sot ← c·ℓ^sot, ℓ^pad ← -∞",
        lambda factor, eot: Policy(
            (
                Edit(Role.SOT, logit_scale(factor)),
                *(
                    Edit(role, exclude(), branch="both", roles_of="cond")
                    for role in ((Role.EOT, Role.PAD) if eot else (Role.PAD,))
                ),
            )
        ),
        (Parameter("c", 1.25), Parameter("eot", 0.0, flag=True)),
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

PRESETS.update((preset.name, preset) for preset in _ROWS)

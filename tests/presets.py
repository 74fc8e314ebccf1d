"""Presets with numbers, whatever presets there are."""

from __future__ import annotations

from memkern import Policy
from memkern.presets import Preset


def numbered(preset: Preset) -> Policy:
    """The policy of a preset, 0.5 for numbers that have no default."""
    return preset.policy(*(0.5 if each.default is None else each.default for each in preset.parameters))

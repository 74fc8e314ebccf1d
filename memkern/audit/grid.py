"""A grid of policies: a preset's numbers, and the layers and steps in which its edits apply."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from itertools import product

from ..policy import Policy
from .methods import ALTERNATIVES

EVERYWHERE = "all"

MOST = 10_000
"""The most policies of a grid."""

RANGE = re.compile(r"\{([^{}]*)\}")


def grid(
    patterns: Sequence[str], layers: Sequence[str] = (EVERYWHERE,), steps: Sequence[str] = ("0-1",)
) -> list[Policy]:
    """Every policy of the grid, each once.

    Args:
        patterns: presets; each number may be a range or a list in braces: "zero-pad:{0.3..1.0:0.1}" is eight policies,
            "guard:{0.2,0.5},1.5" two. "zero-pad:0.9@down+mid & zero-pad:{0.4,0.6}@up" is two as well, each of them
            two presets in layers of their own.
        layers: for each choice the blocks or layers of the edits, "down+mid"; "all" is no limit. Patterns that name
            their layers keep those.
        steps: for each choice the part of the schedule, "0-0.5".

    Raises:
        ValueError: a pattern, a layer or a part that is not valid, or too many policies.
    """
    places = [_layers(text) for text in layers]
    parts = [_part(text) for text in steps]
    found: dict[Policy, None] = {}
    for pattern in patterns:
        for text in expanded(pattern):
            policy = _together(text)
            for place, part in product([None] if "@" in text else places, parts):
                found.setdefault(_limited(policy, place, part))
            if len(found) > MOST:
                raise ValueError(f"policies: expected at most {MOST:,} in a grid, {pattern!r} makes more")
    return list(found)


def _together(text: str) -> Policy:
    """The policy of presets that "&" joins, each in the layers after its "@"."""
    made = []
    for part in text.split("&"):
        name, at, place = part.partition("@")
        if not name.strip():
            raise ValueError(f"policy: expected a preset, or presets on both sides of each '&', got {text!r}")
        if name.strip().partition(":")[0] in ALTERNATIVES:
            raise ValueError(f"policy: a sweep has presets alone; {name.strip()!r} can be measured by an audit")
        made.append(_limited(Policy.parse(name), _layers(place) if at else None, None))
    if len(made) == 1:
        return made[0]
    reembedded = {policy.reembed_pads for policy in made} - {None}
    return Policy(tuple(edit for policy in made for edit in policy.edits), *reembedded)


def expanded(pattern: str) -> Iterator[str]:
    """The texts that a pattern stands for; the last range varies fastest."""
    match = RANGE.search(pattern)
    if match is None:
        yield pattern.strip()
        return
    for value in _values(match[1], pattern):
        for rest in expanded(pattern[match.end() :]) if pattern[match.end() :] else [""]:
            yield f"{pattern[: match.start()].strip()}{value}{rest}"


def _values(text: str, pattern: str) -> list[str]:
    """The values of "0.3..1.0:0.1", both ends included, or of "0.2,0.5"; decimal, so that no digit is lost."""
    wrong = ValueError(
        f"policy: expected a range such as {{0.3..1.0:0.1}} or a list such as {{0.2,0.5}}, got {pattern!r}"
    )
    if ".." not in text:
        values = [value.strip() for value in text.split(",")]
        if not all(values):
            raise wrong
        return values
    try:
        first, _, rest = text.partition("..")
        last, _, by = rest.partition(":")
        start, stop, step = Decimal(first), Decimal(last), Decimal(by or "1")
    except InvalidOperation:
        raise wrong from None
    if not (all(value.is_finite() for value in (start, stop, step)) and step > 0 and start <= stop):
        raise wrong
    if (stop - start) / step >= MOST:
        raise ValueError(f"policy: expected at most {MOST:,} values of a range, {pattern!r} has more")
    return [f"{start + step * place:f}" for place in range(int((stop - start) / step) + 1)]


def _limited(policy: Policy, layers: tuple[str, ...] | None, part: tuple[float, float] | None) -> Policy:
    """The policy with its edits in these layers and steps; pads are re-embedded everywhere."""
    if layers is None and part is None:
        return policy
    edits = tuple(replace(edit, layers=layers or edit.layers, steps=part or edit.steps) for edit in policy.edits)
    return replace(policy, edits=edits)


def _layers(text: str) -> tuple[str, ...] | None:
    if text.strip() == EVERYWHERE:
        return None
    names = tuple(name.strip() for name in text.split("+"))
    if not all(names):
        raise ValueError(f"layers: expected blocks or layers such as down+mid, got {text!r}")
    return names


def _part(text: str) -> tuple[float, float] | None:
    first, dash, last = text.partition("-")
    try:
        part = float(first), float(last)
    except ValueError:
        part = (1.0, 0.0)
    if not (dash and 0 <= part[0] < part[1] <= 1):
        raise ValueError(f"steps: expected a part of the schedule such as 0-0.5, got {text!r}")
    return None if part == (0, 1) else part

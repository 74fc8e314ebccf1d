"""Actions: the effects of an edit on the keys of a token role.

`zero` and `exclude` differ: a zeroed key keeps its place in the softmax (logit 0) and contributes nothing; an
excluded key is not in the softmax at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TypeGuard

from .roles import Role

REEMBEDDED_AS = "!"
"""The token that `Bank.PAD_REEMBEDDED` pads with, the paper's."""


class Bank(str, Enum):
    """Rows besides a sequence's own, which `replace` can read."""

    PAD_MEAN = "pad-mean"
    """The mean of the PAD rows of the same window."""
    PAD_REEMBEDDED = "pad-reembedded"
    """The row at the same position of the prompt encoded with "!" for its pads."""


_TAKES: dict[str, tuple[str, ...]] = {
    "keep": (),
    "zero": (),
    "exclude": (),
    "replace": ("source",),
    "logit_scale": ("value",),
    "logit_bias": ("value",),
    "attenuate": ("value", "threshold"),
    "strength": ("value",),
}


@dataclass(frozen=True)
class Action:
    """The effect on the keys that an edit selects; made by the functions below.

    Raises:
        ValueError: an unknown kind, a missing argument of the kind, or one that the kind does not take.
    """

    kind: str
    value: float | None = None
    source: Role | Bank | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        one_of("kind", self.kind, tuple(_TAKES))
        for name in ("value", "source", "threshold"):
            given = getattr(self, name)
            if name in _TAKES[self.kind]:
                check = _source if name == "source" else unit if self.kind == "strength" else finite
                object.__setattr__(self, name, check(name, given))
            elif given is not None:
                raise ValueError(f"{name}: {self.kind} takes none, got {given!r}")

    def __str__(self) -> str:
        if self.source is not None:
            return f"{self.kind}({source_name(self.source)})"
        numbers = ", ".join(number(value) for value in (self.value, self.threshold) if value is not None)
        return f"{self.kind}({numbers})" if numbers else self.kind

    @property
    def needs_attention(self) -> bool:
        """True if no edit of the embeddings expresses this action."""
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
    return Action("replace", source=_source("replace", source))


def logit_scale(factor: float) -> Action:
    """The key's logit is multiplied by `factor`. Needs the kv stage."""
    return Action("logit_scale", finite("logit_scale", factor))


def logit_bias(bias: float) -> Action:
    """`bias` is added to the key's logit. Needs the kv stage."""
    return Action("logit_bias", finite("logit_bias", bias))


def attenuate(factor: float, threshold: float) -> Action:
    """The logit of a key that stands out is multiplied by `factor` (GUARD, arXiv 2603.00133). Needs the kv stage.

    Per head, a key stands out if its greatest logit over the queries has a z-score above `threshold` among all
    keys of the row that are attenuated (standard deviation over them, not an estimate from a sample).
    """
    return Action("attenuate", finite("attenuate", factor), threshold=finite("attenuate", threshold))


def strength(amount: float) -> Action:
    """The row is scaled by 1 - `amount`: 0 is the identity bit for bit, 1 is `zero`."""
    return Action("strength", unit("strength", amount))


def source_name(source: Role | Bank) -> str:
    """The name that `replace` takes for `source`: "eot", "pad-mean"."""
    return source.name.lower() if isinstance(source, Role) else source.value


def number(value: float) -> str:
    """The shortest text that is read back as the same number: 0.7, 1, 1e-05."""
    return repr(float(value)).removesuffix(".0")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is among `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def finite(name: str, value: object) -> float:
    """`value` as a float, or a ValueError if it is no number, infinite, or too large for a float."""
    if not _is_number(value) or not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    try:
        return float(value) + 0.0  # -0 becomes 0: equal numbers print alike
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float can hold, got a larger one") from None


def unit(name: str, value: object) -> float:
    """`value` as a float, or a ValueError if it is no number in [0, 1]."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return float(value) + 0.0


def whole(name: str, value: object, least: int) -> None:
    """Raise TypeError unless `value` is a whole number, ValueError unless it is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _source(name: str, source: object) -> Role | Bank:
    if isinstance(source, str) and source in {bank.value for bank in Bank}:
        return Bank(source)
    if not isinstance(source, (Role, str)):
        raise ValueError(f"{name}: expected 'sot', 'eot', or a bank: 'pad-mean', 'pad-reembedded', got {source!r}")
    role = Role.of(source)
    if role not in (Role.SOT, Role.EOT):
        raise ValueError(
            f"{name}: {role.name} has many rows; use 'sot', 'eot', or a bank: 'pad-mean', 'pad-reembedded'"
        )
    return role

"""Measurements in turn, so that a drifting machine does not favour one of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

Taken = TypeVar("Taken")


class Spread(NamedTuple):
    """The quartiles of measured values."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The quartiles of at least two values."""
        return cls(*statistics.quantiles(values, n=4))


def in_turn(
    measures: Sequence[Callable[[], Taken]],
    rounds: int,
    *,
    warm_up: int = 0,
    done: Callable[[], object] = lambda: None,
) -> list[list[Taken]]:
    """Call each measure once per round, in reverse order every other round.

    Args:
        measures: the functions to call; each returns its measurement.
        rounds: the rounds that count.
        warm_up: the rounds before those, which do not count.
        done: called after each call.

    Returns:
        The measurements of each, a value per round.
    """
    found: list[list[Taken]] = [[] for _ in measures]
    places = range(len(measures))
    for turn in range(-warm_up, rounds):
        for place in places if turn % 2 else reversed(places):
            value = measures[place]()
            if turn >= 0:
                found[place].append(value)
            done()
    return found

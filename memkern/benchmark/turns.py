"""Things measured in turn, so that a drifting machine does not favour one of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

Taken = TypeVar("Taken")


class Spread(NamedTuple):
    """The quartiles of what was measured."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least two values."""
        return cls(*statistics.quantiles(values, n=4))


def in_turn(
    measures: Sequence[Callable[[], Taken]],
    rounds: int,
    *,
    warm_up: int = 0,
    done: Callable[[], object] = lambda: None,
) -> list[list[Taken]]:
    """Call each once a round, every other round the last one first.

    Args:
        measures: what to call; each returns what it measured.
        rounds: how many count.
        warm_up: rounds before those, which do not.
        done: called after each call.

    Returns:
        What each returned, a value a round.
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

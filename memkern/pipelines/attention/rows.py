"""Rows of a batch that read the same keys and values: several images of a prompt, or one negative prompt of several.

They are projected and kept once. Rows that follow each other go through a kernel as one longer sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...seen import fingerprints


class Segment(NamedTuple):
    """Consecutive rows of a batch: distinct ones, each repeated the same number of times.

    Attributes:
        batch: the slice of the batch.
        distinct: the slice of the distinct rows.
        times: the number of times that each comes.
    """

    batch: slice
    distinct: slice
    times: int

    def folded(self, rows: torch.Tensor) -> torch.Tensor:
        """The segment's rows of `[B, N, ...]` as one sequence for each distinct one, `[R, times · N, ...]`."""
        part = rows[self.batch]
        return part.reshape(part.shape[0] // self.times, self.times * part.shape[1], *part.shape[2:])


@dataclass(frozen=True)
class Rows:
    """The equal rows of a batch.

    Attributes:
        which: for each row the number of its distinct row; these are numbered in the order in which they first come.
        first: for each distinct row the first row of the batch that equals it.
    """

    which: tuple[int, ...]
    first: tuple[int, ...]

    @classmethod
    def of(cls, *tensors: torch.Tensor) -> Rows:
        """The rows with the same bits in all of `tensors`, `[B, ...]` each. One sync for each device."""
        found: list[list[int]] = []
        for device in dict.fromkeys(tensor.device for tensor in tensors):
            own = [fingerprints(tensor) for tensor in tensors if tensor.device == device]
            found.extend(torch.stack(own).tolist())
        numbers: dict[tuple[int, ...], int] = {}
        which = tuple(numbers.setdefault(values, len(numbers)) for values in zip(*found, strict=True))
        return cls(which, tuple(which.index(number) for number in range(len(numbers))))

    @classmethod
    def all_different(cls, count: int) -> Rows:
        """A batch in which no rows are equal."""
        return cls(tuple(range(count)), tuple(range(count)))

    @classmethod
    def repeated(cls, times: Sequence[int]) -> Rows:
        """Distinct rows one after the other, each as often as `times` says."""
        which = tuple(number for number, count in enumerate(times) for _ in range(count))
        return cls(which, tuple(which.index(number) for number in range(len(times))))

    @property
    def differ(self) -> bool:
        """True if no rows are equal."""
        return len(self.first) == len(self.which)

    def distinct(self, rows: torch.Tensor) -> torch.Tensor:
        """The distinct rows `[R, ...]` of `[B, ...]`."""
        return rows if self.differ else rows[list(self.first)]

    def segments(self) -> Iterator[Segment]:
        """The batch from its first row to its last, in as few segments as possible."""
        runs = [(number, len(list(run))) for number, run in itertools.groupby(self.which)]
        start = 0
        while runs:
            number, times = runs[0]
            # As long as the next ones have the next numbers, and come as often.
            count = next((i for i, run in enumerate(runs) if run != (number + i, times)), len(runs))
            stop = start + count * times
            yield Segment(slice(start, stop), slice(number, number + count), times)
            start, runs = stop, runs[count:]

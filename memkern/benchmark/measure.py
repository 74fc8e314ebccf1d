"""The measurements: subjects in turn, the unpatched one first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from .clock import Taken, peak, timed
from .measured import Run, Timed
from .subject import Step, Subject
from .turns import in_turn

WARM_UP = 3
"""Rounds that do not count: a context is seen, then seen again and prepared, then used."""


class Plan(NamedTuple):
    """The settings of the measurements.

    Attributes:
        inputs: of the pipeline's calls.
        rounds: how often each call is timed.
        device: the device of the UNet.
        done: called after each call.
    """

    inputs: dict[str, Any]
    rounds: int
    device: torch.device
    done: Callable[[], object]

    def times(self, calls: Sequence[Step]) -> list[list[Taken]]:
        """The times of each call, a value per round."""
        measures = [functools.partial(timed, call, self.device) for call in calls]
        return in_turn(measures, self.rounds, warm_up=WARM_UP, done=self.done)


def encodings(subjects: Sequence[Subject], plan: Plan) -> list[Timed]:
    """The times of `encode_prompt`."""
    given = subjects[0].encoding(plan.inputs)
    return _compared(plan.times([subject.encoder(given) for subject in subjects]))


def runs(
    subjects: Sequence[Subject], plan: Plan, *, compiled: bool = False, encoded: Sequence[Timed] | None = None
) -> list[Run]:
    """The time and memory of each subject's step of the UNet.

    Args:
        compiled: True if UNets are compiled.
        encoded: the times of each one's `encode_prompt`, to add to its run.
    """
    with ExitStack() as stack:
        asked = [stack.enter_context(subject.asked(plan.inputs, compiled=compiled)) for subject in subjects]
        taken = plan.times([one.step for one in asked])
        peaks = [peak(one.step, plan.device) for one in asked]
        kept, layers = [subject.kept for subject in subjects], [subject.layers for subject in subjects]
        unmeasured: list[Timed | None] = [None] * len(subjects)
        hosts: Sequence[Timed | None] = unmeasured
        if plan.device.type != "cpu":
            hosts = _compared(taken, "host")
        elif not compiled:
            # Another size would be compiled again.
            small = [one.small(smallest(subject.pipe)) for one, subject in zip(asked, subjects, strict=True)]
            calls = [call for call in small if call is not None]
            hosts = _compared(plan.times(calls)) if len(calls) == len(small) else hosts
    columns = (subjects, _compared(taken), encoded or unmeasured, hosts, peaks, kept, layers)
    return [
        Run(None if subject.policy is None else str(subject.policy), compiled, *values)
        for subject, *values in zip(*columns, strict=True)
    ]


def smallest(pipe: Any) -> int:
    """The side of the smallest latents that the UNet takes: one value is left at its deepest level."""
    return int(2 ** (len(pipe.unet.config.block_out_channels) - 1))


def _compared(taken: Sequence[Sequence[Taken]], part: str = "total") -> list[Timed]:
    rows = [tuple(getattr(one, part) for one in row) for row in taken]
    return [Timed(rows[0]), *(Timed(row, rows[0]) for row in rows[1:])]

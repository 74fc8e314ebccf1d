"""The quality of a score that tells two kinds of prompts apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FALSE_ALARMS = 0.01


@dataclass(frozen=True)
class Roc:
    """The curve of a score whose high values stand for the label True.

    Attributes:
        false, true: the rates at each threshold, from (0, 0) to (1, 1); equal scores are one threshold.
        positives, negatives: how many prompts of each label.
    """

    false: tuple[float, ...]
    true: tuple[float, ...]
    positives: int
    negatives: int

    @classmethod
    def of(cls, scores: Sequence[float], labels: Sequence[bool]) -> Roc | None:
        """The curve of these scores; None unless there are both labels."""
        values, known = np.asarray(scores, np.float64), np.asarray(labels, bool)
        positives, negatives = int(known.sum()), int((~known).sum())
        if not positives or not negatives:
            return None
        order = np.argsort(-values, kind="stable")
        last = np.append(np.diff(values[order]) != 0, True)
        true, false = (np.cumsum(kind[order])[last] for kind in (known, ~known))
        return cls((0.0, *(false / negatives).tolist()), (0.0, *(true / positives).tolist()), positives, negatives)

    @property
    def auc(self) -> float:
        """The area under the curve: the chance that a memorized prompt scores higher than another."""
        return float(np.trapezoid(self.true, self.false))

    @property
    def true_at_few_false(self) -> float:
        """The largest true rate at a false rate of at most 1 %."""
        return max(true for true, false in zip(self.true, self.false, strict=True) if false <= FALSE_ALARMS)

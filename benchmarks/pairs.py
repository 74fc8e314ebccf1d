"""Two implementations timed in turn, so that a drifting machine does not favour one of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from memkern.benchmark.turns import Spread, in_turn


def compare(
    benchmark: Any, ours: Callable[[], object], alternative: Callable[[], object], *, named: str, rounds: int = 60
) -> None:
    """Time both in alternation; the ratios and medians go into the benchmark's record, with ours as its timing.

    Args:
        benchmark: pytest-benchmark's fixture.
        ours: what memkern does.
        alternative: what it is compared with.
        named: the alternative's name.
        rounds: pairs; a tenth more before them warms up.
    """
    mine, others = in_turn([lambda: _seconds(ours), lambda: _seconds(alternative)], rounds, warm_up=rounds // 10)
    ratios = Spread.of([own / other for own, other in zip(mine, others, strict=True)])
    benchmark.extra_info.update(
        alternative=named,
        ours_ms=1e3 * statistics.median(mine),
        alternative_ms=1e3 * statistics.median(others),
        ratio=ratios.median,
        ratio_quartiles=[ratios.low, ratios.high],
    )
    benchmark.pedantic(ours, rounds=1)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start

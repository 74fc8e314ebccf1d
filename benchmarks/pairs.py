"""Two implementations timed in turn, so that a drifting machine does not favour one of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def compare(
    benchmark: Any, ours: Callable[[], object], alternative: Callable[[], object], *, named: str, rounds: int = 60
) -> None:
    """Time both in alternation; the ratios and medians go into the benchmark's record, with ours as its timing.

    Args:
        benchmark: pytest-benchmark's fixture.
        ours: what memkern does.
        alternative: what it is compared with.
        named: the alternative's name.
        rounds: pairs; the first tenth only warms up.
    """
    pairs = []
    for index in range(rounds + rounds // 10):
        timed = {}
        for function in (ours, alternative) if index % 2 else (alternative, ours):
            start = time.perf_counter()
            function()
            timed[function] = time.perf_counter() - start
        if index >= rounds // 10:
            pairs.append((timed[ours], timed[alternative]))
    ratios = statistics.quantiles([mine / other for mine, other in pairs], n=4)
    benchmark.extra_info.update(
        alternative=named,
        ours_ms=1e3 * statistics.median(mine for mine, _ in pairs),
        alternative_ms=1e3 * statistics.median(other for _, other in pairs),
        ratio=ratios[1],
        ratio_quartiles=[ratios[0], ratios[2]],
    )
    benchmark.pedantic(ours, rounds=1)

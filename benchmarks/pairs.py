"""Two implementations timed in turn, so that a drifting machine does not favour one of them."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from memkern.benchmark.turns import Spread, in_turn

CACHES = 64 * 2**20
"""Bytes that push everything else out of a core's own caches, and out of its share of the last one."""


def compare(
    benchmark: Any,
    ours: Callable[[], object],
    alternative: Callable[[], object],
    *,
    named: str,
    rounds: int = 60,
    cold: bool = False,
) -> None:
    """Time both in alternation; the ratios and medians go into the benchmark's record, with ours as its timing.

    Args:
        benchmark: pytest-benchmark's fixture.
        ours: what memkern does.
        alternative: what it is compared with.
        named: the alternative's name.
        rounds: pairs; a tenth more before them warms up.
        cold: whether other memory is written before each call, as the rest of a UNet does between two of a layer.
    """
    measures = [lambda: _seconds(ours), lambda: _seconds(alternative)]
    mine, others = in_turn(measures, rounds, warm_up=rounds // 10, done=_other_memory().zero_ if cold else lambda: None)
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


@functools.lru_cache(maxsize=1)
def _other_memory() -> torch.Tensor:
    return torch.empty(CACHES, dtype=torch.uint8)

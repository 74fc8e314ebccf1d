"""The estimated time of a launch on a card: the largest of four times, plus the launch.

    max(device memory, L2 cache, tensor cores at EFFICIENCY, dependent loads) + LAUNCH

Rates are published ones, except those of L2 caches, which are rounded from published microbenchmarks. Nothing here was
measured; `make gpu` prints each prediction beside its measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from .sizes import cdiv

EFFICIENCY = 0.7
"""The share of the tensor cores' published rate that a good kernel reaches."""

LAUNCH = 2e-6
"""Seconds between the ends of two kernels that do nothing."""

LATENCY = 5e-7
"""Seconds of a load that no other work hides."""

STAGES = 3
"""Turns of a main loop whose loads run at the same time."""


@dataclass(frozen=True)
class Rates:
    """The rates of a card that stands for its family.

    Attributes:
        name: of the card.
        processors: streaming multiprocessors, or compute units.
        operations: float16 operations per second; an addition and a multiplication are two.
        l2: bytes per second through the L2 cache.
        memory: bytes per second through device memory.
        cache: bytes that the L2 cache (AMD: the last cache) holds.
        port: bytes per second that one processor can take from that cache.
    """

    name: str
    processors: int
    operations: float
    l2: float
    memory: float
    cache: float
    port: float

    @property
    def products(self) -> float:
        """Multiply-adds per second of one processor."""
        return self.operations / 2 / self.processors


FAMILIES = {
    "sm75": Rates("T4", 40, 65e12, 1.2e12, 0.32e12, 4e6, 1.0e11),
    "sm80": Rates("A100 80GB", 108, 312e12, 4.4e12, 2.04e12, 40e6, 0.9e11),
    "sm86": Rates("RTX 3090", 82, 71e12, 2.4e12, 0.94e12, 6e6, 1.0e11),
    "sm89": Rates("RTX 4090", 128, 165e12, 4.6e12, 1.01e12, 72e6, 1.6e11),
    "sm90": Rates("H100 SXM", 132, 989e12, 5.6e12, 3.35e12, 50e6, 1.1e11),
    "sm100": Rates("B200", 148, 2250e12, 9e12, 8e12, 126e6, 1.2e11),
    "sm120": Rates("RTX 5090", 170, 209e12, 7e12, 1.79e12, 96e6, 1.5e11),
    "gfx90a": Rates("MI250X, one die", 110, 191e12, 3e12, 1.6e12, 8e6, 1.1e11),
    "gfx942": Rates("MI300X", 304, 1307e12, 8e12, 5.3e12, 256e6, 1.3e11),
    "gfx950": Rates("MI355X", 256, 2300e12, 9e12, 8e12, 256e6, 1.5e11),
    "gfx1100": Rates("RX 7900 XTX", 96, 123e12, 3e12, 0.96e12, 96e6, 1.5e11),
    "gfx1201": Rates("RX 9070 XT", 64, 195e12, 3e12, 0.64e12, 64e6, 1.9e11),
}


@dataclass(frozen=True)
class Work:
    """The properties of a launch that its time depends on.

    Attributes:
        programs: how many.
        products: multiply-adds of one program, those of padding included.
        through_l2: bytes that one program loads and stores.
        through_memory: bytes that have to come from device memory, for all programs.
        between: bytes that the previous kernel left or the next one takes: in the cache, if they fit.
        turns: of one program's main loop.
    """

    programs: int
    products: float
    through_l2: float
    through_memory: float
    between: float = 0.0
    turns: int = 1

    def seconds(self, processors: int, rates: Rates) -> float:
        """The estimate for a card with this number of processors."""
        return max(self.parts(processors, rates).values()) + LAUNCH

    def parts(self, processors: int, rates: Rates) -> dict[str, float]:
        """The four times. Programs on one processor share it, except in the last round."""
        rounds = cdiv(self.programs, processors)
        memory = self.through_memory + (self.between if 2 * self.between > rates.cache else 0)
        return {
            "memory": memory / rates.memory,
            "L2": max(self.programs * self.through_l2 / rates.l2, rounds * self.through_l2 / rates.port),
            "products": rounds * self.products / (EFFICIENCY * rates.products),
            "loads": LATENCY * (2 + self.turns / STAGES) * cdiv(rounds, 2),
        }

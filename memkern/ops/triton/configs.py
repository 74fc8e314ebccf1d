"""Which tile sizes a kernel runs with: a fixed table by card family, kernel, element size and width.

`configs.json` holds it; `python -m memkern.ops.triton.tune` writes one for the card at hand, which the
environment variable MEMKERN_CONFIGS then names. Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cost import FAMILIES, Rates, Work

Entry = dict[str, Any]

_OPTIONS = ("num_warps", "num_stages")
_CONDITIONS = ("bits", "width")


@dataclass(frozen=True)
class Config:
    """Constants a kernel is compiled for, and launch options."""

    constants: dict[str, int]
    options: dict[str, int]

    @property
    def blocks(self) -> dict[str, int]:
        """The constants that kernels take as they are: BLOCK_M and its kind."""
        return {name: size for name, size in self.constants.items() if name.startswith("BLOCK")}


@dataclass(frozen=True, eq=False)
class Card:
    """A GPU as far as launches depend on it.

    Attributes:
        processors: streaming multiprocessors, which a launch should fill.
        entries: kernel → its part of the table for the card's family.
        family: the table's name for it.
    """

    processors: int
    entries: dict[str, list[Entry]]
    family: str = "sm80"

    @classmethod
    def of(cls, device: torch.device) -> Card:
        """The card that `device` is; for the CPU, which interprets, the plainest of the table."""
        return _of_gpu(device) if device.type == "cuda" else cls.like("sm80", 1)

    @classmethod
    def like(cls, family: str, processors: int) -> Card:
        """A card of a family of the table."""
        return cls(processors, table()[family], family)

    @property
    def rates(self) -> Rates:
        """What such a card does per second."""
        return FAMILIES[self.family]

    def config(self, kernel: str, width: int, dtype: torch.dtype) -> Config:
        """The first of `configs`."""
        return self.configs(kernel, width, dtype)[0]

    def configs(self, kernel: str, width: int, dtype: torch.dtype) -> list[Config]:
        """The first entry of this element size whose width is not exceeded, and all others for that width.

        Raises:
            NotImplementedError: there is none.
        """
        found: list[Entry] = []
        for entry in self.entries.get(kernel, ()):
            fits = entry["bits"] == 8 * dtype.itemsize and (entry["width"] is None or width <= entry["width"])
            if fits and (not found or entry["width"] == found[0]["width"]):
                found.append(entry)
        if not found:
            raise NotImplementedError(f"{kernel}: no configuration for {dtype} and a width of {width}")
        return [
            Config(
                {name: entry[name] for name in entry if name not in (*_OPTIONS, *_CONDITIONS)},
                {name: entry[name] for name in _OPTIONS},
            )
            for entry in found
        ]

    def fastest(
        self, kernel: str, width: int, dtype: torch.dtype, work: Callable[[Config], Work]
    ) -> tuple[Config, Work]:
        """The configuration that is estimated to take the least time for the work that it makes."""
        found = [(config, work(config)) for config in self.configs(kernel, width, dtype)]
        return min(found, key=lambda one: one[1].seconds(self.processors, self.rates))


def family_of(capability: tuple[int, int]) -> str:
    """The table's family for a compute capability: the newest that is not newer, of the same generation if any."""
    known = sorted((int(name[2:]) for name in table()), reverse=True)
    older = [family for family in known if family <= 10 * capability[0] + capability[1]]
    same = [family for family in older if family // 10 == capability[0]]
    return f"sm{(same or older or known[-1:])[0]}"


@functools.cache
def table() -> dict[str, dict[str, list[Entry]]]:
    """Family → kernel → entries, those of MEMKERN_CONFIGS before the package's own."""
    path = os.environ.get("MEMKERN_CONFIGS")
    own = json.loads(Path(path).read_text()) if path else {}
    return json.loads(Path(__file__).with_name("configs.json").read_text()) | own  # type: ignore[no-any-return]


@functools.cache
def _of_gpu(device: torch.device) -> Card:
    properties = torch.cuda.get_device_properties(device)
    return Card.like(family_of((properties.major, properties.minor)), properties.multi_processor_count)

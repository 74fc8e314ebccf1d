"""The tile sizes of kernels: a fixed table by card family, kernel, element size and width.

`configs.json` holds it; `python -m memkern.ops.triton.tune` writes one for the card of this machine. Name that
file in the environment variable MEMKERN_CONFIGS to use it. Nothing is tuned at run time.
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

from ..cards import architecture
from .cost import FAMILIES, Rates, Work

Entry = dict[str, Any]

_OPTIONS = ("num_warps", "num_stages")
_CONDITIONS = ("bits", "width", "keys", "whole")


@dataclass(frozen=True)
class Config:
    """Constants that a kernel is compiled for, and launch options."""

    constants: dict[str, int]
    options: dict[str, int]

    @property
    def blocks(self) -> dict[str, int]:
        """The constants that kernels take unchanged: BLOCK_M and the like."""
        return {name: size for name, size in self.constants.items() if name.startswith("BLOCK")}


@dataclass(frozen=True, eq=False)
class Card:
    """The properties of a GPU that launches depend on.

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
        """The card of `device`; for the CPU, which runs the interpreter, the simplest card of the table."""
        return _of_gpu(device) if device.type == "cuda" else cls.like("sm80", 1)

    @classmethod
    def like(cls, family: str, processors: int) -> Card:
        """A card of a family of the table."""
        return cls(processors, table()[family], family)

    @classmethod
    def typical(cls, family: str) -> Card:
        """The card that the rates of a family belong to."""
        return cls.like(family, FAMILIES[family].processors)

    @property
    def rates(self) -> Rates:
        """The rates of such a card, per second."""
        return FAMILIES[self.family]

    def serves(self, kernel: str, width: int, dtype: torch.dtype) -> bool:
        """True if the table has a configuration for these."""
        return any(_fits(entry, width, dtype) for entry in self.entries.get(kernel, ()))

    def config(self, kernel: str, width: int, dtype: torch.dtype) -> Config:
        """The first of `configs`."""
        return self.configs(kernel, width, dtype)[0]

    def configs(self, kernel: str, width: int, dtype: torch.dtype, keys: int = 0) -> list[Config]:
        """The first entry whose conditions hold for `dtype`, `width` and `keys`, and all such entries of its width.

        Raises:
            NotImplementedError: there is none.
        """
        found: list[Entry] = []
        for entry in self.entries.get(kernel, ()):
            if _fits(entry, width, dtype, keys) and (not found or entry["width"] == found[0]["width"]):
                found.append(entry)
        if not found:
            of_keys = f" and {keys} keys" if keys else ""
            raise NotImplementedError(f"{kernel}: no configuration for {dtype} and a width of {width}{of_keys}")
        return [
            Config(
                {name: entry[name] for name in entry if name not in (*_OPTIONS, *_CONDITIONS)},
                {name: entry[name] for name in _OPTIONS},
            )
            for entry in found
        ]

    def fastest(
        self, kernel: str, width: int, dtype: torch.dtype, keys: int, work: Callable[[Config], Work | None]
    ) -> tuple[Config, Work]:
        """The configuration with the least estimated time for its work, of those that can run.

        Raises:
            NotImplementedError: none can run.
        """
        made = ((config, work(config)) for config in self.configs(kernel, width, dtype, keys))
        found = [(config, one) for config, one in made if one is not None]
        if not found:
            raise NotImplementedError(f"{kernel}: no configuration can run for {dtype} and a width of {width}")
        return min(found, key=lambda pair: pair[1].seconds(self.processors, self.rates))


def _fits(entry: Entry, width: int, dtype: torch.dtype, keys: int = 0) -> bool:
    """True under an entry's conditions: bits of an element, most width, most keys, and whole tiles of channels."""
    return (
        entry["bits"] == 8 * dtype.itemsize
        and (entry["width"] is None or width <= entry["width"])
        and keys <= entry.get("keys", keys)
        and not (entry.get("whole") and width % entry["BLOCK_C"])
    )


def family_of(name: str) -> str:
    """The table's family for an architecture, "sm_90" or "gfx942".

    For NVIDIA the newest family that is not newer, of the same generation if there is one; for AMD one of the same
    generation.

    Raises:
        NotImplementedError: there is none.
    """
    if name.startswith("gfx"):
        # gfx1101 is like gfx1100, gfx940 like gfx942: the last one or two digits are steps within a generation.
        alike = [other for other in table() if other[:5] == name[:5] and len(other) == len(name)]
        if not alike:
            raise NotImplementedError(f"triton: no configurations for {name}")
        return name if name in alike else alike[0]
    number = int(name.removeprefix("sm_"))
    known = sorted((int(other[2:]) for other in table() if other.startswith("sm")), reverse=True)
    older = [family for family in known if family <= number]
    same = [family for family in older if family // 10 == number // 10]
    return f"sm{(same or older or known[-1:])[0]}"


@functools.cache
def table() -> dict[str, dict[str, list[Entry]]]:
    """Family → kernel → entries, those of MEMKERN_CONFIGS before the package's own."""
    path = os.environ.get("MEMKERN_CONFIGS")
    own = json.loads(Path(path).read_text()) if path else {}
    return json.loads(Path(__file__).with_name("configs.json").read_text()) | own  # type: ignore[no-any-return]


@functools.cache
def _of_gpu(device: torch.device) -> Card:
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Card.like(family_of(architecture(device)), processors)

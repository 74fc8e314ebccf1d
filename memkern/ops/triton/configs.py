"""Which tile sizes a kernel runs with: a fixed table by card family, kernel, element size and width.

`configs.json` holds it; `python -m memkern.ops.triton.tune` writes one for the card at hand, which the
environment variable MEMKERN_CONFIGS then names. Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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


@dataclass(frozen=True)
class Card:
    """A GPU as far as launches depend on it.

    Attributes:
        processors: streaming multiprocessors, which a launch should fill.
        entries: kernel → its part of the table for the card's family.
    """

    processors: int
    entries: dict[str, list[Entry]]

    @classmethod
    def of(cls, device: torch.device) -> Card:
        """The card that `device` is; for the CPU, which interprets, the plainest of the table."""
        return _of_gpu(device) if device.type == "cuda" else cls(1, table()["sm80"])

    def config(self, kernel: str, width: int, dtype: torch.dtype) -> Config:
        """The first entry of this element size whose width is not exceeded.

        Raises:
            NotImplementedError: there is none.
        """
        for entry in self.entries.get(kernel, ()):
            if entry["bits"] == 8 * dtype.itemsize and (entry["width"] is None or width <= entry["width"]):
                constants = {name: entry[name] for name in entry if name not in (*_OPTIONS, *_CONDITIONS)}
                return Config(constants, {name: entry[name] for name in _OPTIONS})
        raise NotImplementedError(f"{kernel}: no configuration for {dtype} and a width of {width}")


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
    return Card(properties.multi_processor_count, table()[family_of((properties.major, properties.minor))])

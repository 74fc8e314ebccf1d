"""This very tensor, unwritten since: asked by everyone who keeps what was made of one."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Seen:
    """A tensor held weakly, with what tells that it was written to.

    A view made anew of the same place is the same tensor. Writes are counted by the tensor's version; where they are
    not, in inference mode, its values are compared instead (a device sync).
    """

    __slots__ = ("_owner", "_place", "_values", "_version")

    def __init__(self, tensor: torch.Tensor, forget: Callable[[Any], None] | None = None) -> None:
        self._owner = weakref.ref(_owner(tensor), forget)
        self._place = _place(tensor)
        self._version = version(tensor)
        self._values = fingerprint(tensor) if self._version is None else None

    @staticmethod
    def key(tensor: torch.Tensor) -> Hashable:
        """What `tensor` is found by among others that are alive."""
        return id(_owner(tensor)), _place(tensor)

    @property
    def is_counted(self) -> bool:
        """Whether its writes are counted, so that looking again costs nothing."""
        return self._version is not None

    def is_here(self, tensor: torch.Tensor) -> bool:
        """Whether it is this very tensor, written to or not."""
        return self._owner() is _owner(tensor) and self._place == _place(tensor)

    def is_still(self, tensor: torch.Tensor) -> bool:
        """Whether it is this very tensor, unwritten since."""
        if not self.is_here(tensor) or self._version != version(tensor):
            return False
        return self._version is not None or self._values == fingerprint(tensor)

    @property
    def reference(self) -> weakref.ref[torch.Tensor]:
        """What the callback is called with once the tensor is gone."""
        return self._owner


def _owner(tensor: torch.Tensor) -> torch.Tensor:
    base = tensor._base
    return tensor if base is None else base


def _place(tensor: torch.Tensor) -> Hashable:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.data_ptr()


def version(tensor: torch.Tensor) -> int | None:
    """How often it was written to; None for one made in inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


@torch.no_grad()
def fingerprints(rows: torch.Tensor) -> torch.Tensor:
    """One number per row that tells rows of different bits apart: int64 `[B]` for `rows` `[B, …]`; no device sync.

    A sum of the bits, each times a random odd number, modulo 2⁶⁴: rows that differ agree with a probability of about
    2⁻⁶³. NaN equals itself.
    """
    flat = rows.detach().flatten(1).contiguous()
    bits = flat.view(_BITS[flat.itemsize]).to(torch.int64)
    return (bits * _weights(bits.shape[1], flat.device)).sum(1)


def fingerprint(tensor: torch.Tensor) -> int:
    """The one number of a whole tensor; a device sync."""
    return int(fingerprints(tensor.reshape(1, -1)))


@functools.lru_cache(maxsize=32)
def _weights(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    # Made outside of inference mode, whoever asks first.
    with torch.inference_mode(False):
        numbers = torch.randint(-(2**62), 2**62, (count,), generator=generator, dtype=torch.int64, device="cpu")
        return (2 * numbers + 1).to(device)

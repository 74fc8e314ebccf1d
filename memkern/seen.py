"""Checks that a tensor is the same one and was not written to since, for caches of results made from it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Seen:
    """A weak reference to a tensor that detects writes to it.

    A new view of the same memory is the same tensor. The tensor's version counts writes; in inference mode there is
    no version, and its values are compared instead (a device sync).
    """

    __slots__ = ("_owner", "_place", "_values", "_version")

    def __init__(self, tensor: torch.Tensor, forget: Callable[[Any], None] | None = None) -> None:
        self._owner = weakref.ref(_owner(tensor), forget)
        self._place = _place(tensor)
        self._version = version(tensor)
        self._values = fingerprint(tensor) if self._version is None else None

    @staticmethod
    def key(tensor: torch.Tensor) -> Hashable:
        """The key of `tensor` among the tensors that are alive."""
        return id(_owner(tensor)), _place(tensor)

    @property
    def is_counted(self) -> bool:
        """True if its writes are counted, so that checking again costs nothing."""
        return self._version is not None

    def is_here(self, tensor: torch.Tensor) -> bool:
        """True if it is this same tensor, written to or not."""
        return self._owner() is _owner(tensor) and self._place == _place(tensor)

    def is_still(self, tensor: torch.Tensor) -> bool:
        """True if it is this same tensor, not written to since."""
        if not self.is_here(tensor) or self._version != version(tensor):
            return False
        return self._version is not None or self._values == fingerprint(tensor)

    @property
    def reference(self) -> weakref.ref[torch.Tensor]:
        """The reference that the callback is called with once the tensor is gone."""
        return self._owner


def _owner(tensor: torch.Tensor) -> torch.Tensor:
    base = tensor._base
    return tensor if base is None else base


def _place(tensor: torch.Tensor) -> Hashable:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.data_ptr()


def version(tensor: torch.Tensor) -> int | None:
    """The number of writes to it; None for a tensor made in inference mode, which counts none."""
    return None if tensor.is_inference() else tensor._version


@torch.no_grad()
def fingerprints(rows: torch.Tensor) -> torch.Tensor:
    """One number per row, different for rows of different bits: int64 `[B]` for `rows` `[B, …]`; no device sync.

    A sum of the bits, each times a random odd number, modulo 2⁶⁴: rows that differ have the same number with a
    probability of about 2⁻⁶³. NaN equals itself.
    """
    flat = rows.detach().flatten(1).contiguous()
    bits = flat.view(_BITS[flat.itemsize]).to(torch.int64)
    return (bits * _weights(bits.shape[1], flat.device)).sum(1)


def fingerprint(tensor: torch.Tensor) -> int:
    """The number of a whole tensor; a device sync."""
    return int(fingerprints(tensor.reshape(1, -1)))


@functools.lru_cache(maxsize=32)
def _weights(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    # Made outside of inference mode, even if the first caller is in it.
    with torch.inference_mode(False):
        numbers = torch.randint(-(2**62), 2**62, (count,), generator=generator, dtype=torch.int64, device="cpu")
        return (2 * numbers + 1).to(device)

"""Which tensors memkern has edited, how, and for which branch, so that they are known when they come back.

`prompt_embeds` carry no token ids, so a patched pipeline cannot classify them; it can recognise its own.
Entries are weak and by identity: a copy, a cast or a concatenation is a tensor that nobody vouches for.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from .policy import Branch, Policy


class Edited(NamedTuple):
    """The policy that a tensor was edited under, and as which branch."""

    policy: Policy
    branch: Branch


_edited: dict[int, tuple[weakref.ref[torch.Tensor], int, Edited]] = {}


def remember_edited(tensor: torch.Tensor, policy: Policy, branch: Branch) -> None:
    """Note that `tensor` `[B, L, D]`, as it is now, holds embeddings of `branch` edited under `policy`."""
    key = id(tensor)
    reference = weakref.ref(tensor, lambda _: _edited.pop(key, None))
    _edited[key] = (reference, _version(tensor), Edited(policy, branch))


def recall_edited(tensor: torch.Tensor) -> Edited | None:
    """How `tensor` was edited; None if it was not, or was written to since."""
    entry = _edited.get(id(tensor))
    if entry is None:
        return None
    reference, version, edited = entry
    return edited if reference() is tensor and version == _version(tensor) else None


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

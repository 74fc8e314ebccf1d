"""Which tensors memkern has edited, and under which policy, so that they are known when they come back.

`prompt_embeds` carry no token ids, so a patched pipeline cannot classify them; it can recognise its own.
Entries are weak and by identity: a copy, a cast or a concatenation is a tensor that nobody vouches for.
"""

from __future__ import annotations

import weakref

import torch

from .policy import Policy

_edited: dict[int, tuple[weakref.ref[torch.Tensor], int, Policy]] = {}


def remember_edited(tensor: torch.Tensor, policy: Policy) -> None:
    """Note that `tensor`, as it is now, holds embeddings edited under `policy`."""
    key = id(tensor)
    reference = weakref.ref(tensor, lambda _: _edited.pop(key, None))
    _edited[key] = (reference, _version(tensor), policy)


def edited_under(tensor: torch.Tensor) -> Policy | None:
    """The policy that `tensor` was edited under; None if it was not, or was written to since."""
    entry = _edited.get(id(tensor))
    if entry is None:
        return None
    reference, version, policy = entry
    return policy if reference() is tensor and version == _version(tensor) else None


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

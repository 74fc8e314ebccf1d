"""Which tensors memkern has edited, how, and for which branch, so that they are known when they come back.

`prompt_embeds` carry no token ids, so a patched pipeline cannot classify them; it can recognise its own.
Entries are weak and by identity: a copy, a cast or a concatenation is a tensor that nobody vouches for.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Literal

import torch

from .policy import Branch, Policy

Stage = Literal["embeds", "kv"]


@dataclass(frozen=True)
class Edited:
    """What is known of embeddings.

    Attributes:
        policy: what they were made under.
        branch: whose they are.
        roles: uint8 `[B, L]` on the host.
        stage: "embeds": they are edited; "kv": only their pads are, keys and values will be.
        reembedded: `[B, L, D]`, the same prompts encoded with "!" for their pads, where the policy reads that.
    """

    policy: Policy
    branch: Branch
    roles: torch.Tensor
    stage: Stage = "embeds"
    reembedded: torch.Tensor | None = None

    def is_made_for(self, policy: Policy, branch: Branch, stage: Stage) -> bool:
        """Whether they are what a pipeline with this in force makes."""
        return (self.policy, self.branch, self.stage) == (policy, branch, stage)


_edited: dict[int, tuple[weakref.ref[torch.Tensor], int, Edited]] = {}


def remember_edited(tensor: torch.Tensor, edited: Edited) -> None:
    """Note what is known of the embeddings `tensor` `[B·n, L, D]`, as they are now."""
    key = id(tensor)
    reference = weakref.ref(tensor, lambda _: _edited.pop(key, None))
    _edited[key] = (reference, _version(tensor), edited)


def recall_edited(tensor: torch.Tensor) -> Edited | None:
    """How `tensor` was edited; None if it was not, or was written to since."""
    entry = _edited.get(id(tensor))
    if entry is None:
        return None
    reference, version, edited = entry
    return edited if reference() is tensor and version == _version(tensor) else None


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

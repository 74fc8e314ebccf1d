"""Coalescing: m keys with identical k and v are one key with log m added to its logit, exactly.

An edited context is redundant: all of its zeroed rows are one key, and so is a run of equal rows. The keys that are
left can be read from the context itself, also if others made it, or from the plan that edited it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from .plan import Plan

MULTIPLE = 8
"""The multiple to which keys are padded with excluded ones: matrix products gain more than that costs."""


@dataclass(frozen=True)
class Keys:
    """The keys that are left of a context.

    Attributes:
        index: int64 `[B, n]`, the row of the context that stands for each key.
        bias: float32 `[B, n]`, the log of how many rows it stands for, plus the plan's bias; -inf for padding.
        counts: number of keys of each sequence before its padding.
    """

    index: torch.Tensor
    bias: torch.Tensor
    counts: tuple[int, ...]

    def rows(self, context: torch.Tensor) -> torch.Tensor:
        """The kept rows of a context `[B, L, D]`: `[B, n, D]`."""
        return context.gather(1, self.index.unsqueeze(-1).expand(-1, -1, context.shape[-1]))


def coalesce(context: torch.Tensor) -> Keys:
    """Find the keys that are left of a context from its rows: zero rows, and runs of equal ones. One device sync.

    Args:
        context: `[B, L, D]`, the rows that cross-attention reads.
    """
    zero = (context == 0).all(-1)
    same = torch.zeros_like(zero)
    same[:, 1:] = (context[:, 1:] == context[:, :-1]).all(-1)
    groups = []
    for zeros, sames in zip(*torch.stack([zero, same]).cpu().tolist(), strict=True):
        names: list[Hashable] = []
        for position, (is_zero, is_same) in enumerate(zip(zeros, sames, strict=True)):
            names.append("zero" if is_zero else names[-1] if is_same else position)
        groups.append(names)
    return _keys(groups, [[0.0] * len(names) for names in groups], context.device)


def coalesce_plan(plan: Plan) -> Keys:
    """Find the keys that are left from a plan: those that read the same row in the same way are one, at any positions.

    Excluded keys disappear. The index is that of the edited context. One device sync if the plan is on a device.
    """
    groups, biases = [], []
    tensors = (plan.source, plan.k_scale, plan.v_scale, plan.bias)
    for rows in zip(*(tensor.cpu().tolist() for tensor in tensors), strict=True):
        names: list[Hashable] = []
        for source, k_scale, v_scale, bias in zip(*rows, strict=True):
            if bias == -math.inf:
                names.append(None)
            else:
                names.append(("zero", bias) if k_scale == v_scale == 0 else (source, k_scale, v_scale, bias))
        groups.append(names)
        biases.append(rows[3])
    return _keys(groups, biases, plan.source.device)


def every_key(plan: Plan) -> Keys:
    """Every key of a plan that is not excluded, none of them merged."""
    groups = [
        [None if value == -math.inf else position for position, value in enumerate(row)]
        for row in plan.bias.cpu().tolist()
    ]
    return _keys(groups, plan.bias.cpu().tolist(), plan.source.device)


def _keys(groups: Sequence[Sequence[Hashable]], biases: Sequence[Sequence[float]], device: torch.device) -> Keys:
    """One key per name and sequence, at the first position with that name; None gives no key."""
    kept: list[list[int]] = []
    logs: list[list[float]] = []
    for names, bias in zip(groups, biases, strict=True):
        members: dict[Hashable, list[int]] = {}
        for position, name in enumerate(names):
            if name is not None:
                members.setdefault(name, []).append(position)
        kept.append([positions[0] for positions in members.values()])
        logs.append([math.log(len(positions)) + bias[positions[0]] for positions in members.values()])
    counts = tuple(len(positions) for positions in kept)
    width = max(MULTIPLE, math.ceil(max(counts, default=0) / MULTIPLE) * MULTIPLE)
    shape = len(kept), width
    rows = [positions + [0] * (width - len(positions)) for positions in kept]
    padded = [values + [-math.inf] * (width - len(values)) for values in logs]
    index = torch.tensor(rows, dtype=torch.int64, device="cpu")
    total = torch.tensor(padded, dtype=torch.float32, device="cpu")
    return Keys(index.reshape(shape).to(device), total.reshape(shape).to(device), counts)

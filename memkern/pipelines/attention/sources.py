"""The keys and values that a cross-attention layer reads from a context, edited or not, before any layer's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ... import ops
from ...coalesce import Keys, coalesce, coalesce_plan, every_key
from ...ops.attention import wide
from ...plan import Plan
from .layer import Layer
from .rows import Rows

Readers = tuple[tuple[int, int], ...]
"""Numbers of keys, each with the rows of a batch that read them."""


@dataclass(frozen=True)
class Attenuation:
    """An `attenuate` edit: its numbers, and `selected`, bool `[B, n]`, the keys it looks at."""

    factor: float
    threshold: float
    selected: torch.Tensor

    def factors(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """The factor of each key's logit, `[B, H, n]`, for q `[B, H, N, D]` and k `[B, H, n, D]`."""
        keys = wide(k)
        tops = [(wide(part) @ keys.mT).amax(2) for part in torch.split(q, 1024, 2)]
        top = torch.stack(tops).amax(0) * scale  # [B, H, n]
        among = self.selected.unsqueeze(1).expand_as(top)
        count = among.sum(-1, keepdim=True).clamp(min=1)
        mean = top.where(among, 0).sum(-1, keepdim=True) / count
        deviation = ((top - mean).square().where(among, 0).sum(-1, keepdim=True) / count).sqrt()
        stands_out = among & (top - mean > self.threshold * deviation)
        return torch.ones_like(top).masked_fill(stands_out, self.factor)


@dataclass(frozen=True)
class Source:
    """The keys and values of a context, before any layer's weights; once for equal rows.

    Attributes:
        rows: the equal rows of the batch.
        keys: those that are left of each distinct row.
        length: L of the context.
        project: a function from a layer and the context to their k and v, `[R, n, C]` each.
        attenuation: the edits that depend on the queries.
        edited: whether the layer's own processor, which knows of no edits, would compute something else.
    """

    rows: Rows
    keys: Keys
    length: int
    project: Callable[[Layer, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    attenuation: tuple[Attenuation, ...] = ()
    edited: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of keys that each row of the batch has left."""
        return tuple(self.keys.counts[number] for number in self.rows.which)

    @property
    def readers(self) -> Readers:
        """The number of keys that each distinct row has left, and the number of the batch's rows that it stands for."""
        times = Counter(self.rows.which)
        return tuple((count, times[number]) for number, count in enumerate(self.keys.counts))

    def attenuated(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """The keys k `[B, H, n, D]`, attenuated for the queries q `[B, H, N, D]`."""
        for attenuation in self.attenuation:
            k = k * attenuation.factors(q, k, scale).unsqueeze(-1).to(k.dtype)
        return k


def unedited(context: torch.Tensor) -> Source:
    """The context as it is: zero rows are one key, and so are runs of equal rows."""
    rows = Rows.of(context)
    keys = coalesce(rows.distinct(context))

    def project(layer: Layer, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.key_value(keys.rows(rows.distinct(context)))

    return Source(rows, keys, context.shape[1], project)


def edited(
    context: torch.Tensor,
    plan: Plan,
    bank: torch.Tensor | None = None,
    attenuation: tuple[Attenuation, ...] = (),
    *,
    backend: str,
    coalesced: bool = True,
    columns: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Source:
    """The context with a plan on its keys and values.

    Args:
        context: `[B, L, D]`.
        plan: of its rows, on the host.
        bank: `[B, M, D]`, the rows that the plan reads beside the context's own.
        attenuation: with `selected` `[B, L]` on the host; no keys are merged then.
        backend: of `edit_kv`.
        coalesced: whether equal keys, and equal rows of the batch, may be merged.
        columns: an edit of the context before the plan, where encoders' columns are edited differently; no keys are
            merged then.
    """
    rows = Rows.all_different(len(context))
    if coalesced and not attenuation and columns is None:
        read = (context, *(() if bank is None else (bank,)), plan.source, plan.k_scale, plan.v_scale, plan.bias)
        rows = Rows.of(*read)
        plan, bank = plan.rows(list(rows.first)), None if bank is None else rows.distinct(bank)
    keys = coalesce_plan(plan) if coalesced and not attenuation and columns is None else every_key(plan)
    keys = Keys(keys.index.to(context.device), keys.bias.to(context.device), keys.counts)
    source, k_scale, v_scale = (
        part.to(context.device, non_blocking=True) for part in (plan.source, plan.k_scale, plan.v_scale)
    )
    # The factor of a logit; a key that is zeroed keeps its own.
    factor = torch.where(v_scale != 0, k_scale / v_scale, torch.ones_like(v_scale)).unsqueeze(-1)

    def project(layer: Layer, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        read = rows.distinct(context if columns is None else columns(context))
        shift = layer.key_value_shift(read)
        k, v = _without(shift, layer.key_value(read))
        k_bank, v_bank = (None, None) if bank is None else _without(shift, layer.key_value(bank))
        k, v = ops.edit_kv(k, v, k_bank, v_bank, source, k_scale, v_scale, backend=backend)
        if shift is not None:
            k, v = k + (shift[0] * factor).to(k.dtype), v + shift[1]
        return keys.rows(k), keys.rows(v)

    moved = []
    for part in attenuation:
        selected = part.selected.to(context.device).gather(1, keys.index)
        # Padding stands for no key, and is not judged among the keys.
        moved.append(Attenuation(part.factor, part.threshold, selected & (keys.bias != -torch.inf)))
    return Source(rows, keys, context.shape[1], project, tuple(moved), edited=True)


def _without(
    shift: tuple[torch.Tensor, torch.Tensor] | None, made: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return made if shift is None else (made[0] - shift[0], made[1] - shift[1])

"""One call of a UNet: its session, its place in the schedule, and the layers that it has reached."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from ...scope import layer_size
from ..attention.choose import Prepared
from ..attention.layer import Layer
from ..attention.paths import compute_dtype
from ..session import Session
from .contexts import Context
from .kv_stage import Active
from .ready import Ready
from .schedule import Place


@dataclass
class Call:
    """One call of a UNet.

    Attributes:
        site: that of the UNet.
        session: the one that it belongs to.
        direct: whether it is made outside any call of a pipeline.
        context: the tensor that its cross-attention reads.
        known: the `Context` that describes that tensor.
        place: its place in the schedule.
        reached: the layers whose keys and values were looked at for edits.
        sizes: the resolutions of those layers, as an edit's scope may name them.
        causes: why a layer was not reached, where that is known.
        lora_scale: the factor of its LoRAs.
        loras: the scaling of each before that, where the factor is not 1.
        computes: whether memkern computes layers for it.
        accelerates: whether results from the context may be kept.
        shares: whether equal rows may be computed once.
    """

    site: Any
    session: Session
    direct: bool
    context: torch.Tensor | None = None
    known: Context | None = None
    place: Place = field(default_factory=Place)
    reached: set[str] = field(default_factory=set)
    sizes: set[str] = field(default_factory=set)
    causes: dict[str, str] = field(default_factory=dict)
    lora_scale: float = 1.0
    loras: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.session.settings
        # Layers of a ControlNet may be left alone.
        self.computes = not self.site.prefix or settings.controlnet
        self.accelerates = bool(settings.accelerate)
        self.shares = self.computes and self.accelerates and settings.accelerate != "attention"
        if self.lora_scale != 1:
            parts = self.site.processors.projections
            self.loras = {
                part: dict(part.scaling) for part in parts if isinstance(getattr(part, "scaling", None), dict)
            }

    def settle(self) -> None:
        """Count it at once if it belongs to no call of a pipeline."""
        if self.direct:
            self.session.patch.tally.add(self.session.settle())

    def active(self, name: str, x: torch.Tensor, known: Context, mask: torch.Tensor | None) -> Active | None:
        """The edits in force in a layer whose hidden states are x `[B, N, C]`, which then counts as reached; empty for
        none, None where a mask keeps it from being edited.
        """
        assert known.edits is not None
        active = known.edits.active(name, x.shape[1], self.place)
        if mask is not None:
            self.causes[name] = "it was called with an attention mask, beside which nothing is edited"
            if any(active):
                self.session.unmitigated(f"{name} {self.causes[name].removeprefix('it ')}")
            return None
        self.reached.add(name)
        self.sizes |= self._sizes(x)
        return active if any(active) else ()

    def _sizes(self, x: torch.Tensor) -> frozenset[str]:
        """The names that an edit's scope may use for the resolution of a layer with hidden states x."""
        size = layer_size(x.shape[1], self.place.sample)
        if size is None:
            return frozenset()
        height, width = size
        return frozenset([f"{height}x{width}", *([str(height)] if height == width else [])])

    def make_ready(self, known: Context, prepared: Prepared, layer: Layer, x: torch.Tensor) -> None:
        """Let a layer repeat from now on what it has just done, unless edits change with the steps."""
        if not known.is_edited or (known.edits is not None and not known.edits.follows_steps):
            sizes = self._sizes(x) if known.is_edited else frozenset()
            known.ready[id(layer.attn)] = Ready(
                prepared, layer, x.shape, x.dtype, compute_dtype(x), self.place.sample, sizes
            )

    def ready(
        self, name: str, attn: Any, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
    ) -> Ready | None:
        """The `Ready` of a layer, which then counts as reached, if it is called as before; else None."""
        known = self.known
        if known is None or context is not self.context or mask is not None or not (self.computes and self.accelerates):
            return None
        found = known.ready.get(id(attn))
        if found is None or found.layer.attn is not attn or not found.takes(x, self.place.sample, by_value=self.direct):
            return None
        if known.is_edited:
            self.reached.add(name)
            self.sizes |= found.sizes
        return found


CALL: ContextVar[Call | None] = ContextVar("memkern_unet_call", default=None)
"""The call that this context is in."""

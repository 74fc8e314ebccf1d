"""One call of a UNet: for whom it is, where in the schedule, and which layers it has reached."""

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
        site: whose.
        session: for whom.
        direct: whether it is made outside any call of a pipeline.
        context: what it was given to read.
        known: what is known of that.
        place: where in the schedule it is.
        reached: the layers whose keys and values were looked at for edits.
        sizes: resolutions that were met by an edit's scope.
        causes: why a layer was not reached, where it is known.
        lora_scale: what its LoRAs are scaled by.
        loras: how each is scaled before that, where it is.
        computes: whether layers are computed for it.
        accelerates: whether what is made of the context may be kept.
        shares: whether rows that are equal may be computed once.
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
        # Those of a ControlNet may be left alone.
        self.computes = not self.site.prefix or settings.controlnet
        self.accelerates = bool(settings.accelerate)
        self.shares = self.computes and self.accelerates and settings.accelerate != "attention"
        if self.lora_scale != 1:
            parts = self.site.processors.projections
            self.loras = {
                part: dict(part.scaling) for part in parts if isinstance(getattr(part, "scaling", None), dict)
            }

    def settle(self) -> None:
        """Count at once what belongs to no call of a pipeline."""
        if self.direct:
            self.session.patch.tally.add(self.session.settle())

    def active(self, name: str, x: torch.Tensor, known: Context, mask: torch.Tensor | None) -> Active | None:
        """The edits in force in a layer whose hidden states are x `[B, N, C]`, which is reached by that; empty for
        none, None where its mask keeps it from being edited.
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
        """What an edit's scope may call the resolution of a layer with hidden states x."""
        size = layer_size(x.shape[1], self.place.sample)
        if size is None:
            return frozenset()
        height, width = size
        return frozenset([f"{height}x{width}", *([str(height)] if height == width else [])])

    def make_ready(self, known: Context, prepared: Prepared, layer: Layer, x: torch.Tensor) -> None:
        """Let a layer do from now on what it has just done, unless edits change with the steps."""
        if not known.is_edited or (known.edits is not None and not known.edits.follows_steps):
            sizes = self._sizes(x) if known.is_edited else frozenset()
            known.ready[id(layer.attn)] = Ready(
                prepared, layer, x.shape, x.dtype, compute_dtype(x), self.place.sample, sizes
            )

    def ready(
        self, name: str, attn: Any, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
    ) -> Ready | None:
        """What a layer has been made ready to do, if it is called as it was then; it counts as reached."""
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

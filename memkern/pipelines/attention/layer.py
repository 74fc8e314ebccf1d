"""A cross-attention layer with its own processor: its kind of attention, and its projections."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models import attention_processor as theirs
from torch import nn

Kind = Literal["plain", "fused", "images"]
"""softmax(q kᵀ) v with K and V from two projections, or from one; or with attention to images of IP-Adapters added."""

_KINDS: dict[type, Kind] = {
    theirs.AttnProcessor: "plain",
    theirs.AttnProcessor2_0: "plain",
    theirs.SlicedAttnProcessor: "plain",
    theirs.XFormersAttnProcessor: "plain",
    theirs.FusedAttnProcessor2_0: "fused",
    theirs.IPAdapterAttnProcessor: "images",
    theirs.IPAdapterAttnProcessor2_0: "images",
    **({theirs.IPAdapterXFormersAttnProcessor: "images"} if hasattr(theirs, "IPAdapterXFormersAttnProcessor") else {}),
}

_MODULES = {"AttnProcessor", "AttnProcessor2_0"}
"""Plain processors that code outside diffusers, such as IP-Adapter's own, writes as modules."""


def kind_of(processor: Any) -> Kind | None:
    """The kind of attention that a processor computes; None for one that may compute anything."""
    own = type(processor)
    if own in _KINDS:
        return _KINDS[own]
    if own.__name__ == "XFormersAttnProcessor" or (own.__name__ in _MODULES and issubclass(own, nn.Module)):
        names = [*inspect.signature(own.__call__).parameters][1:6]
        usual = ["attn", "hidden_states", "encoder_hidden_states", "attention_mask", "temb"]
        return "plain" if names == usual else None
    return None


class Images(NamedTuple):
    """The images of IP-Adapters, which a layer reads beside the context.

    Attributes:
        states: one for each IP-Adapter, `[B, images, tokens, D]`.
        masks: one for each, `[1, images, height, width]` or None; None for no masks at all.
    """

    states: list[torch.Tensor]
    masks: list[torch.Tensor | None] | None


@dataclass(frozen=True)
class Layer:
    """A cross-attention layer.

    Attributes:
        attn: the module.
        own: its processor, beneath memkern's.
    """

    attn: Any
    own: Any

    @functools.cached_property
    def kind(self) -> Kind | None:
        """The kind of attention that its own processor computes."""
        return kind_of(self.own)

    @property
    def scale(self) -> float:
        """The factor of the logits: with torch's own attention always one over the root of a head's size."""
        if type(self.own).__name__.endswith("2_0"):
            return float((self.attn.inner_dim // self.attn.heads) ** -0.5)
        return float(self.attn.scale)

    @property
    def key_value_modules(self) -> dict[str, Any]:
        """The modules that compute K and V, by name."""
        if self.kind == "fused":
            return {"to_kv": self.attn.to_kv}
        return {"to_k": self.attn.to_k, "to_v": self.attn.to_v}

    @property
    def modules(self) -> dict[str, Any]:
        """All projections, by name."""
        return {"to_q": self.attn.to_q, **self.key_value_modules, "to_out[0]": self.attn.to_out[0]}

    def key_value(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[B, n, C]` of rows `[B, n, D]`."""
        made = [module(rows) for module in self.key_value_modules.values()]
        k, v = made[0].chunk(2, -1) if len(made) == 1 else made
        return k, v

    def key_value_shift(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The part of K and V that biases add: the projections of zero, since an adapter may add to it; None where they
        have no biases.
        """
        if all(getattr(module, "bias", None) is None for module in self.key_value_modules.values()):
            return None
        return self.key_value(rows.new_zeros(1, 1, rows.shape[-1]))

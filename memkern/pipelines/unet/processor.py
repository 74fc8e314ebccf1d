"""The processor that takes the place of a cross-attention layer's own, and calls it where it cannot do better."""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from ..attention.layer import Images, kind_of
from . import traced

_OWN = {"former", "site", "name", "number", "_attn"}


class Computes(Protocol):
    """The object that computes a layer in place of its former processor: the site of its UNet.

    Attributes:
        is_placed: whether memkern's processors are in force there.
        edits_kv: whether any pipeline that shares the UNet may edit keys and values.
    """

    is_placed: bool
    edits_kv: bool

    @property
    def call(self) -> Any:
        """The call of the UNet that is under way."""

    def attend(
        self, name: str, attn: Any, former: Any, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None,
        images: Images | None,
    ) -> torch.Tensor | None:  # fmt: skip
        """The layer's output; None where its former processor is to compute it."""


class LayerProcessor:
    """Stands in a layer for the processor that it replaced, under that one's class and attributes.

    One whose patch is gone acts as the processor it replaced, and so does one that diffusers makes from its class.
    """

    def __init__(self, former: Any = None, site: Computes | None = None, name: str = "", attn: Any = None) -> None:
        self.former = AttnProcessor2_0() if former is None else former
        self.site = site
        self.name = name
        self.number = traced.new_number()
        self._attn = None if attn is None else weakref.ref(attn)
        traced.PROCESSORS[int(self.number)] = self

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the processor that was replaced: diffusers looks processors up in lists of its classes."""
        return type(self.former)

    @property
    def attn(self) -> Any:
        """The layer it was put into; None once that is gone, or has another processor."""
        attn = None if self._attn is None else self._attn()
        return attn if attn is not None and attn.processor is self else None

    @property
    def call(self) -> Any:
        """The call of its UNet that is under way; None if none is."""
        return getattr(self.site, "call", None)

    def __getattr__(self, name: str) -> Any:
        if "former" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["former"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Whatever a tool sets, the scale of an IP-Adapter or a slice's size, is for the processor that is still called.
        if name in _OWN or "former" not in vars(self):
            object.__setattr__(self, name, value)
        else:
            setattr(vars(self)["former"], name, value)

    def _former(
        self, attn: Attention, x: torch.Tensor, context: Any, mask: torch.Tensor | None, **rest: Any
    ) -> torch.Tensor:
        out: torch.Tensor = self.former(attn, x, encoder_hidden_states=context, attention_mask=mask, **rest)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied UNet is not patched: it gets a copy of the processor that was there before."""
        return copy.deepcopy(self.former, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing of memkern is pickled with a UNet."""
        return copy.copy, (self.former,)


class CrossAttentionProcessor(LayerProcessor):
    """Computes a layer from the results kept for its context, or by the processor that it replaced."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not isinstance(encoder_hidden_states, torch.Tensor) or self._is_left(attn):
            return self._former(attn, hidden_states, encoder_hidden_states, attention_mask, temb=temb)
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return traced.attend(hidden_states, encoder_hidden_states, attention_mask, None, self.number)
        made: torch.Tensor = self.compute(attn, hidden_states, encoder_hidden_states, attention_mask)
        return made

    def _is_left(self, attn: Attention) -> bool:
        # In a graph with gradients, nothing is looked up if nothing is edited.
        needs_graph = torch.compiler.is_compiling() and torch.is_grad_enabled()
        if needs_graph and (self.site is None or not self.site.edits_kv):
            return True
        # An exported program finds no processor by number where it is loaded; a layer of another UNet is not ours.
        return attn.spatial_norm is not None or traced.is_exported() or self.attn is not attn

    # The edit of each row depends on the values of the context, which a traced graph does not look at.
    # diffusers asks each layer's processor for its parameters in each step.
    __call__.__signature__ = inspect.signature(__call__)  # type: ignore[attr-defined]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute(
        self,
        attn: Attention,
        x: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor | None,
        images: Images | None = None,
    ) -> torch.Tensor:
        """The layer's output for a context `[B, L, D]` and the images beside it."""
        site = self.site
        if site is not None and site.is_placed:
            call = site.call
            ready = None if call is None or images is not None else call.ready(self.name, attn, x, context, mask)
            if ready is not None:
                again = ready.prepared.attend
                return self._former(attn, x, context, mask) if again is None else again(x, context, None)
            out = site.attend(self.name, attn, self.former, x, context, mask, images)
            if out is not None:
                return out
        if images is None:
            return self._former(attn, x, context, mask)
        return self._former(attn, x, (context, images.states), mask, ip_adapter_masks=images.masks)


class ModuleProcessor(CrossAttentionProcessor, nn.Module):
    """A processor in place of one that is a module: with its parameters, under their names."""

    def __init__(self, former: Any = None, *args: Any, **named: Any) -> None:
        nn.Module.__init__(self)
        for held in ("_parameters", "_buffers", "_modules"):
            vars(self)[held] = vars(former)[held]
        CrossAttentionProcessor.__init__(self, former, *args, **named)


class ImagesProcessor(ModuleProcessor):
    """A processor in place of an IP-Adapter's: the text's part is edited and kept, the images' is unchanged."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> torch.Tensor:
        # A single tensor of text and images together is a form that diffusers has given up.
        if not isinstance(encoder_hidden_states, tuple) or self._is_left(attn):
            return self._former(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb=temb, ip_adapter_masks=ip_adapter_masks
            )
        if isinstance(ip_adapter_masks, torch.Tensor):
            ip_adapter_masks = list(ip_adapter_masks.unsqueeze(1))
        images = Images(list(encoder_hidden_states[1]), ip_adapter_masks)
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return traced.attend(hidden_states, encoder_hidden_states[0], attention_mask, images, self.number)
        made: torch.Tensor = self.compute(attn, hidden_states, encoder_hidden_states[0], attention_mask, images)
        return made


def is_ours(processor: Any) -> bool:
    """True if a processor is memkern's."""
    return issubclass(type(processor), LayerProcessor)


def former_of(processor: Any) -> Any:
    """The processor that a layer has, or had before memkern's took its place."""
    while is_ours(processor):
        processor = processor.former
    return processor


def replacement(former: Any, site: Computes, name: str, attn: Any) -> CrossAttentionProcessor:
    """A processor to put in place of `former`."""
    if kind_of(former) == "images":
        return ImagesProcessor(former, site, name, attn)
    own = ModuleProcessor if isinstance(former, nn.Module) else CrossAttentionProcessor
    return own(former, site, name, attn)

"""Opaque operators that a traced graph calls in place of memkern's hooks and processors, which run inside them as they
do without a graph.

A graph stays whole (`fullgraph=True`), and is not traced again for another prompt, policy or adapter: sites and layers
are found by number. CUDA graphs are made around these operators, not of them (`cudagraph_unsafe`).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import scale_lora_layers, unscale_lora_layers

from ..attention.layer import Images

SITES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The sites whose hooks graphs may call, by number."""

PROCESSORS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The processors that graphs may call, by number."""

NUMBERS = itertools.count()

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_LIBRARY = torch.library.Library("memkern", "FRAGMENT")
_LIBRARY.define(
    "unet_begins(Tensor sample, Tensor context, Tensor time, float lora_scale, int site) -> Tensor", tags=_TAGS
)
_LIBRARY.define("unet_ends(Tensor output, int site) -> Tensor", tags=_TAGS)
_LIBRARY.define(
    "cross_attention(Tensor x, Tensor context, Tensor[] states, Tensor?[] masks, Tensor? attention_mask, Tensor layer, "
    "ScalarType? autocast) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define("self_attention(Tensor x, Tensor layer, ScalarType? autocast) -> Tensor", tags=_TAGS)


def _unet_begins(
    sample: torch.Tensor, context: torch.Tensor, time: torch.Tensor, lora_scale: float, site: int
) -> torch.Tensor:
    # The sample passes through, so that no layer runs before; the context stays the same tensor.
    found = SITES.get(site)
    if found is not None:
        found.begin((sample, time, context), {}, lora_scale)
    return sample.clone()


def _unet_ends(output: torch.Tensor, site: int) -> torch.Tensor:
    found = SITES.get(site)
    if found is not None:
        found.end()
    return output.clone()


def _cross_attention(
    x: torch.Tensor,
    context: torch.Tensor,
    states: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    attention_mask: torch.Tensor | None,
    layer: torch.Tensor,
    autocast: torch.dtype | None,
) -> torch.Tensor:
    processor, attn = _layer(layer)
    images = Images(list(states), list(masks) or None) if states else None
    with _as_traced(x, attn, processor.call, autocast):
        out: torch.Tensor = processor.compute(attn, x, context, attention_mask, images)
    return out.to(autocast or x.dtype).contiguous()


def _self_attention(x: torch.Tensor, layer: torch.Tensor, autocast: torch.dtype | None) -> torch.Tensor:
    processor, attn = _layer(layer)
    with _as_traced(x, attn, processor.call, autocast):
        out: torch.Tensor = processor.compute(attn, x)
    return out.to(autocast or x.dtype).contiguous()


def _layer(number: torch.Tensor) -> tuple[Any, Any]:
    """A processor by its number, and the layer it is in."""
    processor = PROCESSORS.get(int(number))
    attn = None if processor is None else processor.attn
    if attn is None:
        raise RuntimeError(
            "memkern: a compiled graph calls an attention layer that is gone; call torch.compiler.reset()"
        )
    return processor, attn


@contextmanager
def _as_traced(x: torch.Tensor, attn: Any, call: Any, autocast: torch.dtype | None) -> Iterator[None]:
    """The state around a layer when it was traced: autocast, and the scale of its LoRAs."""
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None), _scaled(attn, call):
        yield


@contextmanager
def _scaled(attn: Any, call: Any) -> Iterator[None]:
    """The scaling of LoRAs for a UNet that is called with a scale; when traced, diffusers does it after the graph."""
    if (
        call is None
        or call.lora_scale == 1
        or any(getattr(m, "scaling", 0) != call.loras.get(m, 0) for m in attn.modules())
    ):
        yield
        return
    scale_lora_layers(attn, call.lora_scale)
    try:
        yield
    finally:
        unscale_lora_layers(attn, call.lora_scale)


def _like(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    autocast = rest[-1] if isinstance(rest[-1], torch.dtype) else None
    return x.new_empty(x.shape, dtype=autocast)


for _name, _implementation in (
    ("unet_begins", _unet_begins),
    ("unet_ends", _unet_ends),
    ("cross_attention", _cross_attention),
    ("self_attention", _self_attention),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"memkern::{_name}", _like, lib=_LIBRARY)
torch.library.register_autograd("memkern::unet_begins", lambda ctx, grad: (grad, None, None, None, None), lib=_LIBRARY)
torch.library.register_autograd("memkern::unet_ends", lambda ctx, grad: (grad, None), lib=_LIBRARY)


def attend(
    x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None, images: Images | None, number: torch.Tensor
) -> torch.Tensor:
    """The operator of one layer, as a graph calls it: `[B, N, C]` in autocast's dtype, if that is on."""
    states, masks = ([], []) if images is None else (images.states, images.masks or [])
    made: torch.Tensor = torch.ops.memkern.cross_attention(x, context, states, masks, mask, number, _autocast(x))
    return made


def attend_once(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The operator of a self-attention whose equal rows are computed once: `[B, N, C]` in autocast's dtype."""
    made: torch.Tensor = torch.ops.memkern.self_attention(x, number, _autocast(x))
    return made


def _autocast(x: torch.Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def is_exported() -> bool:
    """True if the present computation becomes an exported program."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def new_number() -> torch.Tensor:
    """A new number for a processor, as a tensor, so that no graph is traced again for its value; int64 `[]`."""
    with torch.inference_mode(False):
        return torch.tensor(next(NUMBERS), dtype=torch.int64, device="cpu")

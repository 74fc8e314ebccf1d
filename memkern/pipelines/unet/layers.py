"""The cross-attention layers of a UNet, and of the ControlNets that steer it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from ..attention.layer import kind_of
from ..attention.weights import whole_refusals
from .processor import former_of

Roots = dict[str, Any]
"""Prefix of the layers' names → the module they are in."""


def unwrapped(module: Any) -> Any:
    """The module itself, where `torch.compile` wrapped it."""
    return getattr(module, "_orig_mod", module)


def roots(pipe: Any, *, controlnet: bool) -> Roots:
    """The UNet of a pipeline, and, if `controlnet`, the nets that steer it: "controlnet:" or "controlnet:0:" etc."""
    found: Roots = {}
    if isinstance(getattr(pipe, "unet", None), torch.nn.Module):
        found[""] = pipe.unet
    net = getattr(pipe, "controlnet", None) if controlnet else None
    if isinstance(net, torch.nn.Module):
        nets = getattr(net, "nets", None)
        found |= {"controlnet:": net} if nets is None else {f"controlnet:{i}:": one for i, one in enumerate(nets)}
    return {prefix: unwrapped(module) for prefix, module in found.items()}


def cross_attention_layers(module: Any) -> list[tuple[str, Any]]:
    """The layers that read the context, by dotted name.

    `attn2` of the transformer blocks, and their `attn1` where a block has nothing but cross-attention; motion modules
    read no context.
    """
    found = []
    for name, block in unwrapped(module).named_modules():
        if "motion_modules" in name:
            continue
        if isinstance(block, Attention) and name.endswith("attn2"):
            found.append((name, block))
        elif vars(block).get("only_cross_attention") is True and isinstance(getattr(block, "attn1", None), Attention):
            found.append((f"{name}.attn1", block.attn1))
    return found


def layers_of(found: Roots) -> list[tuple[str, Any]]:
    """The cross-attention layers of all of them, by prefixed dotted name."""
    return [(prefix + name, attn) for prefix, module in found.items() for name, attn in cross_attention_layers(module)]


def is_known(attn: Any) -> bool:
    """True if memkern knows the computation of a layer's own processor, and so can do it."""
    return kind_of(former_of(attn.processor)) is not None


def kv_refusals(layers: Sequence[tuple[str, Any]]) -> list[str]:
    """The reasons why keys and values of these layers cannot be edited; empty if they can."""
    if not layers:
        return ["it has no UNet with cross-attention layers"]
    reasons: dict[str, list[str]] = {}
    for name, attn in layers:
        found = whole_refusals(attn)
        if not is_known(attn):
            kind = type(former_of(attn.processor)).__name__
            found.append(f"it has a {kind}, which may compute more than attention")
        for reason in found:
            reasons.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}" for reason, names in reasons.items()
    ]

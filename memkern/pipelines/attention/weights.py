"""The weights of a cross-attention layer: whether they can be read, and whether their keys and values may be kept.

Weights are read only where calling the module does nothing else: plain linear modules of plain tensors. Everything
else (LoRA, quantized weights, offload, hooks) is still called; its keys and values are kept where only tensors and
plain settings can change them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layer import Layer

CASTS = {"layerwise_casting"}
"""Hooks of diffusers that change how a weight is stored, and nothing that the module computes."""

KNOWN = ("torch", "peft", "diffusers", "torchao", "bitsandbytes", "optimum")
"""Packages whose modules compute only with tensors and plain settings."""


def whole_refusals(attn: Any) -> list[str]:
    """The reasons why neither path reproduces the layer; empty if both do."""
    reasons = [
        f"it has {name}"
        for name in ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj")
        if getattr(attn, name, None)
    ]
    if attn.inner_kv_dim != attn.inner_dim:
        reasons.append("its keys and values have fewer heads")
    if len(attn.to_out) > 1 and attn.training and getattr(attn.to_out[1], "p", 0) > 0:
        reasons.append("it is training with dropout")
    return reasons


def reading_refusals(layer: Layer) -> list[str]:
    """The reasons why the projections' weights cannot be read in place of calling them; empty if they can."""
    reasons = ["the layer has hooks"] if has_hooks(layer.attn) else []
    for name, module in layer.modules.items():
        if type(module) is not nn.Linear:
            reasons.append(f"{name} is a {type(module).__name__}")
        elif has_hooks(module) or _is_cast(module):
            reasons.append(f"{name} has hooks")
        elif not is_plain(module.weight):
            reasons.append(f"{name}'s weight is a {_kind(module.weight)}")
    return reasons


def keeping_refusals(layer: Layer) -> list[str]:
    """The reasons why keys and values from the layer's projections may not be kept; empty if they may."""
    reasons = []
    for name, module in layer.key_value_modules.items():
        strange = [type(part).__name__ for part in module.modules() if type(part).__module__.split(".")[0] not in KNOWN]
        if strange:
            reasons.append(f"{name} is a {strange[0]}")
        elif any(has_hooks(part) for part in module.modules()):
            reasons.append(f"{name} has hooks")
    return reasons


def has_hooks(module: Any) -> bool:
    """True if something besides the module itself runs when it is called."""
    # Runs for each layer in each step: attributes that a module may lack are looked up in its dictionary.
    own = vars(module)
    if own["_forward_hooks"] or "_hf_hook" in own:
        return True
    before = own["_forward_pre_hooks"]
    if before and not all(getattr(hook, "reads_only", False) for hook in before.values()):
        return True
    return ("forward" in own or "_diffusers_hook" in own) and not _is_cast(module)


def _is_cast(module: Any) -> bool:
    registry = vars(module).get("_diffusers_hook")
    return registry is not None and set(registry.hooks) == CASTS


def is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (nn.Parameter, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    )


def _kind(tensor: torch.Tensor) -> str:
    own = type(tensor)
    return own.__name__ if own not in (nn.Parameter, torch.Tensor) else f"tensor of {tensor.dtype}"

"""Where memkern's processor goes: the cross-attention layers of a UNet, and of its ControlNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from .acceleration import Acceleration
from .cross_attention import PLAIN, CrossAttentionProcessor
from .layers import whole_refusals
from .schedule import UNetHook

Roots = dict[str, Any]
"""Prefix of the layers' names → the module they are in."""


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


class Sites:
    """The layers that memkern's processor was put into.

    Attributes:
        roots: where they are.
        left: layer → the class of its own processor, for those that keep it.
    """

    def __init__(self, roots: Roots, acceleration: Acceleration, scheduler: Callable[[], Any] = lambda: None) -> None:
        self.roots = roots
        self._placed: list[tuple[Any, CrossAttentionProcessor, Any]] = []
        self._handles: list[Any] = []
        self.left: dict[str, str] = {}
        for name, attn in layers_of(roots):
            former = attn.processor.former if is_rebuilt(attn.processor) else attn.processor
            if type(former) in PLAIN:
                processor = CrossAttentionProcessor(former, acceleration, name)
                attn.set_processor(processor)
                self._placed.append((attn, processor, former))
            else:
                self.left[name] = type(former).__name__
        if self._placed and acceleration.stage is not None:
            hook = UNetHook(acceleration, scheduler)
            self._handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in roots.values()]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied pipeline has none yet: they are put into its own UNet with its next prompt."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @property
    def in_steps(self) -> bool:
        """Whether the UNet tells at which step it is."""
        return bool(self._handles)

    @property
    def count(self) -> int:
        """How many are still in place."""
        return sum(attn.processor is processor for attn, processor, _ in self._placed)

    @property
    def complete(self) -> bool:
        """Whether all that were placed still are, and no layer has become one that could take one."""
        return self.count == len(self._placed) and not any(
            type(attn.processor) in PLAIN or is_rebuilt(attn.processor) for _, attn in layers_of(self.roots)
        )

    def remove(self) -> None:
        """Put back the very processors that were there, where ours still is."""
        for attn, processor, former in self._placed:
            if attn.processor is processor or is_rebuilt(attn.processor):
                attn.set_processor(former)
        self._placed = []
        for handle in self._handles:
            handle.remove()
        self._handles = []


def is_rebuilt(processor: Any) -> bool:
    """Whether it is one of memkern's that diffusers made anew by its class, as it does around an IP-Adapter."""
    return isinstance(processor, CrossAttentionProcessor) and processor.acceleration is None


def unwrapped(module: Any) -> Any:
    """The module itself, where `torch.compile` wrapped it."""
    return getattr(module, "_orig_mod", module)


def kv_refusals(roots: Roots, own: Acceleration | None = None) -> list[str]:
    """Why keys and values of these layers cannot be edited by `own`'s pipeline; empty if they can."""
    layers = layers_of(roots)
    if not layers:
        return ["it has no UNet with cross-attention layers"]
    reasons: dict[str, list[str]] = {}
    for name, attn in layers:
        processor, found = attn.processor, whole_refusals(attn)
        if isinstance(processor, CrossAttentionProcessor) and processor.acceleration not in (None, own):
            found.append("another patched pipeline shares it; memkern.unpatch that one first")
        former = getattr(processor, "former", processor)
        if type(former) not in PLAIN:
            found.append(f"it has a {type(former).__name__}, which may compute more than attention")
        for reason in found:
            reasons.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}" for reason, names in reasons.items()
    ]


def layers_of(roots: Roots) -> list[tuple[str, Any]]:
    """The cross-attention layers of all of them, by prefixed dotted name."""
    return [(prefix + name, attn) for prefix, module in roots.items() for name, attn in cross_attention_layers(module)]


def cross_attention_layers(module: Any) -> list[tuple[str, Any]]:
    """The layers that read the context, by dotted name; motion modules read none."""
    return [
        (name, module)
        for name, module in unwrapped(module).named_modules()
        if isinstance(module, Attention) and name.endswith("attn2") and "motion_modules" not in name
    ]

"""The report on a pipeline before it is patched: the parts that would be patched, and those that would not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .attention.layer import Layer
from .attention.weights import reading_refusals, whole_refusals
from .family import outputs, refusals
from .family.encoders import slots
from .unet.layers import is_known, kv_refusals, layers_of, roots, unwrapped
from .unet.processor import former_of


@dataclass(frozen=True)
class Support:
    """The result of `memkern.support`; falsy for a pipeline that cannot be patched.

    Attributes:
        pipeline: the class's name.
        refusals: why it cannot be patched at all; empty if it can.
        sites: the parts that would be patched.
        kv_refusals: why the kv stage is refused; empty if it is not.
        left: layer → why it keeps its own processor, or why its modules are still called.
    """

    pipeline: str
    refusals: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    kv_refusals: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return not self.refusals

    def __str__(self) -> str:
        if self.refusals:
            return f"{self.pipeline} cannot be patched: {'; '.join(self.refusals)}. Supported are {refusals.SUPPORTED}"
        stages = f"embeds; not kv: {'; '.join(self.kv_refusals)}" if self.kv_refusals else "embeds, kv"
        lines = [f"pipeline  {self.pipeline}", *(f"site      {site}" for site in self.sites), f"stages    {stages}"]
        return "\n".join([*lines, *(f"left      {name}: {why}" for name, why in self.left)])


def support(pipe: Any) -> Support:
    """The effect that `memkern.patch(pipe)` would have.

    Returns:
        A `Support`, to print or to test: `if memkern.support(pipe): …`.

    Raises:
        TypeError: `pipe` is not a diffusers pipeline.
    """
    refusals.require_pipeline(pipe)
    name, reasons = type(pipe).__name__, refusals.refusals(pipe)
    if reasons:
        return Support(name, tuple(reasons))
    found = roots(pipe, controlnet=True)
    layers = layers_of(found)
    sites = [f"{type(getattr(pipe, slot.encoder)).__name__} ({slot.encoder}): pad swap" for slot in slots(pipe)]
    sites.append(f"{name}.{outputs.method(pipe)}: edits of embeddings")
    left: list[tuple[str, str]] = []
    taken = 0
    for layer, attn in layers:
        own = former_of(attn.processor)
        called = whole_refusals(attn) or reading_refusals(Layer(attn, own))
        if not is_known(attn):
            left.append((layer, f"keeps its {type(own).__name__}"))
        else:
            taken += 1
            if called:
                left.append((layer, f"its modules are called: {'; '.join(called)}"))
    if layers:
        places = " and ".join(type(unwrapped(module)).__name__ for module in found.values())
        sites.append(f"{places}: {taken} of {len(layers)} cross-attention layers")
    return Support(name, (), tuple(sites), tuple(kv_refusals(layers)), tuple(left))

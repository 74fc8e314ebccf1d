"""The hooks and processors of one patched pipeline in its text encoders, its UNet and its ControlNets."""

from __future__ import annotations

import weakref
from typing import Any

from .family.encoders import Slot, clip_embeddings
from .holders import LOCK, hook_on
from .prompt.pad_swap import PadSwapHook
from .session import Settings
from .unet.layers import roots
from .unet.site import Site

EXCHANGED = "the pipeline's UNet or ControlNet was exchanged"


class Attached:
    """Hooks and sites that a patch holds, together with other pipelines that share the modules.

    Args:
        holder: the `Patch`.

    Attributes:
        sites: those of the pipeline's UNet and ControlNets.
    """

    def __init__(self, holder: Any) -> None:
        self._holder = weakref.ref(holder)
        self.sites: list[Site] = []
        self._hooked: list[Any] = []
        self._looked: list[Site] = []

    def attach(self, pipe: Any, slots: tuple[Slot, ...], settings: Settings) -> None:
        """Put what `settings` need into the modules that the pipeline has now, and take it out of former ones."""
        holder = self._holder()
        with LOCK:
            wanted = [found for slot in slots if (found := clip_embeddings(getattr(pipe, slot.encoder, None)))]
            for module in self._hooked:
                if not any(module is one for one in wanted):
                    _unhook(module, holder)
            for module in wanted:
                _hook(module, holder)
            self._hooked = wanted
            held = [Site.of(module, prefix) for prefix, module in roots(pipe, controlnet=True).items()]
            for site in (*self.sites, *self._looked):
                if site not in held:
                    site.release(holder)
            self.sites, self._looked = held, []
            self.hold(settings)

    def hold(self, settings: Settings, needs: Any = None) -> None:
        """Put into the sites what `settings` need, for the patch or for `needs`."""
        holder = self._holder()
        for site in self.sites:
            if not site.prefix or settings.controlnet:
                site.hold(holder, needs=needs, processors=settings.needs_processors, kv=settings.applied == "kv")
            else:
                site.hold(holder, needs=needs)

    def let_go(self, needs: Any) -> None:
        """Take out of the sites what only `needs` needed."""
        for site in self.sites:
            site.release(self._holder(), needs=needs)

    def look_at(self, pipe: Any) -> None:
        """Check the rows that reach a UNet that was exchanged, and leave its layers alone."""
        for prefix, module in roots(pipe, controlnet=True).items():
            site = Site.of(module, prefix)
            site.hold(self._holder())
            self._looked.append(site)

    def lost(self, pipe: Any) -> str | None:
        """The reason why layers with memkern's processors are no longer reached; None if all are reached."""
        now = {prefix: Site.of(module, prefix) for prefix, module in roots(pipe, controlnet=True).items()}
        if now != {site.prefix: site for site in self.sites}:
            return EXCHANGED
        return "processors of the UNet were replaced" if any(site.processors.exchanged for site in self.sites) else None

    def detach(self) -> None:
        """Take out everything that no other pipeline needs."""
        holder = self._holder()
        with LOCK:
            for module in self._hooked:
                _unhook(module, holder)
            for site in (*self.sites, *self._looked):
                site.release(holder)
            self._hooked, self.sites, self._looked = [], [], []


def _hook(module: Any, holder: Any) -> None:
    hook = hook_on(module, PadSwapHook)
    if hook is None:
        hook = PadSwapHook()
        hook.handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    hook.holders.add(holder)


def _unhook(module: Any, holder: Any) -> None:
    hook = hook_on(module, PadSwapHook)
    if hook is not None:
        hook.holders.drop(holder)
        if not hook.holders:
            hook.handle.remove()

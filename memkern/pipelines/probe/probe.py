"""A recording of what a UNet attends to: the attention mass on each role, per layer and step.

    with memkern.probe(pipe) as probe:
        pipe("a photograph of an astronaut")
    print(probe.table())
    probe.plot("roles.png")

Mass is the share of the softmax that the keys of a role get, as a mean over queries and heads: over the roles of a
row it sums to 1. On a patched pipeline it is the mass of the edited keys. `memkern.ops.attention_mass` computes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ... import ops
from ...plan import Plan
from ...roles import Role
from ...scope import layer_size
from ..attention.layer import Layer
from ..attention.paths import split_heads
from ..attention.sources import Source, edited
from ..instance import find
from ..patching import patched
from ..unet.contexts import Context
from ..unet.kv_stage import Active
from ..unet.layers import cross_attention_layers, unwrapped
from ..unet.processor import former_of
from ..unet.schedule import Place
from ..unet.site import Site
from .record import Probe, Record


class LayerHook:
    """A forward pre-hook on one layer that computes the attention mass of the coming call, and changes nothing."""

    reads_only = True

    def __init__(self, name: str, owner: Recorder, *, mapped: bool) -> None:
        self.name, self.owner, self.mapped = name, owner, mapped

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def __call__(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        # With IP-Adapters it is a tuple of text and images.
        context = context[0] if isinstance(context, tuple) else context
        if isinstance(context, torch.Tensor):
            self.owner.record(self.name, attn, x, context, mapped=self.mapped)


class Recorder:
    """The hooks of one probe, which write its records."""

    def __init__(self, pipe: Any, probe: Probe) -> None:
        self.probe = probe
        self.step, self.place = -1, Place()
        self._session: Any = None
        self._last: Context | None = None
        self._sources: dict[Active, tuple[Source, torch.Tensor]] = {}
        unet = unwrapped(pipe.unet)
        self._site = Site.of(unet)
        layers = cross_attention_layers(unet)
        first = layers[0][0].split(".")[:2] if layers else []
        self._handles = [unet.register_forward_pre_hook(self.count, with_kwargs=True)]
        for name, attn in layers:
            hook = LayerHook(name, self, mapped=name.split(".")[:2] == first)
            self._handles.append(attn.register_forward_pre_hook(hook, with_kwargs=True))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a call of the UNet; memkern's own hook has looked at its context by then."""
        call = self._site.call
        session = None if call is None else call.session
        self.step = self.step + 1 if session is self._session else 0
        self._session = session
        self.place = Place() if call is None else call.place

    def record(self, name: str, attn: Any, x: torch.Tensor, context: torch.Tensor, *, mapped: bool) -> None:
        """Compute and keep the mass of one call of a layer."""
        known = self._known(context)
        assert known.rows is not None
        assert known.edits is not None
        roles = known.edits.roles(context.shape[1])
        active = known.edits.active(name, x.shape[1], self.place)
        source, eot = self._source(known, context, roles, active)
        mass, on_eot = attention_mass(attn, x, context, source, eot)
        positions = torch.zeros(context.shape[:2], device=mass.device, dtype=mass.dtype)
        positions.scatter_add_(1, source.keys.index, mass)
        size = layer_size(x.shape[1], self.place.sample) if mapped else None
        shaped = None if size is None else on_eot.view(-1, *size)
        self.probe.records.append(Record(name, self.step, known.rows, roles, positions, shaped))

    def _known(self, context: torch.Tensor) -> Context:
        """The `Context` that describes this tensor, kept until another tensor comes."""
        call = self._site.call
        if call is not None and call.known is not None and call.known.seen.is_here(context):
            known = call.known
        elif self._last is not None and self._last.seen.is_still(context):
            known = self._last
        else:
            known = Context(context)
            if self._session is None:
                known.know_nothing(len(context))
            else:
                known.recognise(context, self._session, direct=True)
        if known is not self._last:
            self._last = known
            self._sources.clear()
        return known

    def _source(
        self, known: Context, context: torch.Tensor, roles: torch.Tensor, active: Active
    ) -> tuple[Source, torch.Tensor]:
        """The keys and values under the edits `active`, no keys merged, and the weights of the keys, 1 for EOT, 0 for
        others, float32 `[B, n]`; made once per context.
        """
        if active not in self._sources:
            assert known.edits is not None
            found = known.edits.source(context, active, "torch", coalesced=False)
            if found is None:
                found = edited(context, Plan.identity(*context.shape[:2]), backend="torch", coalesced=False)
            eot = (roles == Role.EOT).to(context.device).gather(1, found.keys.index)
            self._sources[active] = found, eot.to(torch.float32)
        return self._sources[active]

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()


def attention_mass(
    attn: Any, x: torch.Tensor, context: torch.Tensor, source: Source, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mass on each of the source's keys, float32 `[B, n]`, and on those of `weight` for each query, `[B, N]`.

    Args:
        x: hidden states `[B, N, C]`.
        context: the tensor that `source` was made from.
        weight: float32 `[B, n]`, 1 for the keys to sum.
    """
    keys = source.keys
    layer = Layer(attn, former_of(attn.processor))
    k = split_heads(source.project(layer, context)[0], attn.heads)  # [B, H, n, D]
    q = split_heads(attn.to_q(x), attn.heads)
    k = source.attenuated(q, k, layer.scale)
    by_key, by_query = ops.attention_mass(q, k, keys.bias, weight, layer.scale)
    return by_key.mean(1), by_query.mean(1)


@contextmanager
def probe(pipe: Any) -> Iterator[Probe]:
    """Record the attention mass per role, layer and step of what `pipe` generates inside the `with` block.

    A pipeline that is not patched is patched with "none" for the length of the block, which changes no image. Only the
    record stays.

    Yields:
        A `Probe`.

    Raises:
        TypeError, ValueError: `pipe` cannot be patched.
    """
    found = Probe()
    with contextlib.ExitStack() as stack:
        if find(pipe) is None:
            stack.enter_context(patched(pipe, "none", accelerate=False, on_unknown="pass"))
        recorder = Recorder(pipe, found)
        stack.callback(recorder.remove)
        yield found

"""What a UNet attends to: the attention mass on each role, per layer and step.

    with memkern.probe(pipe) as probe:
        pipe("a photograph of an astronaut")
    print(probe.table())
    probe.plot("roles.png")

Mass is the share of the softmax that the keys of a role get, as a mean over queries and heads: over the roles of a
row it sums to 1. On a patched pipeline it is that of the edited keys. `memkern.ops.attention_mass` sums it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import ops
from ..plan import Plan
from ..roles import Role
from ..scope import layer_size
from .instance import Patch, find
from .kv import Active, KVStage, Source, edited
from .patching import patch
from .paths import split_heads
from .record import Probe, Record
from .rows import Rows, recognise
from .sites import cross_attention_layers, unwrapped


class LayerHook:
    """A forward pre-hook on one layer that computes what it is about to attend to, and leaves it alone."""

    reads_only = True

    def __init__(self, name: str, owner: Recorder, *, mapped: bool) -> None:
        self.name, self.owner, self.mapped = name, owner, mapped

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def __call__(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        if isinstance(context, torch.Tensor):
            self.owner.record(self.name, attn, x, context, mapped=self.mapped)


class Recorder:
    """The hooks of one probe, and where they write."""

    def __init__(self, patched: Patch, probe: Probe) -> None:
        self.patch, self.probe = patched, probe
        self.step, self.prompt = -1, patched.prompt_number
        self.sample: tuple[int, int] | None = None
        self._last: tuple[weakref.ref[torch.Tensor], int | None, Rows, torch.Tensor] | None = None
        self._sources: dict[Active, tuple[Source, torch.Tensor]] = {}
        unet = patched.pipe.unet
        layers = cross_attention_layers(unet)
        first = layers[0][0].split(".")[:2] if layers else []
        self._handles = [unwrapped(unet).register_forward_pre_hook(self.count, with_kwargs=True)]
        for name, attn in layers:
            hook = LayerHook(name, self, mapped=name.split(".")[:2] == first)
            self._handles.append(attn.register_forward_pre_hook(hook, with_kwargs=True))

    def count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The UNet is called."""
        self.step = self.step + 1 if self.prompt == self.patch.prompt_number else 0
        self.prompt = self.patch.prompt_number
        sample = kwargs.get("sample", args[0] if args else None)
        self.sample = None if sample is None else tuple(sample.shape[-2:])

    def record(self, name: str, attn: Any, x: torch.Tensor, context: torch.Tensor, *, mapped: bool) -> None:
        """Compute and keep the mass of one call of a layer."""
        stage = self.patch.watching
        rows, roles = self._rows(stage, context)
        source, eot = self._source(stage, context, rows, roles, stage.active(name, x.shape[1]))
        mass, on_eot = attention_mass(attn, x, source, eot)
        positions = torch.zeros(context.shape[:2], device=mass.device).scatter_add_(1, source.keys.index, mass)
        size = layer_size(x.shape[1], self.sample) if mapped else None
        shaped = None if size is None else on_eot.view(-1, *size)
        self.probe.records.append(Record(name, self.step, rows, roles, positions, shaped))

    def _rows(self, stage: KVStage, context: torch.Tensor) -> tuple[Rows, torch.Tensor]:
        """What the rows of a context are, and their roles, uint8 `[B, L]` on the host; once per context."""
        version = None if context.is_inference() else context._version
        if self._last is None or self._last[0]() is not context or self._last[1] != version:
            rows = recognise(context, self.patch.encodings)
            self._last = weakref.ref(context), version, rows, stage.roles(rows, context.shape[1])
            self._sources.clear()
        return self._last[2:]

    def _source(
        self, stage: KVStage, context: torch.Tensor, rows: Rows, roles: torch.Tensor, active: Active
    ) -> tuple[Source, torch.Tensor]:
        """What layers attend to under the edits `active`, every key for itself, and which keys are EOT's, float32
        `[B, n]`; once per context.
        """
        if active not in self._sources:
            found = stage.source(context, rows, active, "torch", coalesced=False)
            if found is None:
                found = edited(context, Plan.identity(*context.shape[:2]), backend="torch", coalesced=False)
            eot = (roles == Role.EOT).to(context.device).gather(1, found.keys.index)
            self._sources[active] = found, eot.float()
        return self._sources[active]

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()


def attention_mass(
    attn: Any, x: torch.Tensor, source: Source, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mass on each of the source's keys, float32 `[B, n]`, and on those of `weight` for each query, `[B, N]`.

    Args:
        x: hidden states `[B, N, C]`.
        weight: float32 `[B, n]`, 1 for the keys to sum.
    """
    keys = source.keys
    k = split_heads(source.project(attn)[0], attn.heads)  # [B, H, n, D]
    q = split_heads(attn.to_q(x), attn.heads)
    for attenuation in source.attenuation:
        k = k * attenuation.factors(q, k, attn.scale).unsqueeze(-1).to(k.dtype)
    by_key, by_query = ops.attention_mass(q, k, keys.bias, weight, attn.scale)
    return by_key.mean(1), by_query.mean(1)


@contextmanager
def probe(pipe: Any) -> Iterator[Probe]:
    """Record the attention mass per role, layer and step of what `pipe` generates inside the `with` block.

    It works on a patched pipeline and on one that is not: that is patched with "none" meanwhile, which changes no
    image. Nothing but the record stays.

    Yields:
        A `Probe`.

    Raises:
        TypeError, ValueError: `pipe` cannot be patched.
    """
    own = find(pipe)
    patched = own if own is not None else patch(pipe, "none", accelerate=False, on_unknown="pass")
    found = Probe()
    with patched.watched():
        recorder = Recorder(patched, found)
        try:
            yield found
        finally:
            recorder.remove()
            if own is None:
                patched.remove()

"""What the cross-attention layers of a UNet do with a context: once per context, and kept.

The context does not change over the denoising steps, so a layer that sees one a second time computes its K and V,
or with the weights of all four projections A and VO (`absorbed_attention`), and keeps them until the context
dies, changes, or the weights do. At the kv stage a policy's edits are in them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ops import backends
from .kv import Active, KVStage, Source, unedited
from .layers import MARGIN, RATES, Path, Weights, seconds, weight_refusals, whole_refusals
from .paths import Attend, absorbed, projected
from .rows import Rows, recognise


@dataclass(frozen=True)
class Choice:
    """What a layer does with a context, and why.

    Attributes:
        path: "absorbed", "projected" or "former", the layer's own processor.
        keys: how many keys each sequence has left.
        sizes: N, C and H.
        milliseconds: the estimates that were compared, by path.
        reasons: why a path was not open.
    """

    path: Path
    keys: tuple[int, ...] = ()
    sizes: tuple[int, int, int] = (0, 0, 0)
    milliseconds: dict[Path, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        estimates = ", ".join(f"{path} {time:.2f}" for path, time in self.milliseconds.items())
        queries, width, heads = self.sizes
        shape = f"N={queries} C={width} H={heads}, keys {'/'.join(map(str, self.keys))}"
        parts = [shape if self.keys else "", f"estimates in ms: {estimates}" if estimates else "", *self.reasons]
        return f"{self.path} ({'; '.join(part for part in parts if part)})"


@dataclass
class Prepared:
    """A layer's part of a context."""

    choice: Choice
    attend: Attend | None
    weights: Weights | None

    def valid(self, attn: Any) -> bool:
        """Whether it was computed from the weights that the layer has now."""
        return self.weights is None or (not weight_refusals(attn) and self.weights.unchanged(attn))


class Context:
    """One context: whose rows it has, which layers saw it, and what they made of it."""

    def __init__(self, tensor: torch.Tensor, forget: Callable[[Any], None] | None = None) -> None:
        self.reference = weakref.ref(tensor, forget)
        self.version = _version(tensor)
        self.rows: Rows | None = None
        self.sources: dict[Active, Source | None] = {}
        self.seen: set[tuple[int, Active]] = set()
        self.prepared: dict[tuple[int, Active], Prepared] = {}

    def is_still(self, tensor: torch.Tensor) -> bool:
        """Whether this is that very tensor, unwritten since."""
        return self.reference() is tensor and self.version == _version(tensor)


class Acceleration:
    """The contexts of a patched pipeline's UNet.

    Attributes:
        backend: the operators' backend.
        enabled: whether layers are computed here where that is faster, and not only where they are edited.
        stage: the edits of keys and values; None where the embeddings are edited.
        choices: layer name → what it did last.
    """

    def __init__(self, backend: str, *, enabled: bool = True, stage: KVStage | None = None) -> None:
        self.backend = backend
        self.enabled = enabled
        self.stage = stage
        self.choices: dict[str, Choice] = {}
        self._contexts: dict[int, Context] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Acceleration:
        """A copy knows no contexts: those of the original are other tensors."""
        return Acceleration(self.backend)

    def __reduce__(self) -> tuple[Any, ...]:
        return Acceleration, (self.backend,)

    def clear(self) -> None:
        """Forget every context, and what was done with them."""
        self._contexts.clear()
        self.choices.clear()

    def begin_call(self) -> None:
        """The UNet is called: a context whose changes are not counted is looked at again."""
        for key in [key for key, known in self._contexts.items() if known.version is None]:
            del self._contexts[key]

    @property
    def size(self) -> int:
        """How many contexts are kept."""
        return len(self._contexts)

    def attend(
        self, name: str, attn: Any, x: torch.Tensor, context: torch.Tensor, *, keep: bool
    ) -> torch.Tensor | None:
        """The layer's output before its residual; None where its own processor is to compute it.

        Args:
            keep: whether what is computed from the context may be kept for the next step.
        """
        keep = keep and self.enabled
        if not keep and self.stage is None:
            return None
        known = self._known(context)
        active = () if self.stage is None else self.stage.active(name, x.shape[1])
        source = self._source(known, context, active) if active else None
        key = id(attn), () if source is None else active
        if not keep or key not in known.seen:
            known.seen.add(key)
            return None if source is None else projected(attn, source, self.backend, fixed=False)(x)
        prepared = known.prepared.get(key)
        if prepared is None or not prepared.valid(attn):
            source = source or self._unedited(known, context)
            prepared = known.prepared[key] = self._prepare(attn, x, source)
            self.choices[name] = prepared.choice
        return None if prepared.attend is None else prepared.attend(x)

    def _known(self, tensor: torch.Tensor) -> Context:
        key = id(tensor)
        known = self._contexts.get(key)
        if known is not None and known.is_still(tensor):
            return known

        def forget(reference: Any) -> None:
            kept = self._contexts.get(key)
            if kept is not None and kept.reference is reference:
                del self._contexts[key]

        known = self._contexts[key] = Context(tensor, forget)
        return known

    def _source(self, known: Context, context: torch.Tensor, active: Active) -> Source | None:
        """The context under the edits that are in force; None where they leave all its rows alone."""
        assert self.stage is not None
        if active not in known.sources:
            if known.rows is None:
                known.rows = recognise(context.detach(), self.stage.encoded)
                if None in known.rows:
                    self.stage.unknown(
                        f"{known.rows.count(None)} of {len(known.rows)} rows of what the UNet reads were not made by "
                        "the pipeline's encode_prompt: another tool changed them, or they came as raw prompt_embeds"
                    )
            known.sources[active] = self.stage.source(context, known.rows, active, self.backend)
        return known.sources[active]

    @staticmethod
    def _unedited(known: Context, context: torch.Tensor) -> Source:
        found = known.sources.get(())
        if found is None:
            found = known.sources[()] = unedited(context)
        return found

    def _prepare(self, attn: Any, x: torch.Tensor, source: Source) -> Prepared:
        reasons = whole_refusals(attn) + self._without_kernels(x)
        if reasons:
            attend = projected(attn, source, self.backend, fixed=False) if source.edited else None
            path: Path = "former" if attend is None else "projected"
            return Prepared(Choice(path, reasons=tuple(reasons)), attend, None)
        unreadable = weight_refusals(attn)
        sizes = x.shape[1], x.shape[2], attn.heads
        rates = RATES[x.device.type if x.device.type == "cpu" else "cuda", min(4, x.itemsize)]
        paths: list[Path] = ["former", "projected", "absorbed"]
        times = {path: 1e3 * seconds(path, *sizes, source.keys.counts, source.length, rates, x.itemsize)
                 for path in paths}  # fmt: skip
        if unreadable or source.attenuation:
            del times["absorbed"]
        fastest = min(times, key=lambda path: times[path])
        if source.edited:
            del times["former"]
            fastest = min(times, key=lambda path: times[path])
        elif times[fastest] >= MARGIN * times["former"]:
            fastest = "former"
        choice = Choice(fastest, source.keys.counts, sizes, times, tuple(unreadable))
        if fastest == "former":
            return Prepared(choice, None, None)
        if fastest == "absorbed":
            return Prepared(choice, absorbed(attn, source, self.backend), Weights(attn))
        attend = projected(attn, source, self.backend, fixed=not unreadable)
        return Prepared(choice, attend, None if unreadable else Weights(attn))

    def _without_kernels(self, x: torch.Tensor) -> list[str]:
        """Why nothing faster than the layer's own processor is here for tensors like `x`; empty if there is."""
        backend = "cpp" if x.device.type == "cpu" else "triton"
        if self.backend not in ("auto", backend):
            return [f"backend {self.backend!r} has no faster attention"]
        if backend not in backends.order(x.device, "absorbed_attention"):
            return [f"{backend} is not faster than torch on {x.device}"]
        return backends.refusals(backend, x.device, x.dtype, "absorbed_attention")


def _version(tensor: torch.Tensor) -> int | None:
    """How often it was written to; None for one made in inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version

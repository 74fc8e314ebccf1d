"""What is computed once per context: the keys that are left of it, and each layer's part of them.

The context does not change over the denoising steps, so a layer that sees one a second time computes its K and V,
or with the weights of all four projections A and VO (`absorbed_attention`), and keeps them until the context
dies, changes, or the weights do.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import ops
from ..coalesce import Keys, coalesce
from ..ops import backends, cpu
from .layers import MARGIN, RATES, Path, Weights, seconds, weight_refusals, whole_refusals

Attend = Callable[[torch.Tensor], torch.Tensor]


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
    """One context: which layers saw it, and what they made of it."""

    def __init__(self, tensor: torch.Tensor, forget: Callable[[Any], None]) -> None:
        self.reference = weakref.ref(tensor, forget)
        self.version = tensor._version
        self.keys: Keys | None = None
        self.seen: set[int] = set()
        self.prepared: dict[int, Prepared] = {}

    def is_still(self, tensor: torch.Tensor) -> bool:
        """Whether this is that very tensor, unwritten since."""
        return self.reference() is tensor and self.version == tensor._version


class Acceleration:
    """The contexts of a patched pipeline's UNet.

    Attributes:
        backend: the operators' backend.
        choices: layer name → what it did last.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.choices: dict[str, Choice] = {}
        self._contexts: dict[int, Context] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Acceleration:
        """A copy knows no contexts: those of the original are other tensors."""
        return Acceleration(self.backend)

    def clear(self) -> None:
        """Forget every context, and what was done with them."""
        self._contexts.clear()
        self.choices.clear()

    @property
    def size(self) -> int:
        """How many contexts are kept."""
        return len(self._contexts)

    def attend(self, name: str, attn: Any, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor | None:
        """The layer's output before its residual; None where its own processor is to compute it."""
        known = self._contexts.get(id(context))
        if known is None or not known.is_still(context):
            known = self._remember(context)
        if id(attn) not in known.seen:
            known.seen.add(id(attn))
            return None
        prepared = known.prepared.get(id(attn))
        if prepared is None or not prepared.valid(attn):
            known.keys = known.keys or coalesce(context)
            prepared = known.prepared[id(attn)] = self._prepare(attn, x, context, known.keys)
            self.choices[name] = prepared.choice
        return None if prepared.attend is None else prepared.attend(x)

    def _remember(self, tensor: torch.Tensor) -> Context:
        key = id(tensor)

        def forget(reference: Any) -> None:
            kept = self._contexts.get(key)
            if kept is not None and kept.reference is reference:
                del self._contexts[key]

        known = self._contexts[key] = Context(tensor, forget)
        return known

    def _prepare(self, attn: Any, x: torch.Tensor, context: torch.Tensor, keys: Keys) -> Prepared:
        reasons = whole_refusals(attn) + self._without_kernels(x)
        if reasons:
            return Prepared(Choice("former", reasons=tuple(reasons)), None, None)
        unreadable = weight_refusals(attn)
        sizes = x.shape[1], x.shape[2], attn.heads
        rates = RATES[x.device.type if x.device.type == "cpu" else "cuda", min(4, x.itemsize)]
        open_paths: list[Path] = ["former", "projected"] if unreadable else ["former", "projected", "absorbed"]
        if x.device.type == "cpu" and x.dtype != torch.float32:
            open_paths.remove("projected")  # torch's attention there would round the bias of coalesced keys
        times = {
            path: 1e3 * seconds(path, *sizes, keys.counts, context.shape[1], rates, x.itemsize) for path in open_paths
        }
        fastest = min(open_paths, key=lambda path: times[path])
        path: Path = fastest if times[fastest] < MARGIN * times["former"] else "former"
        choice = Choice(path, keys.counts, sizes, times, tuple(unreadable))
        if path == "former":
            return Prepared(choice, None, None)
        if path == "projected":
            attend = self._projected(attn, context, keys, fixed=not unreadable)
            return Prepared(choice, attend, None if unreadable else Weights(attn))
        return Prepared(choice, self._absorbed(attn, context, keys), Weights(attn))

    def _without_kernels(self, x: torch.Tensor) -> list[str]:
        """Why nothing faster than the layer's own processor is here for tensors like `x`; empty if there is."""
        backend = "cpp" if x.device.type == "cpu" else "triton"
        if self.backend not in ("auto", backend):
            return [f"backend {self.backend!r} has no faster attention"]
        if backend not in backends.order(x.device, "absorbed_attention"):
            return [f"{backend} is not faster than torch on {x.device}"]
        return backends.refusals(backend, x.device, x.dtype, "absorbed_attention")

    def _projected(self, attn: Any, context: torch.Tensor, keys: Keys, *, fixed: bool) -> Attend:
        """to_q, attention over the keys that are left, to_out; K and V are kept where the weights are `fixed`."""
        reference = weakref.ref(context)

        def project() -> list[torch.Tensor]:
            tensor = reference()
            assert tensor is not None, "a context that died was attended to"
            rows = keys.rows(tensor)
            return [split_heads(projection(rows), attn.heads) for projection in (attn.to_k, attn.to_v)]

        kept = project() if fixed else None

        def attend(x: torch.Tensor) -> torch.Tensor:
            k, v = kept or project()
            q = split_heads(attn.to_q(x), attn.heads)
            heads = ops.biased_attention(q, k, v, keys.bias, attn.scale, backend=self.backend)
            out: torch.Tensor = attn.to_out[0](heads.transpose(1, 2).flatten(2))
            return out

        return attend

    def _absorbed(self, attn: Any, context: torch.Tensor, keys: Keys) -> Attend:
        """One operator in place of the layer."""
        rows = keys.rows(context)
        k, v = (split_heads(projection(rows), attn.heads) for projection in (attn.to_k, attn.to_v))  # [B, H, n, D]
        to_q, to_out = attn.to_q, attn.to_out[0]
        q_weight, o_weight = (module.weight.detach() for module in (to_q, to_out))
        a = k @ q_weight.view(attn.heads, -1, q_weight.shape[1]) * attn.scale  # [B, H, n, C]
        vo = v @ o_weight.view(o_weight.shape[0], attn.heads, -1).permute(1, 2, 0)
        bias = keys.bias
        if to_q.bias is not None:
            shift = (k.float() @ to_q.bias.float().view(attn.heads, -1, 1)).squeeze(-1) * attn.scale
            bias = bias.unsqueeze(1) + shift  # [B, H, n]
        if context.device.type == "cpu":
            return _absorbed_rows(a, bias, vo, to_out.bias, keys.counts)
        return lambda x: ops.absorbed_attention(x, a, bias, vo, to_out.bias, backend=self.backend)


def _absorbed_rows(
    a: torch.Tensor, bias: torch.Tensor, vo: torch.Tensor, out_bias: torch.Tensor | None, counts: tuple[int, ...]
) -> Attend:
    """On the CPU every sequence is as wide as its own keys, up to a multiple of 8 over all heads."""
    heads, parts = a.shape[1], []
    step = 8 // math.gcd(heads, 8)
    for b, left in enumerate(counts):
        width = -(-left // step) * step
        own = bias[b, ..., :width].reshape(-1, width).contiguous()
        parts.append((a[b, :, :width].reshape(-1, a.shape[-1]), own, vo[b, :, :width].reshape(-1, a.shape[-1])))

    def attend(x: torch.Tensor) -> torch.Tensor:
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        for b, part in enumerate(parts):
            cpu.absorb_rows(x[b], *part, out_bias, out[b])
        return out

    return attend


def split_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, n, H·D]` as `[B, H, n, D]`."""
    return rows.view(*rows.shape[:-1], heads, -1).transpose(1, 2)

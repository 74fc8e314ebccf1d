"""What a layer does with a context: which paths are open, and what each is estimated to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ...ops import backends
from .layer import Layer
from .paths import Attend, absorbed, compute_dtype, projected
from .sources import Source
from .state import Weights
from .weights import keeping_refusals, reading_refusals, whole_refusals

Path = Literal["absorbed", "projected", "former"]


@dataclass(frozen=True)
class Rates:
    """What a device does per second, in relation: multiply-adds of matrix products and of attention between
    heads, by memkern's operator and by torch's, elements of a softmax, bytes moved.
    """

    products: float
    attention: float
    former_attention: float
    softmax: float
    bytes: float


# The CPU's were measured on two cores with AVX-512, the GPU's are published for an A100.
RATES = {
    ("cpu", 4): Rates(1e11, 8e10, 4.5e10, 2e9, 2e10),
    ("cpu", 2): Rates(2e11, 8e10, 4.5e10, 2e9, 2e10),
    ("cuda", 4): Rates(9e12, 5e12, 5e12, 1e12, 1.5e12),
    ("cuda", 2): Rates(1.2e14, 4e13, 4e13, 1e12, 1.5e12),
}

MARGIN = 0.97
"""What a path's estimate must be of the layer's own processor's, to be taken instead."""


def seconds(path: Path, queries: int, width: int, heads: int, keys: Sequence[int], length: int, rates: Rates,
            itemsize: int) -> float:  # fmt: skip
    """The estimated time of a layer for sequences with `keys` keys each, of a context of `length` rows.

    Multiply-adds per hidden row are 2C² + 2Cn projected and 2CHn absorbed.
    """
    total = 0.0
    for left in keys:
        n = length if path == "former" else left
        values = queries * width
        if path == "absorbed":
            work = 2 * values * heads * n / rates.products
            moved = 2.0 * (values + heads * n * width)
        else:
            attention = rates.former_attention if path == "former" else rates.attention
            work = 2 * values * width / rates.products + 2 * values * n / attention
            moved = 6.0 * values + 2 * n * width + 2 * width * width / len(keys)
        total += work + queries * heads * n / rates.softmax + moved * itemsize / rates.bytes
    return total


@dataclass(frozen=True)
class Choice:
    """What a layer does with a context, and why.

    Attributes:
        path: "absorbed", "projected" or "former", the layer's own processor.
        keys: how many keys each sequence has left.
        sizes: N, C and H.
        milliseconds: the estimates that were compared, by path.
        reasons: why a path was not open.
        unkept: why K and V are made anew at each step.
    """

    path: Path
    keys: tuple[int, ...] = ()
    sizes: tuple[int, int, int] = (0, 0, 0)
    milliseconds: dict[Path, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    unkept: tuple[str, ...] = ()

    def __str__(self) -> str:
        estimates = ", ".join(f"{path} {time:.2f}" for path, time in self.milliseconds.items())
        queries, width, heads = self.sizes
        shape = f"N={queries} C={width} H={heads}, keys {'/'.join(map(str, self.keys))}"
        parts = [
            shape if self.keys else "",
            f"estimates in ms: {estimates}" if estimates else "",
            *self.reasons,
            *self.unkept,
        ]
        return f"{self.path} ({'; '.join(part for part in parts if part)})"


@dataclass
class Prepared:
    """A layer's part of a context.

    Attributes:
        choice: what it does.
        attend: how; None for the layer's own processor.
        weights: what it was computed from; None where nothing is kept.
        size: bytes kept.
    """

    choice: Choice
    attend: Attend | None
    weights: Weights | None = None
    size: int = 0

    def valid(self, layer: Layer, *, by_value: bool = True) -> bool:
        """Whether it was computed from the weights that the layer has now.

        Args:
            by_value: whether their values are looked at although writes to them are counted.
        """
        return self.weights is None or self.weights.unchanged(layer, by_value=by_value)


def prepare(layer: Layer, x: torch.Tensor, source: Source, context: torch.Tensor, backend: str) -> Prepared:
    """What a layer makes of a context that it sees again: the path that is estimated to be fastest.

    Args:
        x: hidden states `[B, N, C]`.
        source: the keys and values of `context`.
    """
    attn, dtype = layer.attn, compute_dtype(x)
    reasons = whole_refusals(attn) + without_kernels(x, dtype, backend)
    if reasons:
        if not source.edited:
            return Prepared(Choice("former", reasons=tuple(reasons)), None)
        return Prepared(Choice("projected", reasons=tuple(reasons)), projected(layer, source, backend))
    unreadable, unkept = reading_refusals(layer), keeping_refusals(layer)
    sizes = x.shape[1], x.shape[2], attn.heads
    rates = RATES[x.device.type if x.device.type == "cpu" else "cuda", min(4, dtype.itemsize)]
    paths: list[Path] = ["former", "projected", "absorbed"]
    times = {path: 1e3 * seconds(path, *sizes, source.counts, source.length, rates, dtype.itemsize) for path in paths}
    if unreadable or source.attenuation or layer.kind == "images":
        del times["absorbed"]
    fastest = min(times, key=lambda path: times[path])
    if source.edited:
        del times["former"]
        fastest = min(times, key=lambda path: times[path])
    elif times[fastest] >= MARGIN * times["former"]:
        fastest = "former"
    choice = Choice(fastest, source.counts, sizes, times, tuple(unreadable), tuple(unkept))
    if fastest == "former":
        return Prepared(choice, None)
    keys = 2 * source.keys.index.numel() * x.shape[2] * dtype.itemsize
    if fastest == "absorbed":
        made = absorbed(layer, source, backend, context, dtype)
        if made is not None:
            return Prepared(choice, made[0], Weights(layer, is_read=True), made[1])
        choice = replace(choice, path="projected", reasons=(f"multiplied out it is beyond {dtype}",))
    if unkept:
        return Prepared(choice, projected(layer, source, backend))
    if unreadable or layer.kind == "images":
        made_of = Weights(layer, is_read=False)
        return Prepared(choice, projected(layer, source, backend, context), made_of, keys)
    kept = projected(layer, source, backend, context, readable=True)
    return Prepared(choice, kept, Weights(layer, is_read=True), keys)


def without_kernels(x: torch.Tensor, dtype: torch.dtype, backend: str) -> list[str]:
    """Why nothing faster than a layer's own processor is here for tensors where `x` is, of that dtype; empty if
    there is.
    """
    fast = "cpp" if x.device.type == "cpu" else "triton"
    if backend not in ("auto", fast):
        return [f"backend {backend!r} has no faster attention"]
    if fast not in backends.order(x.device, "absorbed_attention"):
        return [f"{fast} is not faster than torch on {x.device}"]
    return backends.refusals(fast, x.device, dtype, "absorbed_attention")

"""The choice of a layer's path for a context: the open paths, and the time of each."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from ...ops import backends
from ...timings import Times
from .budget import Wish
from .estimated import on_card
from .layer import Layer
from .measured import Chooser, Projections
from .paths import Attend, absorbed, absorbed_bytes, compute_dtype, projected
from .sources import Source
from .state import Weights
from .weights import keeping_refusals, reading_refusals, whole_refusals

Path = Literal["former", "projected", "absorbed"]


@dataclass(frozen=True)
class Rates:
    """A device's rates per second, relative to each other: multiply-adds of matrix products and of attention between
    heads, by memkern's operator and by torch's, elements of a softmax, bytes moved.
    """

    products: float
    attention: float
    former_attention: float
    softmax: float
    bytes: float


# The CPU's were measured on two cores with AVX-512. The GPU's are 0.7 of the published rates of an A100, for cards that
# `on_card` does not know. There the products of both paths are equally fast, so that n (H - 1) < C decides.
RATES = {
    ("cpu", 4): Rates(1e11, 8e10, 4.5e10, 2e9, 2e10),
    ("cpu", 2): Rates(2e11, 8e10, 4.5e10, 2e9, 2e10),
    ("cuda", 4): Rates(7e12, 7e12, 7e12, 1e12, 1.5e12),
    ("cuda", 2): Rates(1.1e14, 1.1e14, 1.1e14, 1e13, 1.5e12),
}

MARGIN = 0.97
"""The share of the own processor's time that a path's time must be below, to be taken instead."""

ESTIMATED = Chooser(measures=False)
"""The chooser for layers that belong to no pipeline."""


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
    """The path of a layer for a context, with the reasons.

    Attributes:
        path: "absorbed", "projected" or "former", the layer's own processor.
        keys: the number of keys that each sequence has left.
        sizes: N, C and H.
        times: those that were compared.
        reasons: why a path was not open.
        unkept: why K and V are computed again at each step.
        turned_down: further bytes that would have been kept if there had been room.
    """

    path: Path
    keys: tuple[int, ...] = ()
    sizes: tuple[int, int, int] = (0, 0, 0)
    times: Times | None = None
    reasons: tuple[str, ...] = ()
    unkept: tuple[str, ...] = ()
    turned_down: int = 0

    def __str__(self) -> str:
        queries, width, heads = self.sizes
        shape = f"N={queries} C={width} H={heads}, keys {'/'.join(map(str, self.keys))}"
        parts = [
            shape if self.keys else "",
            str(self.times or ""),
            *self.reasons,
            *self.unkept,
            f"no room in memory= for {self.turned_down} bytes more" if self.turned_down else "",
        ]
        return f"{self.path} ({'; '.join(part for part in parts if part)})"


@dataclass
class Prepared:
    """A layer that is prepared for a context.

    Attributes:
        choice: its path, with the reasons.
        attend: the function that computes it; None for the layer's own processor.
        weights: those that it was computed from; None where nothing is kept.
        size: bytes kept.
    """

    choice: Choice
    attend: Attend | None
    weights: Weights | None = None
    size: int = 0

    def valid(self, layer: Layer, *, by_value: bool = True) -> bool:
        """True if it was computed from the weights that the layer has now.

        Args:
            by_value: whether their values are compared even where torch counts writes to them.
        """
        return self.weights is None or self.weights.unchanged(layer, by_value=by_value)


def prepare(
    layer: Layer,
    x: torch.Tensor,
    source: Source,
    context: torch.Tensor,
    backend: str,
    chooser: Chooser = ESTIMATED,
    room: int | None = None,
) -> Prepared:
    """Prepare the fastest path of a layer for a context that it sees again.

    Args:
        x: hidden states `[B, N, C]`.
        source: the keys and values of `context`.
        chooser: gives the times of the paths.
        room: bytes that may be kept; None for any number.
    """
    attn, dtype = layer.attn, compute_dtype(x)
    reasons = whole_refusals(attn) + without_kernels(x, dtype, backend)
    if reasons:
        if not source.edited:
            return Prepared(Choice("former", reasons=tuple(reasons)), None)
        return Prepared(Choice("projected", reasons=tuple(reasons)), projected(layer, source, backend))
    unreadable, unkept = reading_refusals(layer), keeping_refusals(layer)
    sizes, counts = (x.shape[1], x.shape[2], attn.heads), source.counts
    times = compare(layer, x, source, context.shape[-1], backend, chooser, bool(unreadable), bool(unkept))
    choice = Choice(fastest(times), counts, sizes, times, tuple(unreadable), tuple(unkept))
    wanted = wish(layer, x, source, context.shape[-1], key=None).sizes
    keys = wanted[0]
    if choice.path == "absorbed" and room is not None and wanted[-1] > room:
        choice = replace(_second(choice), turned_down=wanted[-1] - min(keys, room))
    if choice.path == "absorbed":
        made = absorbed(layer, source, backend, context, dtype)
        if made is not None:
            return Prepared(choice, made[0], Weights(layer, is_read=True), made[1])
        choice = replace(_second(choice), reasons=(f"its products overflow {dtype}",))
    if choice.path == "projected" and not unkept and room is not None and keys > room:
        # Computed again at each step, K and V are no faster than by the layer's own processor.
        path: Path = "projected" if source.edited else "former"
        choice = replace(choice, path=path, turned_down=choice.turned_down or keys)
        unkept = ["there is no room for them"]
    if choice.path == "former":
        return Prepared(choice, None)
    if unkept:
        return Prepared(choice, projected(layer, source, backend))
    if unreadable or layer.kind == "images":
        made_of = Weights(layer, is_read=False)
        return Prepared(choice, projected(layer, source, backend, context), made_of, keys)
    kept = projected(layer, source, backend, context, readable=True)
    return Prepared(choice, kept, Weights(layer, is_read=True), keys)


def _second(choice: Choice) -> Choice:
    """The choice where A and VO cannot be kept."""
    assert choice.times is not None
    left = {path: took for path, took in choice.times.milliseconds.items() if path != "absorbed"}
    times = replace(choice.times, milliseconds=left)
    return replace(choice, path=fastest(times), times=times)


def wish(layer: Layer, x: torch.Tensor, source: Source, context_width: int, key: Hashable) -> Wish:
    """The bytes that a layer could keep: K and V, and A and VO where they are open; and the milliseconds each saves."""
    dtype = compute_dtype(x)
    keys = 2 * source.keys.index.numel() * x.shape[2] * dtype.itemsize
    took = estimates(layer, x, source, context_width)
    # By the rates alone, computing K and V again is free.
    made = 2e3 * len(source.keys.counts) * source.length * context_width * x.shape[2] / _rates(x).products
    bytes_kept = keys, absorbed_bytes(source, layer.attn.heads, x.shape[2], dtype, x.device)
    is_open = not (source.attenuation or layer.kind == "images" or reading_refusals(layer))
    count = 2 if is_open else 1
    savings = (took["former"] + made - took["projected"], took["former"] + made - took["absorbed"])
    return Wish(key, bytes_kept[:count], savings[:count])


def compare(
    layer: Layer, x: torch.Tensor, source: Source, context_width: int, backend: str, chooser: Chooser,
    unreadable: bool, unkept: bool,
) -> Times:  # fmt: skip
    """The times of the open paths.

    Args:
        x: hidden states `[B, N, C]`, of which only the shape, dtype and device count.
        unreadable: whether the weights cannot be read in place of calling the modules.
        unkept: whether K and V may not be kept.
    """
    expected = estimates(layer, x, source, context_width)
    called = unreadable or layer.kind == "images"
    if called or source.attenuation:
        del expected["absorbed"]
    if len(expected) - source.edited == 1:
        times = Times(expected, measured=False)  # there is no choice
    else:
        how: Projections = "anew" if unkept else "called" if called else "read"
        times = chooser.times(layer, x, source, context_width, backend, how, expected)
    is_open = expected.keys() - ({"former"} if source.edited else set())
    return replace(times, milliseconds={path: t for path, t in times.milliseconds.items() if path in is_open})


def estimates(layer: Layer, x: torch.Tensor, source: Source, context_width: int) -> dict[str, float]:
    """The estimated time of each path, in milliseconds."""
    sizes, counts, length = (x.shape[1], x.shape[2], layer.attn.heads), source.counts, source.length
    dtype = compute_dtype(x)
    found = on_card(x.device, dtype, *sizes, counts, length, context_width)
    if found is not None:
        return found
    paths: tuple[Path, ...] = get_args(Path)
    return {path: 1e3 * seconds(path, *sizes, counts, length, _rates(x, path), dtype.itemsize) for path in paths}


def _rates(x: torch.Tensor, path: Path = "former") -> Rates:
    device, dtype = "cpu" if x.device.type == "cpu" else "cuda", compute_dtype(x)
    # On the CPU, A and VO of a float16 layer are float32, and so are the products with them.
    is_wide = path == "absorbed" and device == "cpu" and dtype == torch.float16
    return RATES[device, 4 if is_wide else min(4, dtype.itemsize)]


def fastest(times: Times) -> Path:
    """The path to take; the layer's own processor's unless another is faster by a margin."""
    took: dict[Any, float] = times.milliseconds
    least: Path = min(took, key=took.__getitem__)
    return "former" if "former" in took and took[least] >= MARGIN * took["former"] else least


def without_kernels(x: torch.Tensor, dtype: torch.dtype, backend: str) -> list[str]:
    """The reasons why no kernel for this dtype on the device of `x` is faster than a layer's own processor; empty if
    one is.
    """
    fast = "cpp" if x.device.type == "cpu" else "triton"
    if backend not in ("auto", fast):
        return [f"backend {backend!r} has no faster attention"]
    if fast not in backends.order(x.device, "absorbed_attention"):
        return [f"{fast} is not faster than torch on {x.device}"]
    return backends.refusals(fast, x.device, dtype, "absorbed_attention")

"""The estimated time of a cross-attention layer on a card, by path, for the launches that would run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from . import absorbing, resident, works
from .configs import Card
from .cost import Work
from .sizes import STEP, up


@dataclass(frozen=True)
class Layer:
    """A cross-attention layer and a context.

    Attributes:
        queries: N.
        width: C.
        heads: H.
        counts: keys that each sequence of the batch has left.
        length: rows of the context, which the layer's own processor attends to.
        context_width: width of those rows.
        dtype: of 16 bits, as all estimates are for tensor cores.
    """

    queries: int
    width: int
    heads: int
    counts: tuple[int, ...]
    length: int = 77
    context_width: int = 768
    dtype: torch.dtype = torch.float16

    @property
    def size(self) -> int:
        """Bytes per element."""
        return self.dtype.itemsize

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return len(self.counts)

    @property
    def keys(self) -> int:
        """Keys per sequence that are computed, on average."""
        return round(sum(up(count, STEP) for count in self.counts) / len(self.counts))

    @property
    def head_dim(self) -> int:
        """C / H."""
        return self.width // self.heads


def fastest(choices: Iterable[Work], card: Card) -> Work:
    """The choice with the least estimated time."""
    return min(choices, key=lambda work: work.seconds(card.processors, card.rates))


def unfused(layer: Layer, card: Card) -> list[Work]:
    """diffusers' AttnProcessor2_0: four projections, torch's attention, and its division by a factor of 1."""
    rows, context = layer.batch * layer.queries, layer.batch * layer.length
    query = fastest(works.linear(rows, layer.width, layer.width, layer.size), card)
    keys = fastest(works.linear(context, layer.context_width, layer.width, layer.size), card)
    heads = works.flash(layer.batch, layer.queries, layer.heads, layer.head_dim, layer.length, layer.size)
    return [query, keys, keys, fastest(heads, card), query, works.elementwise(rows * layer.width, 2, layer.size)]


def projected(layer: Layer, card: Card) -> list[Work]:
    """to_q, `biased_attention` over the keys that are left, to_out; K and V are kept."""
    query = fastest(works.linear(layer.batch * layer.queries, layer.width, layer.width, layer.size), card)
    return [query, biased(layer, card), query]


def biased(layer: Layer, card: Card) -> Work:
    """`biased_attention` alone; every sequence is padded to the longest."""
    sizes, keys = (layer.batch, layer.queries, layer.heads, layer.head_dim), max(layer.counts)
    if resident.holds(card, keys, layer.head_dim, layer.dtype):
        return resident.hold(card, *sizes, keys, layer.dtype, 2).work
    block = card.config("biased_attention", layer.head_dim, layer.dtype).constants["BLOCK_M"]
    return works.resident(*sizes, keys, layer.size, block, 1, 2)


def absorbed(layer: Layer, card: Card) -> list[Work]:
    """`absorbed_attention`'s two kernels."""
    sizes = layer.batch, layer.queries, layer.width, layer.heads, layer.keys
    return [work for _, work in absorbing.tiles(card, *sizes, layer.dtype)]


PATHS: dict[str, Callable[[Layer, Card], Sequence[Work]]] = {
    "former": unfused,
    "projected": projected,
    "absorbed": absorbed,
}


def seconds(path: str, layer: Layer, card: Card) -> float:
    """The estimate for "former", the layer's own processor, "projected" or "absorbed"."""
    return sum(work.seconds(card.processors, card.rates) for work in PATHS[path](layer, card))

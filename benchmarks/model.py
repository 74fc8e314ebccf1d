"""The estimated time of each path of a cross-attention layer, and the time below which no card can do it.

`python benchmarks/model.py` writes benchmarks/model.md, a prediction for measurements to meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from memkern.ops.triton import estimate
from memkern.ops.triton.absorbing import tiles
from memkern.ops.triton.configs import Card, Config
from memkern.ops.triton.cost import EFFICIENCY, LATENCY, LAUNCH, Rates
from memkern.ops.triton.cost import Work as Launched
from memkern.ops.triton.layers import BATCH, CONTEXT_WIDTHS, KEYS, LAYERS, Layer
from memkern.ops.triton.resident import hold

BYTES = 2  # float16


@dataclass(frozen=True)
class Work:
    """Bytes through device memory, every tensor once per kernel that reads or writes it, and operations."""

    bytes: int
    operations: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.operations + other.operations)


@dataclass(frozen=True)
class Ceiling:
    """A card's published rates: bytes per second, and float16 operations per second with tensor cores."""

    bytes: float
    operations: float

    def microseconds(self, work: Work) -> float:
        """The least time that memory and arithmetic allow."""
        return 1e6 * max(work.bytes / self.bytes, work.operations / self.operations)


CARDS = {"A100": Card.typical("sm80"), "RTX 4090": Card.typical("sm89"), "H100": Card.typical("sm90")}
BATCHES = (2, 8)
COUNTS = ((77, 77), (33, 77), (33, 33))
"""Keys left of the negative prompt and the prompt."""

OF_A_UNET = {
    "SD 1.5": {4096: 5, 1024: 5, 256: 5, 64: 1},
    "SD 2.1": {9216: 5, 2304: 5, 576: 5, 144: 1},
    "SDXL": {4096: 10, 1024: 60},
}
"""The number of layers of each length in a UNet."""


def ceiling_of(rates: Rates) -> Ceiling:
    """A card's published rates."""
    return Ceiling(rates.memory, rates.operations)


def linear(rows: int, inputs: int, outputs: int) -> Work:
    """A projection: its input, its weight, its output."""
    return Work(BYTES * (rows * inputs + inputs * outputs + rows * outputs), 2 * rows * inputs * outputs)


def attention(layer: Layer, keys: int) -> Work:
    """q, k, v in, the heads' outputs out."""
    rows = BATCH * layer.queries
    moved = 2 * rows * layer.width + 2 * BATCH * keys * layer.width
    return Work(BYTES * moved, 4 * rows * keys * layer.width)


def unfused(layer: Layer, keys: int) -> Work:
    """diffusers' default processor: four projections, attention over all 77 keys, the residual added."""
    rows, context = BATCH * layer.queries, BATCH * 77
    projections = linear(rows, layer.width, layer.width) + linear(rows, layer.width, layer.width)
    context_projections = linear(context, CONTEXT_WIDTHS[layer.model], 2 * layer.width)
    return projections + context_projections + attention(layer, 77) + residual(layer)


def projected(layer: Layer, keys: int) -> Work:
    """biased_attention: K and V are kept from the first step; to_q, attention over the keys that are left, to_out."""
    rows = BATCH * layer.queries
    projections = linear(rows, layer.width, layer.width) + linear(rows, layer.width, layer.width)
    return projections + attention(layer, keys) + residual(layer)


def residual(layer: Layer) -> Work:
    """Two tensors added into a third."""
    values = BATCH * layer.queries * layer.width
    return Work(3 * BYTES * values, values)


def absorbed(layer: Layer, keys: int) -> Work:
    """absorbed_attention in one kernel: x and the residual in, the output out, A and VO in."""
    rows = BATCH * layer.queries
    absorbed_keys = BATCH * layer.heads * keys
    moved = 3 * rows * layer.width + 2 * absorbed_keys * layer.width
    return Work(BYTES * moved, 4 * rows * layer.heads * keys * layer.width)


def mass(layer: Layer, keys: int) -> Work:
    """attention_mass: q and k in, the logits twice, sums of a few bytes out."""
    rows = BATCH * layer.queries
    return Work(BYTES * (rows + BATCH * keys) * layer.width, 4 * rows * keys * layer.width)


def rows_work(width: int, tensors: int, dtype_bytes: int = BYTES) -> Work:
    """edit_embeds (1 tensor), edit_kv (2), per 64 prompts: rows in, rows out, a plan of 8 bytes per key and tensor."""
    keys = 64 * 77
    return Work(tensors * keys * (2 * width * dtype_bytes + 8), tensors * keys * width)


def described(layer: Layer, counts: tuple[int, ...], batch: int) -> estimate.Layer:
    """A layer with these numbers of keys left, in a batch of such pairs."""
    sizes = layer.queries, layer.width, layer.heads
    return estimate.Layer(*sizes, counts * (batch // 2), 77, CONTEXT_WIDTHS[layer.model])


def estimates(layer: Layer, counts: tuple[int, ...], batch: int, card: Card) -> dict[str, float]:
    """Path → microseconds."""
    given = described(layer, counts, batch)
    return {path: 1e6 * estimate.seconds(path, given, card) for path in estimate.PATHS}


def shares(model: str, counts: tuple[int, ...], batch: int, card: Card) -> tuple[float, float]:
    """The time of all layers of a UNet by the fastest path of each, and that of their to_q and to_out alone, over that
    of diffusers' own processors.
    """
    chosen = alone = former = 0.0
    for layer in LAYERS:
        if layer.model == model:
            times, count = estimates(layer, counts, batch, card), OF_A_UNET[model][layer.queries]
            chosen += count * min(times.values())
            former += count * times["former"]
            to_q, _, to_out = estimate.projected(described(layer, counts, batch), card)
            alone += count * 1e6 * sum(work.seconds(card.processors, card.rates) for work in (to_q, to_out))
    return chosen / former, alone / former


def paths_table() -> list[str]:
    """Every layer, path and card."""
    lines = [
        f"| layer | batch | keys | {' | '.join(f'{card}: unfused | projected | absorbed' for card in CARDS)} |",
        f"| --- | ---: | ---: |{' ---: |' * 3 * len(CARDS)}",
    ]
    for layer in LAYERS:
        for batch in BATCHES:
            for counts in COUNTS:
                cells = []
                for card in CARDS.values():
                    times = estimates(layer, counts, batch, card)
                    least = min(times.values())
                    cells += [f"**{time:.0f}**" if time == least else f"{time:.0f}" for time in times.values()]
                name = f"{layer.model} {layer.queries}×{layer.width}, H = {layer.heads}"
                lines.append(f"| {name} | {batch} | {'/'.join(map(str, counts))} | {' | '.join(cells)} |")
    return lines


def shares_table() -> list[str]:
    """Whole UNets."""
    lines = [
        f"| UNet | batch | keys | {' | '.join(CARDS)} |",
        f"| --- | ---: | ---: |{' ---: |' * len(CARDS)}",
    ]
    for model in OF_A_UNET:
        for batch in BATCHES:
            for counts in COUNTS:
                cells = ["{:.2f} ({:.2f})".format(*shares(model, counts, batch, card)) for card in CARDS.values()]
                lines.append(f"| {model} | {batch} | {'/'.join(map(str, counts))} | {' | '.join(cells)} |")
    return lines


def limit(work: Launched, card: Card) -> str:
    """The name of the largest of the four times."""
    times = work.parts(card.processors, card.rates)
    return max(times, key=lambda name: times[name])


def launches_table() -> list[str]:
    """The launches that really run: tiles, programs, bytes through the L2 cache, and the time that limits them."""
    lines = [
        f"| layer | keys | batch | kernel |{''.join(f' {card}: tile | programs | MB | limit |' for card in CARDS)}",
        f"| --- | ---: | ---: | --- |{' --- | ---: | ---: | --- |' * len(CARDS)}",
    ]
    for layer in LAYERS:
        for keys in KEYS:
            for batch in BATCHES:
                rows: dict[str, list[str]] = {"probabilities": [], "values": [], "biased_attention": []}
                for card in CARDS.values():
                    sizes = layer.queries, layer.width, layer.heads, keys, torch.float16
                    (first, one), (second, two) = tiles(card, batch, *sizes)
                    held = hold(card, batch, layer.queries, layer.heads, layer.head_dim, keys, torch.float16, 2)
                    for name, config, work, suffix in (
                        ("probabilities", first, one, ""),
                        ("values", second, two, ""),
                        ("biased_attention", held.config, held.work, f" · {held.tiles}"),
                    ):
                        moved = f"{work.programs * work.through_l2 / 1e6:.0f}"
                        rows[name] += [_tile(config) + suffix, str(work.programs), moved, limit(work, card)]
                for name, cells in rows.items():
                    shape = f"{layer.model} {layer.queries}×{layer.width}"
                    lines.append(f"| {shape} | {keys} | {batch} | {name} | {' | '.join(cells)} |")
    return lines


def _tile(config: Config) -> str:
    return "×".join(str(size) for name, size in config.constants.items() if name != "HEADS" or size > 1)


def edits_table() -> list[str]:
    """Edits of 64 prompts, which move as many bytes as a copy."""
    lines = [
        f"| operator | MB | {' | '.join(f'{card}, µs' for card in CARDS)} |",
        f"| --- | ---: |{' ---: |' * len(CARDS)}",
    ]
    for width in CONTEXT_WIDTHS.values():
        for operator, tensors in (("edit_embeds", 1), ("edit_kv", 2)):
            work = rows_work(width, tensors)
            floors = [f"{ceiling_of(card.rates).microseconds(work):.1f}" for card in CARDS.values()]
            lines.append(f"| {operator}, width {width} | {work.bytes / 1e6:.1f} | {' | '.join(floors)} |")
    return lines


def table() -> str:
    """The page."""
    cards = ", ".join(f"{name} ({card.processors} multiprocessors)" for name, card in CARDS.items())
    return "\n".join(
        [
            "# What a cross-attention layer is estimated to take",
            "",
            f"float16 on {cards}; microseconds, written by `python benchmarks/model.py`. Nothing here was measured.",
            "",
            "A launch takes the largest of four times: bytes through device memory (weights, K and V, A and VO; what",
            "the kernel before left only where the L2 cache does not hold it), bytes of all tiles through the L2,",
            f"products of tiles at {EFFICIENCY:.0%} of the tensor cores' published rate with the last round of",
            f"programs counted whole, and loads that nothing hides ({1e6 * LATENCY:.1f} µs each: two before the main",
            f"loop, one for three of its turns); and {1e6 * LAUNCH:.0f} µs to be launched. *unfused* is diffusers'",
            "AttnProcessor2_0: four projections (the best of several tile sizes and splits), torch's attention over 77",
            "keys, the division by `rescale_output_factor`. *projected* is `biased_attention` between to_q and to_out",
            "with K and V kept, *absorbed* is `absorbed_attention`, one path for the batch. The block's residual is in",
            "none. The least is bold.",
            "",
            *paths_table(),
            "",
            "All cross-attention layers of a UNet, by the fastest path of each, as a share of unfused; in brackets",
            "to_q and to_out alone, which all paths but *absorbed* need:",
            "",
            *shares_table(),
            "",
            "What runs: tile (rows, then channels and heads, or keys and channels; for `biased_attention` rows · tiles",
            "of a program), programs, MB that they load and store by their tiles, and the largest of the four times.",
            "",
            *launches_table(),
            "",
            "Edits of 64 prompts, which move what a copy moves:",
            "",
            *edits_table(),
            "",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(table(), encoding="utf-8")

"""What each path moves and computes in one cross-attention layer, and the time below which no card can do it.

`python benchmarks/model.py` writes benchmarks/model.md, a prediction for measurements to meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from memkern.ops.triton.configs import Card
from memkern.ops.triton.configs import table as configurations
from memkern.ops.triton.launch import cdiv
from memkern.ops.triton.layers import BATCH, CONTEXT_WIDTHS, KEYS, LAYERS, Layer

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
    """What a card can do: bytes per second, and float16 operations per second with tensor cores, as published."""

    bytes: float
    operations: float

    def microseconds(self, work: Work) -> float:
        """The time that neither memory nor arithmetic allows to go below."""
        return 1e6 * max(work.bytes / self.bytes, work.operations / self.operations)


CARDS = {
    "A100 80GB": Ceiling(2.04e12, 312e12),
    "H100 SXM": Ceiling(3.35e12, 989e12),
    "RTX 4090": Ceiling(1.01e12, 165e12),
}


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


def absorbed_in_two(layer: Layer, keys: int) -> Work:
    """The same in two kernels: the probabilities, padded to 16 keys, go through memory."""
    padded = 16 * -(-keys // 16)
    through = 2 * BATCH * layer.queries * layer.heads * padded
    return absorbed(layer, keys) + Work(BYTES * through, 0)


def mass(layer: Layer, keys: int) -> Work:
    """attention_mass: q and k in, the logits twice, sums of a few bytes out."""
    rows = BATCH * layer.queries
    return Work(BYTES * (rows + BATCH * keys) * layer.width, 4 * rows * keys * layer.width)


PATHS = {
    "unfused": unfused,
    "projected": projected,
    "absorbed, one kernel": absorbed,
    "absorbed, two kernels": absorbed_in_two,
}


def rows_work(width: int, tensors: int, dtype_bytes: int = BYTES) -> Work:
    """edit_embeds (1 tensor), edit_kv (2), per 64 prompts: rows in, rows out, a plan of 8 bytes per key and tensor."""
    keys = 64 * 77
    return Work(tensors * keys * (2 * width * dtype_bytes + 8), tensors * keys * width)


def tiles_one(layer: Layer, keys: int, card: Card) -> int | None:
    """Bytes that the programs of one kernel load and store; None where the card has no such configuration."""
    try:
        rows = card.config("absorbed_attention", layer.width, torch.float16).constants["BLOCK_M"]
    except NotImplementedError:
        return None
    per_program = layer.heads * (2 * keys + rows) * layer.width + 2 * rows * layer.width
    return BYTES * BATCH * cdiv(layer.queries, rows) * per_program


def tiles_two(layer: Layer, keys: int, card: Card) -> int:
    """The same of two kernels."""
    padded = 16 * cdiv(keys, 16)
    rows = card.config("absorbed_probabilities", layer.width, torch.float16).constants["BLOCK_M"]
    first = cdiv(layer.queries, rows) * layer.heads * ((keys + rows) * layer.width + rows * padded)
    sizes = card.config("absorbed_values", layer.width, torch.float16).constants
    rows, columns = sizes["BLOCK_M"], sizes["BLOCK_C"]
    per_program = layer.heads * (rows * keys + keys * columns) + 2 * rows * columns
    return BYTES * BATCH * (first + cdiv(layer.queries, rows) * cdiv(layer.width, columns) * per_program)


def tiles_table() -> list[str]:
    """What the tiles of the table of configurations make of it."""
    families = ("sm80", "sm90")
    lines = [
        "",
        "What the tiles as configured load and store, in MB, mostly from and to the L2 cache: A and VO once per tile",
        "of rows. Where this is many times the bytes above, the L2 cache and not the floor sets the time.",
        "",
        f"| layer | keys |{''.join(f' {family}, one kernel | {family}, two |' for family in families)}",
        f"| --- | ---: |{' ---: |' * 2 * len(families)}",
    ]
    for layer in LAYERS:
        for keys in KEYS:
            cells = []
            for family in families:
                card = Card(1, configurations()[family])
                one = tiles_one(layer, keys, card)
                cells += ["" if one is None else f"{one / 1e6:.0f}", f"{tiles_two(layer, keys, card) / 1e6:.0f}"]
            lines.append(f"| {layer.model} {layer.queries}×{layer.width} | {keys} | {' | '.join(cells)} |")
    return lines


def table() -> str:
    """The page."""
    lines = [
        "# What a cross-attention layer costs at least",
        "",
        f"float16, batch {BATCH} (the prompt and its negative), keys left of 77. Bytes: every tensor once for each",
        "kernel that reads or writes it. The floor is the larger of bytes and operations over what a card can do at",
        "most (as published, dense); in brackets, how many times less than unfused. *unfused* is diffusers' default",
        "processor, *projected* is `biased_attention` between to_q and to_out with K and V kept, *absorbed* is",
        "`absorbed_attention`. Absorbing trades bytes and launches for operations: it pays where n < C / (H - 1), and",
        "where launches count.",
        "Written by `python benchmarks/model.py`.",
        "",
        f"| layer | keys | path | MB | GFLOP | {' | '.join(f'{card}, µs' for card in CARDS)} |",
        f"| --- | ---: | --- | ---: | ---: |{' ---: |' * len(CARDS)}",
    ]
    for layer in LAYERS:
        for keys in KEYS:
            base = unfused(layer, keys)
            for name, path in PATHS.items():
                work = path(layer, keys)
                floors = [
                    f"{ceiling.microseconds(work):.1f} ({ceiling.microseconds(base) / ceiling.microseconds(work):.1f}×)"
                    for ceiling in CARDS.values()
                ]
                shape = f"{layer.model} {layer.queries}×{layer.width}, H = {layer.heads}"
                numbers = f"{work.bytes / 1e6:.1f} | {work.operations / 1e9:.2f}"
                lines.append(f"| {shape} | {keys} | {name} | {numbers} | {' | '.join(floors)} |")
    lines += tiles_table()
    lines += [
        "",
        "Edits of 64 prompts, which move what a copy moves:",
        "",
        f"| operator | MB | {' | '.join(f'{card}, µs' for card in CARDS)} |",
        f"| --- | ---: |{' ---: |' * len(CARDS)}",
    ]
    for width in CONTEXT_WIDTHS.values():
        for operator, tensors in (("edit_embeds", 1), ("edit_kv", 2)):
            work = rows_work(width, tensors)
            floors = [f"{ceiling.microseconds(work):.1f}" for ceiling in CARDS.values()]
            lines.append(f"| {operator}, width {width} | {work.bytes / 1e6:.1f} | {' | '.join(floors)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(table(), encoding="utf-8")

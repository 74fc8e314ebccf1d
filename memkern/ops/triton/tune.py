"""Write the table of configurations: `python -m memkern.ops.triton.tune [--family sm86 …] --out configs.json`.

A candidate is written only if it compiles within the family's budget, no stack and shared memory within the limit,
and as far as it does: an entry says up to how many keys, and whether for whole tiles of channels only. On a GPU those
are timed on the layers of Stable Diffusion, and the fastest are written for that card's family. With `--family` no
card is needed: the first that compile are written; candidates are listed with the expected fastest first.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..cards import architecture
from .absorbed_attention import MOST_KEYS
from .ahead import SHARED_LIMITS, compile_ahead, review, specialization
from .configs import Card, Entry, family_of
from .launch import Launch
from .layers import KEYS, LAYERS, absorbed_launches, biased_launch, mass_launch, row_launches
from .sizes import STEP, up

MOST_REDUNDANCY = 1.05

HEAD_DIMS = (8, 40, 64, 80, 128, 160, 256)

LENGTHS = (*sorted(KEYS), 154, MOST_KEYS)
"""KEYS, those of a prompt of two windows, and the most that are absorbed."""

ANYWHERE: Entry = {}
WHOLE: Entry = {"whole": True}
BY_KEYS: tuple[Entry, ...] = tuple({"keys": up(keys, STEP)} for keys in LENGTHS)


@dataclass(frozen=True)
class Place:
    """One place of the table and its candidates, the expected fastest first.

    Attributes:
        holds: how many of the candidates that fit are kept; a launch takes the fastest of them for its sizes.
        limits: conditions of a candidate, the narrowest first; it is written with the widest up to which it fits.
    """

    kernel: str
    candidates: list[Entry]
    holds: int = 1
    limits: tuple[Entry, ...] = (ANYWHERE,)


def place(
    kernel: str,
    bits: int,
    width: int | None,
    names: str,
    *sizes: tuple[int, ...],
    holds: int = 1,
    limits: tuple[Entry, ...] = (ANYWHERE,),
) -> Place:
    """The place for elements of `bits` and a width up to `width`, with `sizes` for `names`, warps and stages."""
    condition = {"bits": bits, "width": width}
    names_of_sizes = (*names.split(), "num_warps", "num_stages")
    return Place(kernel, [condition | dict(zip(names_of_sizes, size, strict=True)) for size in sizes], holds, limits)


# Without tensor cores (float32, and compute capability 7.5) an operand's whole depth is in registers.
_SMALL = ((32, 16, 64, 4, 1), (16, 16, 64, 4, 1), (16, 16, 32, 4, 1), (16, 16, 32, 8, 1), (16, 16, 16, 8, 1))
_TALL = ((64, 16, 256, 4, 2), (64, 16, 256, 4, 1), (32, 16, 256, 2, 1), (32, 16, 64, 2, 1), (16, 16, 64, 1, 1))
_RESIDENT = ((64, 4, 2), (32, 2, 2), (64, 8, 2), (32, 4, 2), (16, 1, 2), (16, 2, 2))
PLACES = (
    place("edit_rows", 16, None, "BLOCK_ROWS BLOCK_COLUMNS", (2, 1024, 4, 1)),
    place("edit_rows", 32, None, "BLOCK_ROWS BLOCK_COLUMNS", (2, 512, 4, 1)),
    place("biased_attention", 16, 64, "BLOCK_M BLOCK_N PART_D", (64, 32, 256, 4, 2), (64, 16, 256, 4, 2), *_SMALL),
    place("biased_attention", 16, 128, "BLOCK_M BLOCK_N PART_D", (64, 32, 256, 4, 2), (64, 16, 256, 4, 2), *_SMALL),
    place("biased_attention", 16, 160, "BLOCK_M BLOCK_N PART_D", *_TALL, *_SMALL),
    place("biased_attention", 16, 256, "BLOCK_M BLOCK_N PART_D", *_TALL, *_SMALL),
    place("biased_attention", 32, 64, "BLOCK_M BLOCK_N PART_D", *_SMALL),
    place("biased_attention", 32, 128, "BLOCK_M BLOCK_N PART_D", *_SMALL, (16, 16, 64, 16, 1)),
    place("biased_attention", 32, 160, "BLOCK_M BLOCK_N PART_D", *_SMALL),
    place("biased_attention", 32, 256, "BLOCK_M BLOCK_N PART_D", *_SMALL),
    place("resident", 16, 64, "BLOCK_M", *_RESIDENT, holds=2),
    place("resident", 16, 80, "BLOCK_M", *_RESIDENT, holds=2),
    place("resident", 16, 128, "BLOCK_M", *_RESIDENT, holds=2),
    place("resident", 16, 160, "BLOCK_M", *_RESIDENT, holds=2),
    # A block of one warp per 16 rows issues no product twice.
    place(
        "absorbed_probabilities", 16, None, "BLOCK_M BLOCK_C HEADS", (128, 64, 5, 8, 3), (128, 64, 4, 8, 3),
        (128, 64, 2, 8, 3), (128, 64, 1, 4, 3), (128, 64, 1, 8, 3), (64, 64, 4, 4, 3), (64, 64, 2, 4, 3),
        (64, 64, 1, 4, 3), (32, 64, 1, 2, 3), (64, 64, 1, 4, 2), (64, 32, 1, 4, 3), (32, 32, 1, 2, 2),
        (16, 32, 1, 4, 1), (16, 16, 1, 4, 1), holds=14, limits=BY_KEYS,
    ),
    place(
        "absorbed_probabilities", 32, None, "BLOCK_M BLOCK_C HEADS", (32, 32, 1, 4, 2), (32, 32, 1, 8, 2),
        (16, 32, 1, 4, 1), (16, 16, 1, 4, 1), holds=4, limits=BY_KEYS,
    ),
    place(
        "absorbed_values", 16, None, "BLOCK_M BLOCK_K BLOCK_C", (256, 64, 128, 8, 3), (128, 64, 128, 8, 3),
        (128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (32, 64, 64, 2, 3), (64, 32, 64, 4, 2), (16, 16, 64, 4, 1),
        holds=5, limits=(WHOLE, ANYWHERE),
    ),
    place("absorbed_values", 32, None, "BLOCK_M BLOCK_K BLOCK_C", (32, 16, 64, 4, 2), (16, 16, 32, 4, 1)),
)  # fmt: skip

Case = Callable[[Card], list[Launch]]


def cases(kernel: str, entry: Entry) -> Iterator[Case]:
    """The launches that a place has to serve, each for a card, on the meta device.

    bfloat16 uses the entries of float16.
    """
    width, dtype = entry["width"], {16: torch.float16, 32: torch.float32}[entry["bits"]]
    if kernel == "edit_rows":
        yield partial(row_launches, 768, dtype)
    elif kernel in ("biased_attention", "resident"):
        widths = {place.candidates[0]["width"] for place in PLACES if place.kernel == kernel}
        narrower = max((other for other in widths if other < width), default=0)
        for head_dim, keys in itertools.product(HEAD_DIMS, KEYS):
            if narrower < head_dim <= width:
                yield partial(_attention, head_dim, keys, dtype)
    else:
        shapes = sorted({(layer.width, layer.heads) for layer in LAYERS})
        for (layer_width, heads), keys in itertools.product(shapes, LENGTHS):
            yield partial(absorbed_launches, 1024, layer_width, heads, keys, dtype)


def _attention(head_dim: int, keys: int, dtype: torch.dtype, card: Card) -> list[Launch]:
    return [make(1024, 8, head_dim, keys, dtype, card) for make in (biased_launch, mass_launch)]


def served(kernel: str, entry: Entry, family: str) -> Iterator[list[Launch]]:
    """The launches of each case that an entry serves; none of a case that its conditions leave out."""
    card = with_entry(kernel, entry, family)
    for case in cases(kernel, entry):
        try:
            yield [launch for launch in case(card) if is_tuned(kernel, launch)]
        except NotImplementedError:
            yield []


def is_tuned(kernel: str, launch: Launch) -> bool:
    """True if a launch is of the kernel of the table; `edit_rows` and `biased_attention` serve several kernels."""
    return kernel in ("edit_rows", "biased_attention") or launch.kernel.__name__.startswith(kernel)


def with_entry(kernel: str, entry: Entry, family: str) -> Card:
    """A card of `family` with `entry` alone for `kernel`, and the least candidates for others.

    It has no `resident` kernel that would take the launches of `biased_attention`.
    """
    others: dict[str, list[Entry]] = {}
    for other in PLACES:
        if other.kernel != "resident":
            others.setdefault(other.kernel, []).append(other.candidates[-1])
    return Card(1, others | {kernel: [entry]}, family)


def fits(kernel: str, entry: Entry, family: str) -> bool:
    """True if all launches of an entry compile within the budget of `family`, and review well; and there are some."""
    card = with_entry(kernel, entry, family)
    launches = itertools.chain.from_iterable(served(kernel, entry, family))
    different = {f"{launch.kernel.__name__} {specialization(launch)}": launch for launch in launches}
    return bool(different) and all(reviews_well(launch, card) for launch in different.values())


def fitting(place: Place, family: str) -> Iterator[Entry]:
    """The candidates that fit, each with the widest of the place's limits up to which it does."""
    for entry in place.candidates:
        limited = (entry | limit for limit in place.limits)
        yield from list(itertools.takewhile(partial(fits, place.kernel, family=family), limited))[-1:]


def reviews_well(launch: Launch, card: Card) -> bool:
    """True for no stack, and shared memory within the limit; on NVIDIA with cp.async no product twice, no waiting load.

    Kernels that take keys block by block read the bias before the keys, so they may wait for loads; so may kernels
    without tensor-core products that are counted.
    """
    if not card.family.startswith("sm"):
        usage = compile_ahead(launch, card.family)
        return not usage.stack and usage.shared <= SHARED_LIMITS[card.family]
    found = review(launch, card)
    waits = found.waiting and found.redundancy and card.family != "sm75" and "BLOCK_N" not in launch.constants
    spills = found.usage.stack or found.usage.shared > SHARED_LIMITS[card.family]
    return not (spills or waits or found.redundancy > MOST_REDUNDANCY)


def seconds(launches: Iterable[Launch]) -> float:
    """The sum of median times on this machine's card."""
    from triton.testing import do_bench

    return float(sum(do_bench(launch.on("cuda").run, return_mode="median") for launch in launches))


def measured(place: Place, family: str) -> list[Entry]:
    """The fitting candidates that are the fastest, each for most cases first; where one is held, that for all."""
    entries = list(fitting(place, family))
    times = [
        [seconds(case) if case else float("inf") for case in served(place.kernel, entry, family)] for entry in entries
    ]
    if place.holds == 1:
        return [entries[min(range(len(entries)), key=lambda index: sum(times[index]))]] if entries else []
    wins = Counter(min(range(len(entries)), key=of_case.__getitem__) for of_case in zip(*times, strict=True))
    return [entries[index] for index, _ in wins.most_common(place.holds)]


def by_budget(place: Place, family: str) -> list[Entry]:
    """The candidates that fit, as many as the place holds."""
    return list(itertools.islice(fitting(place, family), place.holds))


def tuned(family: str, measure: bool) -> dict[str, list[Entry]]:
    """The table's part for `family`."""
    if measure:
        chosen = [measured(place, family) for place in PLACES]
    else:
        with ProcessPoolExecutor() as pool:
            chosen = list(pool.map(partial(by_budget, family=family), PLACES))
    kernels: dict[str, list[Entry]] = {}
    for place, entries in zip(PLACES, chosen, strict=True):
        kernels[place.kernel] = kernels.get(place.kernel, []) + entries
    return {kernel: entries for kernel, entries in kernels.items() if entries}


def main() -> None:
    """Tune, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--family", action="append", help="by budget, without a card: sm75 … sm120; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; its other families are kept")
    options = parser.parse_args()
    here = options.family is None
    families = [family_of(architecture(torch.cuda.current_device()))] if here else options.family
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for family in families:
        found[family] = tuned(family, here)
        print(f"{family}: {json.dumps(found[family])}")
    options.out.write_text(_one_entry_a_line(found))


def _one_entry_a_line(found: dict[str, dict[str, list[Entry]]]) -> str:
    """JSON of a table of configurations, one entry a line, easy to read and compare."""
    families = []
    for family, kernels in found.items():
        lines = [
            f'  "{kernel}": [\n   ' + ",\n   ".join(map(json.dumps, entries)) + "\n  ]"
            for kernel, entries in kernels.items()
        ]
        families.append(f' "{family}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(families) + "\n}\n"


if __name__ == "__main__":
    main()

"""Every Triton kernel compiled for every card family without a card, and read: benchmarks/budgets.md.

`MEMKERN_WRITE_BUDGETS=1 pytest -m aot` records what is used now.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: nothing to compile")

import triton

from memkern.ops.triton.ahead import SHARED_LIMITS, compile_ahead, review, specialization
from memkern.ops.triton.configs import Card, table
from memkern.ops.triton.cost import FAMILIES
from memkern.ops.triton.layers import (
    KEYS,
    LAYERS,
    absorbed_launches,
    attention_launches,
    biased_launch,
    mass_launch,
    row_launches,
)
from memkern.ops.triton.tune import MOST_REDUNDANCY

pytestmark = pytest.mark.aot

BUDGETS = Path(__file__).parents[1] / "benchmarks/budgets.md"
READ = ("sm80", "sm86", "sm89", "sm90")
"""Families whose kernels are read for all layers, at batches of 2 and 8; those of others are held to budgets."""

BATCHES = (2, 8)
MANY_KEYS = 154
"""The keys of a prompt of two windows: more than a program holds at a time."""

LARGE = LAYERS[:4]
"""SD 1.5's layers, of every head dim that is not a power of 2."""


def label(launch):
    """Kernel, sizes and tile, which identify a compiled kernel in the table."""
    sizes = dict(launch.constants)
    keys = launch.arguments.get("keys")
    name = [launch.kernel.__name__.removesuffix("_kernel")]
    name += [f"{size}={sizes[size]}" for size in ("C", "D") if size in sizes]
    name += [] if keys is None else [f"n={keys}"]
    tile = [str(sizes[size]) for size in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C", "HEADS") if size in sizes]
    return " ".join([*name, "×".join(tile)]).strip()


@cache
def launches(family):
    """(label, dtype) → launch, for one family."""
    card, found = Card.typical(family), {}

    def add(made, dtype):
        for launch in made:
            found.setdefault((label(launch), str(dtype).removeprefix("torch.")), launch)

    half = torch.float16
    add(row_launches(768, half, card), half)
    if family in READ:
        for layer in LAYERS:
            for keys in KEYS:
                for batch in BATCHES:
                    add(attention_launches(layer, keys, half, card, batch), half)
    else:
        for layer in LARGE:
            add(attention_launches(layer, 77, half, card), half)
    if family in ("sm80", "sm90"):
        for layer in LARGE:
            for dtype in (torch.bfloat16, torch.float32):
                add(attention_launches(layer, 77, dtype, card), dtype)
            sizes = layer.queries, layer.heads, layer.head_dim, MANY_KEYS, half, card
            add([biased_launch(*sizes), mass_launch(*sizes)], half)
        for dtype in (torch.bfloat16, torch.float32):
            add(row_launches(768, dtype, card), dtype)
    return found


CASES = [(family, *name) for family in table() for name in launches(family)]


def compiled(case):
    """The resources of a case's kernel, and for NVIDIA's cards its review."""
    family, *name = case
    launch = launches(family)[tuple(name)]
    if family in READ:
        found = review(launch, Card.typical(family))
        return found.usage, found
    return compile_ahead(launch, family), None


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """Case → its resources and review, compiled by a process per core; recorded if that is asked for."""
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    with ProcessPoolExecutor() as pool:
        known = dict(zip(CASES, pool.map(compiled, CASES, chunksize=4), strict=True))
    if os.environ.get("MEMKERN_WRITE_BUDGETS") == "1":
        BUDGETS.write_text(written(known), encoding="utf-8")
    return known


def written(known):
    """The table of budgets."""
    names = sorted({(name, dtype) for _, name, dtype in known}, key=_order)
    families = list(table())
    lines = [
        f"# What compiled kernels take, by triton {triton.__version__}",
        "",
        "Registers per thread / shared memory per block in bytes, of each Triton kernel for a card of each family; of",
        f"{', '.join(READ)} / blocks on a multiprocessor as well. Sizes are followed by the tile: rows, then what",
        "a turn takes of keys and channels, then heads. The stack is 0 everywhere: nothing spills. On those four, no",
        f"tensor-core product is issued more than {MOST_REDUNDANCY} times, and no load of a main loop goes through",
        "registers, except in the two kernels that take keys as they come (float32, and more than 128 keys).",
        "`pytest -m aot` checks all of that and this table, and `MEMKERN_WRITE_BUDGETS=1 pytest -m aot` records it.",
        "AMD's were compiled, never run. Blank: not among the launches of that family.",
        "",
        f"| kernel | dtype | {' | '.join(families)} |",
        f"| --- | --- |{' ---: |' * len(families)}",
    ]
    for name, dtype in names:
        texts = []
        for family in families:
            usage, read = known.get((family, name, dtype), (None, None))
            text = "" if usage is None else f"{usage.registers} / {usage.shared}"
            texts.append(text if read is None else f"{text} / {read.blocks}")
        lines.append(f"| {name} | {dtype} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _order(row):
    """The sort key: the kernel, then sizes as numbers."""
    kernel, *sizes = row[0].split()
    numbers = [int(number) for size in sizes for number in size.split("=")[-1].split("×") if number]
    return kernel, numbers, row[1]


def recorded():
    """Case → (registers, shared) from the table, and the triton that it was recorded with."""
    text = BUDGETS.read_text(encoding="utf-8")
    version = text.split("triton ", 1)[1].split()[0]
    budgets = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 2 + len(table()) and "/" in line:
            for family, cell in zip(table(), cells[2:], strict=True):
                if cell:
                    budgets[family, cells[0], cells[1]] = tuple(map(int, cell.split("/")[:2]))
    return budgets, version


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case).replace(" ", "-"))
def test_within_budget(found, case):
    budgets, version = recorded()
    usage, _ = found[case]
    assert usage.stack == 0, "registers spill to local memory"
    assert usage.shared <= SHARED_LIMITS[case[0]]
    assert case in budgets, "no budget recorded"
    if version == triton.__version__:
        registers, shared = budgets[case]
        assert usage.registers <= registers
        assert usage.shared <= shared


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case[0] in READ and case[2] != "float32"],
    ids=lambda case: "-".join(case).replace(" ", "-"),
)
def test_no_product_twice_and_no_load_waited_for(found, case):
    _, read = found[case]
    assert read.redundancy <= MOST_REDUNDANCY
    assert read.blocks >= 1
    if not case[1].startswith(("biased_attention", "attention_mass")):
        assert read.waiting == 0


def test_the_table_has_no_budget_for_what_is_not_there():
    budgets, _ = recorded()
    assert set(budgets) == set(CASES)


def test_every_family_has_rates():
    assert set(table()) == set(FAMILIES)


def test_a_spill_is_seen():
    """The check can fail: a tile too large for the registers has a stack."""
    launch = absorbed_launches(1024, 320, 8, 77, torch.float16, Card.typical("sm80"))[0]
    assert compile_ahead(replace(launch, constants={**launch.constants, "BLOCK_M": 256}), "sm80").stack > 0


def test_one_compilation_serves_all_batches_lengths_and_resolutions():
    """Neither a prompt's length within its bucket nor an image's size compiles another tile."""
    card = Card.typical("sm80")
    for make in (
        lambda queries, keys: absorbed_launches(queries, 320, 8, keys, torch.float16, card),
        lambda queries, keys: [biased_launch(queries, 8, 40, keys, torch.float16, card)],
        lambda queries, keys: [mass_launch(queries, 8, 40, keys, torch.float16, card)],
    ):
        kinds = {str([specialization(launch) for launch in make(*size)]) for size in ((9216, 77), (18432, 73))}
        assert len(kinds) == 1

"""Every Triton kernel compiled for every card family, without a card, within the budgets of benchmarks/budgets.md.

`MEMKERN_WRITE_BUDGETS=1 pytest -m aot` records what is used now.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: nothing to compile")

import triton

from memkern.ops.triton.ahead import SHARED_LIMITS, compile_ahead, specialization
from memkern.ops.triton.configs import Card, table
from memkern.ops.triton.layers import (
    CONTEXT_WIDTHS,
    KEYS,
    LAYERS,
    absorbed_launches,
    biased_launch,
    mass_launch,
    row_launches,
)

pytestmark = pytest.mark.aot

BUDGETS = Path(__file__).parents[1] / "benchmarks/budgets.md"
FAMILIES = list(table())
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ONE_KERNEL, TWO_KERNELS = 1, 1 << 30
"""Processors of a card that is always, and of one that is never, filled by one kernel's programs."""


def launches(family, dtype):
    """Label → launch, over the layers of SD 1.5, SD 2.1 and SDXL; both forms of absorbed attention."""
    found = {}
    card = Card(ONE_KERNEL, table()[family])
    for width in CONTEXT_WIDTHS.values():
        for launch in row_launches(width, dtype, card):
            found[label(launch)] = launch
    for layer in LAYERS:
        for keys in KEYS:
            launch = biased_launch(layer.queries, layer.heads, layer.head_dim, keys, dtype, card)
            found[label(launch, f"D={layer.head_dim}", f"n={keys}")] = launch
            launch = mass_launch(layer.queries, layer.heads, layer.head_dim, keys, dtype, card)
            found[label(launch, f"D={layer.head_dim}")] = launch
            for processors in (ONE_KERNEL, TWO_KERNELS):
                form = Card(processors, table()[family])
                for launch in absorbed_launches(layer.queries, layer.width, layer.heads, keys, dtype, form):
                    found[label(launch, f"C={layer.width}", f"n={keys}")] = launch
    return found


def label(launch, *sizes):
    return " ".join([launch.kernel.__name__.removesuffix("_kernel"), *sizes])


CASES = [(family, name, dtype) for family in FAMILIES for dtype in DTYPES for name in launches(family, DTYPES[dtype])]


def compiled(case):
    family, name, dtype = case
    return compile_ahead(launches(family, DTYPES[dtype])[name], int(family[2:]))


@pytest.fixture(scope="session")
def usages(tmp_path_factory):
    """Case → what it uses, compiled by a process per core; recorded if that is asked for."""
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    with ProcessPoolExecutor() as pool:
        found = dict(zip(CASES, pool.map(compiled, CASES, chunksize=8), strict=True))
    if os.environ.get("MEMKERN_WRITE_BUDGETS") == "1":
        BUDGETS.write_text(written(found), encoding="utf-8")
    return found


def written(found):
    """The table of budgets."""
    rows = {(name, dtype) for _, name, dtype in found}
    lines = [
        f"Registers per thread / shared memory per block (bytes) of each Triton kernel, by triton {triton.__version__}",
        "for a card of each family. The stack is 0 everywhere: nothing spills. `pytest -m aot` checks this table, and",
        "`MEMKERN_WRITE_BUDGETS=1 pytest -m aot` records it. Blank: the family has no such configuration.",
        "",
        f"| kernel | dtype | {' | '.join(FAMILIES)} |",
        f"| --- | --- |{' ---: |' * len(FAMILIES)}",
    ]
    for name, dtype in sorted(rows, key=lambda row: (row[0].split()[0], _sizes(row[0]), list(DTYPES).index(row[1]))):
        cells = [found.get((family, name, dtype)) for family in FAMILIES]
        texts = ["" if usage is None else f"{usage.registers} / {usage.shared}" for usage in cells]
        lines.append(f"| {name} | {dtype} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _sizes(name):
    return [int(part.split("=")[1]) for part in name.split()[1:]]


def recorded():
    """Case → (registers, shared) from the table, and the triton that it was recorded with."""
    text = BUDGETS.read_text(encoding="utf-8")
    version = text.split("triton ", 1)[1].split()[0]
    budgets = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 2 + len(FAMILIES) and "/" in line:
            for family, cell in zip(FAMILIES, cells[2:], strict=True):
                if cell:
                    budgets[family, cells[0], cells[1]] = tuple(map(int, cell.split("/")))
    return budgets, version


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case).replace(" ", "-"))
def test_within_budget(usages, case):
    budgets, version = recorded()
    usage = usages[case]
    assert usage.stack == 0, "registers spill to local memory"
    assert usage.shared <= SHARED_LIMITS[int(case[0][2:])]
    assert case in budgets, "no budget recorded"
    if version == triton.__version__:
        registers, shared = budgets[case]
        assert usage.registers <= registers
        assert usage.shared <= shared


def test_the_table_has_no_budget_for_what_is_not_there():
    budgets, _ = recorded()
    assert set(budgets) == set(CASES)


def test_a_spill_is_seen():
    """The check can fail: a tile too large for the registers has a stack."""
    launch = launches("sm80", torch.float16)["absorbed_attention C=320 n=77"]
    assert compile_ahead(replace(launch, constants={**launch.constants, "BLOCK_M": 128}), 80).stack > 0


def test_one_compilation_serves_all_batches_lengths_and_resolutions():
    """Neither a prompt's length within its bucket nor an image's size compiles a kernel anew."""
    card = Card(ONE_KERNEL, table()["sm80"])
    for make in (
        lambda queries, keys: absorbed_launches(queries, 320, 8, keys, torch.float16, card),
        lambda queries, keys: [biased_launch(queries, 8, 40, keys, torch.float16, card)],
        lambda queries, keys: [mass_launch(queries, 8, 40, keys, torch.float16, card)],
    ):
        kinds = {str([specialization(launch) for launch in make(*size)]) for size in ((4096, 77), (9216, 70), (64, 65))}
        assert len(kinds) == 1

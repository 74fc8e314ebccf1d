"""The reading of compiled kernels: products issued, loads that a main loop waits for, blocks per multiprocessor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: nothing to compile")

from memkern.ops.triton.ahead import Usage, review
from memkern.ops.triton.configs import Card, table
from memkern.ops.triton.layers import absorbed_launches, biased_launch
from memkern.ops.triton.listing import products, waiting_loads

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 };"
WGMMA = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r408};"


def test_products_are_of_a_warp_or_of_four():
    assert products(f"\tadd.s32 %r1, %r2;\n\t{MMA}\n\t{MMA}\n", 8) == 2 * 8 * 16 * 8 * 16
    assert products(f"\t{WGMMA}\n", 8) == 2 * 64 * 64 * 16


def test_a_product_that_is_not_understood_is_not_passed_by():
    with pytest.raises(ValueError, match="expected the shape of a product, got 'mma.sync"):
        products("mma.sync.aligned.unknown {};", 4)


def listing(*lines):
    return "\n".join(f"        /*{16 * index:04x}*/  {line} ;  /* 0x00 */" for index, line in enumerate(lines))


def test_loads_wait_in_a_loop_with_products_alone():
    loads = ["LDG.E.128 R4, [R2.64]", "LDGSTS.E.BYPASS.128 [R5], [R2.64]", "@!P1 LDG.E R8, [R6.64]"]
    product, back = "HMMA.16816.F32 R4, R4, R8, R12", "@P0 BRA 0x10"
    assert waiting_loads(listing("NOP", *loads, product, back)) == 2
    assert waiting_loads(listing("NOP", *loads, back)) == 0
    assert waiting_loads(listing(*loads, product, "EXIT")) == 0


@pytest.mark.parametrize(
    ("usage", "capability", "warps", "blocks"),
    [
        (Usage(230, 0, 12288), 80, 8, 1),
        (Usage(64, 0, 53248), 80, 4, 3),
        (Usage(32, 0, 0), 89, 8, 6),
        (Usage(255, 0, 300000), 90, 4, 0),
    ],
    ids=["registers", "shared memory", "warps", "too large"],
)
def test_blocks(usage, capability, warps, blocks):
    assert usage.blocks(capability, warps) == blocks


@pytest.mark.aot
def test_redundant_products_are_seen():
    """64 rows give 4 warps of `mma` one tile each; with 8 warps every product of this kernel is issued twice."""
    launch = biased_launch(256, 8, 160, 77, torch.float16, Card(1, table()["sm80"]))
    tile = 2 * 64 * 16 * 160  # q kᵀ and p v, BLOCK_M × BLOCK_N × D
    found = [review(replace(launch, options={"num_warps": w, "num_stages": 2}), 80).products for w in (4, 8)]
    assert found == [tile, 2 * tile]


@pytest.mark.aot
def test_loads_that_wait_are_seen():
    """Probabilities come by cp.async alone; values wait for theirs, behind the bias."""
    card = Card(1 << 30, table()["sm80"])
    first, second = absorbed_launches(1024, 640, 8, 77, torch.float16, card)
    assert review(first, 80).waiting == 0
    assert review(second, 80).waiting > 0

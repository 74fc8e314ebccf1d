"""The reading of compiled kernels: products issued, loads that a main loop waits for, blocks per multiprocessor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: nothing to compile")

from memkern.ops.triton.ahead import Usage, review, target_of
from memkern.ops.triton.configs import Card
from memkern.ops.triton.layers import absorbed_launches, biased_launch
from memkern.ops.triton.listing import may_wait, products, register_loads, waiting_loads, wanted_products

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 };"
WGMMA = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r408};"


def test_products_are_of_a_warp_or_of_four():
    assert products(f"\tadd.s32 %r1, %r2;\n\t{MMA}\n\t{MMA}\n", 8) == 2 * 8 * 16 * 8 * 16
    assert products(f"\t{WGMMA}\n", 8) == 2 * 64 * 64 * 16


def test_a_product_that_is_not_understood_is_not_passed_by():
    with pytest.raises(ValueError, match="expected the shape of a product, got 'mma.sync"):
        products("mma.sync.aligned.unknown {};", 4)


def test_products_that_are_asked_for():
    dot = (
        "%3 = tt.dot %1, %2, %0, inputPrecision = ieee : tensor<64x32xf16> * tensor<32x16xf16> -> tensor<64x16xf32> loc"
    )
    assert wanted_products(f"%0 = arith.constant 0\n{dot}\n{dot}\n") == 2 * 64 * 32 * 16


def listing(*lines):
    return "\n".join(f"        /*{16 * index:04x}*/  {line} ;  /* 0x00 */" for index, line in enumerate(lines))


LOADS = ["LDG.E.128 R4, [R2.64]", "LDGSTS.E.BYPASS.128 [R5], [R2.64]", "@!P1 LDG.E R8, [R6.64]"]
PRODUCT = "HMMA.16816.F32 R4, R4, R8, R12"


def test_loads_wait_in_a_loop_with_products_alone():
    back = "@P0 BRA 0x10"
    assert waiting_loads(listing("NOP", *LOADS, PRODUCT, back)) == 2
    assert waiting_loads(listing("NOP", *LOADS, back)) == 0
    assert waiting_loads(listing(*LOADS, PRODUCT, "EXIT")) == 0


def test_a_body_that_lies_behind_what_follows_it_is_no_loop():
    body = ["@P0 BRA 0x30", "STG.E [R2], R4", "EXIT", *LOADS, PRODUCT, "BRA 0x10"]
    assert waiting_loads(listing(*body)) == 0
    assert waiting_loads(listing(*body[:-1], "BRA 0x0")) == 2


LOOP = """
$L__BB0_1:
	FIRST
	@%p1 bra $L__BB0_3;
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 };
	@!%p2 ld.global.v4.b32 { %r1, %r2 }, [ %rd1 + 0 ];
	bra.uni $L__BB0_2;
$L__BB0_3:
	ret;
$L__BB0_2:
	LAST
"""


@pytest.mark.parametrize(
    ("first", "last", "waits"),
    [
        ("mov.b32 %r1, 0;", "bra.uni $L__BB0_1;", True),
        ("mov.b32 %r1, 0;", "bra.uni $L__BB0_3;", False),
        ("mov.b32 %r1, 0;", "ret;", False),
        ("@%p3 bra $L__BB0_3;", "@%p4 bra $L__BB0_1;", True),
    ],
    ids=["loop", "forward", "end", "two ways out"],
)
def test_loads_in_loops_of_ptx(first, last, waits):
    ptx = LOOP.replace("FIRST", first).replace("LAST", last)
    assert may_wait(ptx) == waits
    assert not may_wait(ptx.replace("ld.global", "cp.async.cg.shared.global"))
    assert not may_wait(ptx.replace("mma.sync.aligned.m16n8k16", "add"))


PIPELINED = """
tt.func public @kernel() {
  %0 = tt.load %a : tensor<64x!tt.ptr<f32>>
  %1 = ttg.async_copy_global_to_local %b, %c : tensor<64x64x!tt.ptr<f16>>
  %2 = scf.for %i = %x to %y step %z iter_args(%s = %t) -> (tensor<64x64xf32>) {
    INSIDE
    %5 = ttg.async_copy_global_to_local %b, %c : tensor<64x64x!tt.ptr<f16>>
    %6 = tt.dot %3, %4, %s : tensor<64x64xf16> * tensor<64x64xf16> -> tensor<64x64xf32>
  }
  tt.store %p, %2
}
"""


def test_loads_into_registers_within_a_loop():
    assert register_loads(PIPELINED) == 0
    assert register_loads(PIPELINED.replace("INSIDE", "%9 = tt.load %b : tensor<64x!tt.ptr<f32>>")) == 1
    inner = "%8 = scf.if %q -> () {\n %9 = tt.load %b\n } else {\n %7 = tt.load %b\n }"
    assert register_loads(PIPELINED.replace("INSIDE", inner)) == 2


@pytest.mark.parametrize(
    ("usage", "family", "warps", "blocks"),
    [
        (Usage(230, 0, 12288), "sm80", 8, 1),
        (Usage(64, 0, 53248), "sm80", 4, 3),
        (Usage(32, 0, 0), "sm89", 8, 6),
        (Usage(255, 0, 300000), "sm90", 4, 0),
    ],
    ids=["registers", "shared memory", "warps", "too large"],
)
def test_blocks(usage, family, warps, blocks):
    assert usage.blocks(family, warps) == blocks


@pytest.mark.parametrize(
    ("family", "target"),
    [("sm90", ("cuda", 90, 32)), ("gfx942", ("hip", "gfx942", 64)), ("gfx1100", ("hip", "gfx1100", 32))],
)
def test_targets(family, target):
    found = target_of(family)
    assert (found.backend, found.arch, found.warp_size) == target


@pytest.mark.aot
def test_redundant_products_are_seen():
    """64 rows give 4 warps of `mma` one tile each; with 8 warps every product of this kernel is issued twice."""
    launch = biased_launch(256, 8, 160, 77, torch.float16, Card.typical("sm80"))
    launch = replace(launch, constants={**launch.constants, "BLOCK_M": 64})
    found = [
        review(replace(launch, options={"num_warps": warps, "num_stages": 2}), Card.typical("sm80")).redundancy
        for warps in (4, 8)
    ]
    assert found == [1, 2]


@pytest.mark.aot
def test_loads_that_wait_are_seen():
    """Without stages nothing runs ahead: both operands of a turn are loaded when they are needed."""
    card = Card.typical("sm80")
    launch = absorbed_launches(1024, 640, 8, 77, torch.float16, card)[1]
    assert review(launch, card).waiting == 0
    assert review(replace(launch, options={**launch.options, "num_stages": 1}), card).waiting > 0


@pytest.mark.aot
def test_what_a_launch_fills_and_moves():
    card = Card.typical("sm90")
    launch = absorbed_launches(4096, 320, 8, 77, torch.float16, card)[1]
    found = review(launch, card)
    assert found.waves == launch.grid[0] * launch.grid[1] / (132 * found.blocks)
    rows, depth, columns = launch.constants["BLOCK_M"], 8 * 80, launch.constants["BLOCK_C"]
    assert found.through_l2 == launch.grid[0] * launch.grid[1] * 2 * ((rows + columns) * depth + rows * columns)

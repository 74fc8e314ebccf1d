"""edit_embeds: out[b, l] = scale[b, l] · rows[b, source[b, l]]."""

from __future__ import annotations

import pytest
import torch
from operators import LAYOUTS, ROWS, assert_accurate, overloads, poisoning, raising, random_plan, serving, with_dtypes

from memkern import ops

SHAPES = [(2, 77, 768), (3, 154, 40), (1, 77, 1), (5, 9, 33), (2, 77, 0), (0, 77, 64), (2, 0, 64)]


def sample(shape, dtype=torch.float32, bank_rows=0):
    batch, length, width = shape
    torch.manual_seed(1)
    embeds = torch.randn(shape).to(dtype)
    bank = torch.randn(batch, bank_rows, width).to(dtype) if bank_rows else None
    return embeds, bank, *random_plan(batch, length, max(1, length + bank_rows))


def by_hand(embeds, bank, source, scale):
    """The definition, one key at a time."""
    out = torch.empty_like(embeds)
    for b in range(embeds.shape[0]):
        rows = embeds[b] if bank is None else torch.cat([embeds[b], bank[b]])
        for position, (index, factor) in enumerate(zip(source[b].tolist(), scale[b], strict=True)):
            out[b, position] = 0 if factor == 0 else rows[index] * factor.to(embeds.dtype)
    return out


@pytest.mark.parametrize(("target", "dtype"), with_dtypes(ROWS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bank_rows", [0, 2])
def test_against_float64(target, dtype, shape, bank_rows):
    embeds, bank, source, scale = sample(shape, dtype, bank_rows)
    exact = by_hand(embeds.double(), None if bank is None else bank.double(), source, scale.double())
    actual = target(ops.edit_embeds, embeds, bank, source, scale)
    assert_accurate(actual, by_hand(embeds, bank, source, scale), exact)
    assert actual.is_contiguous()


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout):
    embeds, bank, source, scale = sample((3, 77, 40), bank_rows=3)
    expected = ops.edit_embeds(embeds, bank, source, scale, backend="torch")
    moved = [LAYOUTS[layout](target.put(tensor)) for tensor in (embeds, bank, source, scale)]
    actual = target(ops.edit_embeds, *moved)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("target", "dtype"), with_dtypes(ROWS))
def test_identity_is_bitwise_and_zero_selects(target, dtype):
    embeds, _, _, _ = sample((2, 77, 64), dtype)
    embeds[:, 4] = float("inf")
    source = torch.arange(77, dtype=torch.int32).repeat(2, 1)
    scale = torch.ones(2, 77)
    same = target(ops.edit_embeds, embeds, None, source, scale)
    assert torch.equal(same.view(torch.uint8), embeds.view(torch.uint8))
    embeds[:, 3] = float("nan")
    scale[:, 3:5] = 0
    cleaned = target(ops.edit_embeds, embeds, None, source, scale)
    assert torch.equal(cleaned[:, 3:5], torch.zeros_like(cleaned[:, 3:5]))
    assert cleaned.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_neighbouring_rows_moved_as_one_piece_end_where_they_should(layout):
    """Pieces end at a sequence's end, at the bank, at another scale, and where the next row is not the neighbour."""
    torch.manual_seed(0)
    embeds, bank = LAYOUTS[layout](torch.randn(3, 8, 5)), torch.randn(3, 4, 5)
    source = torch.tensor(
        [[0, 1, 2, 3, 4, 5, 0, 1], [2, 3, 6, 7, 8, 9, 10, 11], [7, 6, 2, 2, 3, 4, 7, 8]], dtype=torch.int32
    )
    for seed in range(20):
        scale = torch.randint(0, 3, (3, 8), generator=torch.Generator().manual_seed(seed)) / 2
        scale[:2] = 1 if seed < 2 else scale[:2]
        expected = by_hand(embeds, bank, source, scale)
        assert torch.equal(ops.edit_embeds(embeds, bank, source, scale), expected)


@pytest.mark.parametrize("target", raising(ROWS))
@pytest.mark.parametrize("bad", [-1, 79, 2**31 - 1])
def test_source_out_of_range(target, bad):
    embeds, bank, source, scale = sample((2, 77, 8), bank_rows=2)
    source[1, 5] = bad
    with pytest.raises((IndexError, RuntimeError), match=rf"source: index {bad} is out of range \[0, 79\)"):
        target(ops.edit_embeds, embeds, bank, source, scale)


@pytest.mark.parametrize("target", poisoning(ROWS))
@pytest.mark.parametrize("bad", [-1, 79, 2**31 - 1])
def test_source_out_of_range_gives_nan(target, bad):
    embeds, bank, source, scale = sample((2, 77, 8), bank_rows=2)
    expected = ops.edit_embeds(embeds, bank, source, scale, backend="torch")
    source[1, 5], expected[1, 5] = bad, float("nan")
    actual = target(ops.edit_embeds, embeds, bank, source, scale)
    assert torch.equal(actual.nan_to_num(nan=7), expected.nan_to_num(nan=7))


@pytest.mark.parametrize(("overload", "device"), overloads("edit_embeds"))
@pytest.mark.parametrize("bank_rows", [0, 2])
@pytest.mark.parametrize("wants_grad", [False, True])
def test_opcheck(overload, device, bank_rows, wants_grad):
    embeds, bank, source, scale = (
        None if tensor is None else tensor.to(device) for tensor in sample((2, 5, 8), bank_rows=bank_rows)
    )
    for move in LAYOUTS.values():
        leaf = move(embeds).detach().requires_grad_(wants_grad)
        torch.library.opcheck(overload, (leaf, bank, source, scale))


@pytest.mark.parametrize("target", serving(ROWS, torch.float64))
@pytest.mark.parametrize("bank_rows", [0, 2])
def test_gradcheck(target, bank_rows):
    embeds, bank, source, scale = sample((2, 5, 3), torch.float64, bank_rows)
    inputs = [tensor.requires_grad_() for tensor in (embeds, bank) if tensor is not None]

    def edited(embeds, bank=None):
        return target(ops.edit_embeds, embeds, bank, source, scale)

    assert torch.autograd.gradcheck(edited, inputs)


@pytest.mark.parametrize("target", ROWS)
def test_gradients(target):
    embeds, bank, source, scale = sample((2, 77, 8), bank_rows=2)
    grads = []
    for run in (target, lambda op, *arguments: op(*arguments, backend="torch")):
        leaves = [tensor.clone().requires_grad_() for tensor in (embeds, bank)]
        grads.append(torch.autograd.grad(run(ops.edit_embeds, *leaves, source, scale).square().sum(), leaves))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic, backend):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def edited(embeds, source, scale):
        return ops.edit_embeds(embeds * 2, None, source, scale, backend=backend)

    for length in (77, 154):
        embeds, _, source, scale = sample((2, length, 8))
        assert torch.equal(edited(embeds, source, scale), ops.edit_embeds(embeds * 2, None, source, scale))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_exports(backend):
    embeds, _, source, scale = sample((2, 77, 8))

    class Edited(torch.nn.Module):
        def forward(self, embeds, source, scale):
            return ops.edit_embeds(embeds, None, source, scale, backend=backend)

    exported = torch.export.export(Edited(), (embeds, source, scale))
    assert torch.equal(exported.module()(embeds, source, scale), ops.edit_embeds(embeds, None, source, scale))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeds": torch.zeros(2, 77)}, ValueError, r"embeds: expected shape \[B, L, D\], got \[2, 77\]"),
        ({"embeds": torch.zeros(2, 77, 8, dtype=torch.int64)}, TypeError, r"embeds: expected dtype .*got torch.int64"),
        ({"source": torch.zeros(2, 76, dtype=torch.int32)}, ValueError, r"source: expected shape \[2, 77\], got"),
        ({"source": torch.zeros(2, 77)}, TypeError, r"source: expected dtype torch.int32, got torch.float32"),
        ({"scale": torch.ones(2, 77).half()}, TypeError, r"scale: expected dtype torch.float32, got torch.float16"),
        ({"scale": torch.ones(2, 77, requires_grad=True)}, ValueError, r"scale: no gradient .*scale.detach\(\)"),
        ({"bank": torch.zeros(2, 1, 9)}, ValueError, r"bank: expected shape \[2, M, 8\], got \[2, 1, 9\]"),
        ({"bank": [1]}, TypeError, r"bank: expected a tensor \[2, M, 8\], got list"),
        ({"backend": "metal"}, ValueError, r"there is no backend 'metal'; use one of auto, cpp, cuda, triton, torch"),
        ({"scale": torch.ones(2, 77, device="meta")}, ValueError, r"scale: expected device cpu, got meta"),
    ],
)
def test_refusals(change, error, message):
    embeds, bank, source, scale = sample((2, 77, 8))
    arguments = {"embeds": embeds, "bank": bank, "source": source, "scale": scale, "backend": "auto"} | change
    with pytest.raises(error, match=message):
        ops.edit_embeds(**arguments)


def test_cpp_refuses_other_devices():
    embeds = torch.zeros(1, 2, 3, device="meta")
    source = torch.zeros(1, 2, dtype=torch.int32, device="meta")
    scale = torch.ones(1, 2, device="meta")
    with pytest.raises(ValueError, match="backend 'cpp' cannot run: cpp runs on CPU tensors, these are on meta"):
        ops.edit_embeds(embeds, None, source, scale, backend="cpp")

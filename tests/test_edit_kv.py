"""edit_kv: one source for K and V, a scale for each."""

from __future__ import annotations

import pytest
import torch
from operators import LAYOUTS, ROWS, assert_accurate, overloads, poisoning, raising, random_plan, serving, with_dtypes
from test_edit_embeds import by_hand

from memkern import ops

HEADS = 2


def sample(batch=2, length=77, width=16, dtype=torch.float32, bank_rows=0):
    torch.manual_seed(2)
    k, v = torch.randn(2, batch, length, width).to(dtype)
    banks = torch.randn(2, batch, bank_rows, width).to(dtype) if bank_rows else (None, None)
    source, k_scale = random_plan(batch, length, max(1, length + bank_rows))
    _, v_scale = random_plan(batch, length, 1, seed=3)
    return k, v, *banks, source, k_scale, v_scale


def double(tensor):
    return None if tensor is None else tensor.double()


@pytest.mark.parametrize(("target", "dtype"), with_dtypes(ROWS))
@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 160])
@pytest.mark.parametrize("bank_rows", [0, 2])
def test_against_float64(target, dtype, head_dim, bank_rows):
    k, v, k_bank, v_bank, source, k_scale, v_scale = sample(2, 77, HEADS * head_dim, dtype, bank_rows)
    actual = target(ops.edit_kv, k, v, k_bank, v_bank, source, k_scale, v_scale)
    for out, rows, bank, scale in zip(actual, (k, v), (k_bank, v_bank), (k_scale, v_scale), strict=True):
        exact = by_hand(rows.double(), double(bank), source, scale.double())
        assert_accurate(out, by_hand(rows, bank, source, scale), exact)


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("shape", [(0, 77, 16), (2, 0, 16), (2, 77, 0), (1, 3, 1)], ids=str)
def test_small_and_empty(target, shape):
    k, v, *_, source, k_scale, v_scale = sample(*shape)
    outs = target(ops.edit_kv, k, v, None, None, source, k_scale, v_scale)
    for out, rows, scale in zip(outs, (k, v), (k_scale, v_scale), strict=True):
        torch.testing.assert_close(out, by_hand(rows, None, source, scale))


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout):
    arguments = sample(bank_rows=3)
    expected = ops.edit_kv(*arguments, backend="torch")
    actual = target(ops.edit_kv, *(LAYOUTS[layout](target.put(tensor)) for tensor in arguments))
    for out, right in zip(actual, expected, strict=True):
        assert torch.equal(out, right)


@pytest.mark.parametrize("target", ROWS)
def test_zero_selects_in_k_and_v_apart(target):
    k, v, *_ = sample()
    k[:, 2], v[:, 3] = float("nan"), float("inf")
    source = torch.arange(77, dtype=torch.int32).repeat(2, 1)
    k_scale, v_scale = torch.ones(2, 2, 77)
    k_scale[:, 2], v_scale[:, 3] = 0, 0
    k_out, v_out = target(ops.edit_kv, k, v, None, None, source, k_scale, v_scale)
    assert k_out.isfinite().all()
    assert v_out.isfinite().all()
    assert torch.equal(k_out[:, 3], k[:, 3])
    assert torch.equal(v_out[:, 2], v[:, 2])


@pytest.mark.parametrize("target", ROWS)
def test_zeroed_key_is_a_zeroed_embedding(target):
    """Editing K and V is editing the embeddings if to_k and to_v have no bias."""
    torch.manual_seed(0)
    embeds, to_k, to_v = torch.randn(2, 77, 24), torch.randn(24, 16), torch.randn(24, 16)
    source, scale = random_plan(2, 77, 77)
    scale = (scale != 0).float()
    edited = target(ops.edit_embeds, embeds, None, source, scale)
    k, v = target(ops.edit_kv, embeds @ to_k, embeds @ to_v, None, None, source, scale, scale)
    torch.testing.assert_close(k, edited @ to_k)
    torch.testing.assert_close(v, edited @ to_v)


@pytest.mark.parametrize("target", raising(ROWS))
@pytest.mark.parametrize("bad", [-2, 77])
def test_source_out_of_range(target, bad):
    arguments = sample()
    arguments[4][0, 76] = bad
    with pytest.raises((IndexError, RuntimeError), match=rf"source: index {bad} is out of range \[0, 77\)"):
        target(ops.edit_kv, *arguments)


@pytest.mark.parametrize("target", poisoning(ROWS))
@pytest.mark.parametrize("bad", [-2, 77])
def test_source_out_of_range_gives_nan(target, bad):
    arguments = sample()
    expected = ops.edit_kv(*arguments, backend="torch")
    arguments[4][0, 76] = bad
    for out, right in zip(target(ops.edit_kv, *arguments), expected, strict=True):
        right[0, 76] = float("nan")
        assert torch.equal(out.nan_to_num(nan=7), right.nan_to_num(nan=7))


@pytest.mark.parametrize(("overload", "device"), overloads("edit_kv"))
@pytest.mark.parametrize("bank_rows", [0, 2])
@pytest.mark.parametrize("wants_grad", [False, True])
def test_opcheck(overload, device, bank_rows, wants_grad):
    k, v, *rest = (None if tensor is None else tensor.to(device) for tensor in sample(2, 5, 8, bank_rows=bank_rows))
    for move in LAYOUTS.values():
        leaves = [move(tensor).detach().requires_grad_(wants_grad) for tensor in (k, v)]
        torch.library.opcheck(overload, (*leaves, *rest))


@pytest.mark.parametrize("target", serving(ROWS, torch.float64))
@pytest.mark.parametrize("bank_rows", [0, 2])
def test_gradcheck(target, bank_rows):
    k, v, k_bank, v_bank, *plan = sample(2, 4, 3, torch.float64, bank_rows)
    inputs = [tensor.requires_grad_() for tensor in (k, v, k_bank, v_bank) if tensor is not None]

    def edited(k, v, k_bank=None, v_bank=None):
        return target(ops.edit_kv, k, v, k_bank, v_bank, *plan)

    assert torch.autograd.gradcheck(edited, inputs)


@pytest.mark.parametrize("target", ROWS)
def test_gradients(target):
    *rows, source, k_scale, v_scale = sample(bank_rows=2)
    grads = []
    for run in (target, lambda op, *arguments: op(*arguments, backend="torch")):
        leaves = [tensor.clone().requires_grad_() for tensor in rows]
        k, v = run(ops.edit_kv, *leaves, source, k_scale, v_scale)
        grads.append(torch.autograd.grad((k * v).square().sum(), leaves))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiles_into_one_graph(backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def edited(*arguments):
        return ops.edit_kv(*arguments, backend=backend)

    arguments = sample(bank_rows=2)
    for out, right in zip(edited(*arguments), ops.edit_kv(*arguments), strict=True):
        assert torch.equal(out, right)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": torch.zeros(2, 77, 15)}, ValueError, r"v: expected shape \[2, 77, 16\], got \[2, 77, 15\]"),
        ({"v": torch.zeros(2, 77, 16).half()}, TypeError, r"v: expected dtype torch.float32, got torch.float16"),
        ({"k_bank": torch.zeros(2, 1, 16)}, ValueError, "k_bank, v_bank: expected both or neither"),
        ({"source": torch.zeros(2, 77, dtype=torch.int64)}, TypeError, "source: expected dtype torch.int32"),
        ({"k_scale": torch.ones(1, 77)}, ValueError, r"k_scale: expected shape \[2, 77\], got \[1, 77\]"),
        ({"v_scale": torch.ones(2, 77, requires_grad=True)}, ValueError, "v_scale: no gradient is defined"),
    ],
)
def test_refusals(change, error, message):
    names = ("k", "v", "k_bank", "v_bank", "source", "k_scale", "v_scale")
    with pytest.raises(error, match=message):
        ops.edit_kv(**dict(zip(names, sample(), strict=True)) | change)

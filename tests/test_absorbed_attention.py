"""absorbed_attention: Σ over heads of softmax(x aᵀ + bias) vo, plus what follows the heads."""

from __future__ import annotations

import math

import pytest
import torch
from operators import (
    INSTRUCTION_SETS,
    LAYOUTS,
    PRODUCTS,
    assert_accurate,
    needs_cpp,
    on_instruction_set,
    overloads,
    with_dtypes,
)

from memkern import ops

SHAPES = [(2, 33, 40, 2, 77), (1, 7, 8, 3, 1), (2, 65, 320, 2, 33), (1, 3, 33, 1, 5), (1, 9, 96, 2, 154)]
EMPTY = [(0, 5, 8, 2, 7), (2, 0, 8, 2, 7), (2, 5, 0, 2, 7), (2, 5, 8, 2, 0)]


def sample(batch, queries, width, heads, keys, dtype=torch.float32, per_head=False, extras=True):
    """Keys excluded at the end of the first sequence and inside of the last; logits of the size of attention's."""
    torch.manual_seed(6)
    x = torch.randn(batch, queries, width).to(dtype)
    a = (torch.randn(batch, heads, keys, width) / max(1, width) ** 0.5).to(dtype)
    vo = (torch.randn(batch, heads, keys, width) / max(1, heads) ** 0.5).to(dtype)
    bias = torch.randn(batch, heads, keys) if per_head else torch.randn(batch, keys)
    if batch and keys > 2:
        bias[0, ..., keys // 3 :] = -math.inf
        bias[-1, ..., 1] = -math.inf
    out_bias = torch.randn(width).to(dtype) if extras else None
    residual = torch.randn(batch, queries, width).to(dtype) if extras else None
    return x, a, bias, vo, out_bias, residual


def by_hand(x, a, bias, vo, out_bias=None, residual=None):
    """The definition in the dtype of the tensors, excluded keys taken out one sequence and head at a time."""
    rows = []
    for b in range(x.shape[0]):
        total = torch.zeros_like(x[b])
        for h in range(a.shape[1]):
            row = bias[b] if bias.dim() == 2 else bias[b, h]
            kept = row != -math.inf
            if kept.any():
                p = (x[b] @ a[b, h, kept].mT + row[kept].to(x.dtype)).softmax(-1)
                total = total + p @ vo[b, h, kept]
        rows.append(total)
    out = torch.stack(rows) if rows else torch.zeros_like(x)
    for extra in (out_bias, residual):
        out = out if extra is None else out + extra
    return out


def exactly(*tensors):
    return by_hand(*(None if tensor is None else tensor.double() for tensor in tensors))


@pytest.mark.parametrize(("target", "dtype"), with_dtypes(PRODUCTS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_against_float64(target, dtype, shape, per_head, extras):
    arguments = sample(*shape, dtype, per_head, extras)
    actual = target(ops.absorbed_attention, *arguments)
    assert_accurate(actual, by_hand(*arguments), exactly(*arguments))
    assert actual.is_contiguous()


@pytest.mark.parametrize("target", PRODUCTS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(target, shape):
    x, a, bias, vo, out_bias, residual = sample(*shape)
    out = target(ops.absorbed_attention, x, a, bias, vo, out_bias, residual)
    torch.testing.assert_close(out, (out_bias + residual).expand_as(x))


@pytest.mark.parametrize("target", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout):
    *tensors, out_bias, residual = sample(3, 9, 16, 2, 11)
    expected = ops.absorbed_attention(*tensors, out_bias, residual, backend="torch")
    *moved, moved_residual = [LAYOUTS[layout](target.put(tensor)) for tensor in (*tensors, residual)]
    actual = target(ops.absorbed_attention, *moved, out_bias, moved_residual)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("target", PRODUCTS)
def test_is_a_cross_attention_layer(target):
    """a and vo made from a layer's weights give what the layer gives."""
    torch.manual_seed(0)
    batch, queries, keys, width, heads, context_width = 2, 33, 11, 48, 3, 20
    head_dim = width // heads
    x, context = torch.randn(batch, queries, width), torch.randn(batch, keys, context_width)
    to_q, to_o = torch.randn(2, width, width) / 7
    to_k, to_v = torch.randn(2, width, context_width) / 4
    out_bias = torch.randn(width)
    q, k, v = (
        rows.unflatten(-1, (heads, head_dim)).transpose(1, 2)
        for rows in (x @ to_q.mT, context @ to_k.mT, context @ to_v.mT)
    )
    layer = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ to_o.mT + out_bias
    a = k @ to_q.unflatten(0, (heads, head_dim)) * head_dim**-0.5
    vo = v @ to_o.unflatten(1, (heads, head_dim)).permute(1, 2, 0)
    out = target(ops.absorbed_attention, x, a, torch.zeros(batch, keys), vo, out_bias, None)
    torch.testing.assert_close(out, layer, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", PRODUCTS)
def test_excluded_keys_are_not_used(target):
    """Neither a NaN in a nor one in vo of an excluded key survives."""
    x, a, bias, vo, *extras = sample(2, 9, 16, 2, 40)
    expected = target(ops.absorbed_attention, x, a, bias, vo, *extras)
    for rows in (a, vo):
        rows[0, :, 13:], rows[1, :, 1] = float("nan"), float("inf")
    assert torch.equal(target(ops.absorbed_attention, x, a, bias, vo, *extras), expected)


@pytest.mark.parametrize("target", PRODUCTS)
def test_a_promise_that_is_kept_changes_nothing(target):
    x, a, bias, vo, out_bias, residual = sample(2, 9, 16, 2, 11)
    vo = vo.masked_fill((bias == -math.inf)[:, None, :, None], 0)
    expected = ops.absorbed_attention(x, a, bias, vo, out_bias, residual, backend="torch")
    given = [target.put(tensor) for tensor in (x, a, bias, vo, out_bias, residual)]
    actual = ops.absorbed_attention(*given, zeroed=True, backend=target.backend)
    torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("target", PRODUCTS)
def test_a_row_without_keys_keeps_what_follows(target):
    x, a, bias, vo, out_bias, residual = sample(2, 9, 16, 2, 40)
    bias[0] = -math.inf
    out = target(ops.absorbed_attention, x, a, bias, vo, out_bias, residual)
    torch.testing.assert_close(out[0], out_bias + residual[0])
    torch.testing.assert_close(out, by_hand(x, a, bias, vo, out_bias, residual))


@pytest.mark.parametrize(("overload", "device"), overloads("absorbed_attention"))
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("wants_grad", [False, True])
def test_opcheck(overload, device, extras, wants_grad):
    leaves = [
        None if tensor is None else tensor.to(device).requires_grad_(wants_grad)
        for tensor in sample(2, 5, 8, 2, 7, extras=extras)
    ]
    torch.library.opcheck(overload, tuple(leaves))


@pytest.mark.parametrize("extras", [False, True])
def test_gradcheck(extras):
    x, a, bias, vo, *more = sample(2, 3, 4, 2, 5, torch.float64, extras=extras)
    leaves = [tensor.requires_grad_() for tensor in (x, a, vo, *more) if tensor is not None]
    assert torch.autograd.gradcheck(lambda x, a, vo, *more: ops.absorbed_attention(x, a, bias, vo, *more), leaves)


@pytest.mark.parametrize("target", PRODUCTS)
@pytest.mark.parametrize("per_head", [False, True])
def test_gradients(target, per_head):
    """The gradients of every tensor, bias included, against autograd through the definition."""
    tensors = sample(2, 9, 16, 2, 7, per_head=per_head)
    grads = []
    for run in (lambda *arguments: target(ops.absorbed_attention, *arguments), by_hand):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        grads.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiles_into_one_graph(backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def attended(*arguments):
        return ops.absorbed_attention(*arguments, backend=backend)

    arguments = sample(2, 9, 16, 2, 7)
    torch.testing.assert_close(attended(*arguments), ops.absorbed_attention(*arguments))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(9, 16)}, ValueError, r"x: expected shape \[B, N, C\], got \[9, 16\]"),
        ({"a": torch.zeros(2, 2, 7, 8)}, ValueError, r"a: expected shape \[2, H, n, 16\], got \[2, 2, 7, 8\]"),
        ({"vo": torch.zeros(2, 2, 6, 16)}, ValueError, r"vo: expected shape \[2, 2, 7, 16\], got \[2, 2, 6, 16\]"),
        ({"a": torch.zeros(2, 2, 7, 16).half()}, TypeError, "a: expected dtype torch.float32, got torch.float16"),
        ({"bias": torch.zeros(1, 7)}, ValueError, r"bias: expected shape \[2, 7\], got \[1, 7\]"),
        ({"out_bias": torch.zeros(15)}, ValueError, r"out_bias: expected shape \[16\], got \[15\]"),
        ({"residual": torch.zeros(2, 9, 15)}, ValueError, r"residual: expected shape \[2, 9, 16\], got"),
        ({"residual": torch.zeros(2, 9, 16, device="meta")}, ValueError, "residual: expected device cpu, got meta"),
    ],
)
def test_refusals(change, error, message):
    names = ("x", "a", "bias", "vo", "out_bias", "residual")
    arguments = dict(zip(names, sample(2, 9, 16, 2, 7), strict=True))
    with pytest.raises(error, match=message):
        ops.absorbed_attention(**arguments | change)


@needs_cpp
@pytest.mark.parametrize("capability", INSTRUCTION_SETS)
def test_older_instruction_sets(capability, tmp_path):
    arguments = sample(2, 33, 40, 2, 77, per_head=True)
    out = on_instruction_set(capability, "absorbed_attention", arguments, tmp_path)
    assert_accurate(out, by_hand(*arguments), exactly(*arguments))

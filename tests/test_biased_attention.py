"""biased_attention: softmax(q kᵀ · scale + bias) v, with -inf for excluded keys."""

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

SHAPES = [(2, 2, 33, 77), (1, 3, 7, 1), (3, 1, 64, 16), (1, 2, 65, 154)]
EMPTY = [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)]


def sample(batch, heads, queries, keys, width=40, dtype=torch.float32, per_head=False):
    """Keys excluded at the end of the first sequence and inside of the last."""
    torch.manual_seed(5)
    q = torch.randn(batch, heads, queries, width).to(dtype)
    k, v = torch.randn(2, batch, heads, keys, width).to(dtype)
    bias = torch.randn(batch, heads, keys) if per_head else torch.randn(batch, keys)
    if batch and keys > 2:
        bias[0, ..., keys // 2 :] = -math.inf
        bias[-1, ..., 1] = -math.inf
    return q, k, v, bias, width**-0.5


def by_hand(q, k, v, bias, scale):
    """The definition in the dtype of the tensors, excluded keys taken out one sequence and head at a time."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            row = bias[b] if bias.dim() == 2 else bias[b, h]
            kept = row != -math.inf
            if kept.any():
                logits = q[b, h] @ k[b, h, kept].mT * scale + row[kept].to(q.dtype)
                out[b, h] = logits.softmax(-1) @ v[b, h, kept]
    return out


def exactly(q, k, v, bias, scale):
    return by_hand(q.double(), k.double(), v.double(), bias.double(), scale)


@pytest.mark.parametrize(("target", "dtype"), with_dtypes(PRODUCTS))
@pytest.mark.parametrize("width", [8, 40, 64, 80, 160, 256])
def test_head_dims_against_float64(target, dtype, width):
    arguments = sample(2, 2, 33, 21, width, dtype)
    assert_accurate(target(ops.biased_attention, *arguments), by_hand(*arguments), exactly(*arguments))


@pytest.mark.parametrize(("target", "dtype"), with_dtypes(PRODUCTS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_shapes_against_float64(target, dtype, shape, per_head):
    arguments = sample(*shape, dtype=dtype, per_head=per_head)
    assert_accurate(target(ops.biased_attention, *arguments), by_hand(*arguments), exactly(*arguments))


@pytest.mark.parametrize("target", PRODUCTS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(target, shape):
    q, *rest = sample(*shape)
    assert torch.equal(target(ops.biased_attention, q, *rest), torch.zeros_like(q))


@pytest.mark.parametrize("target", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout):
    *tensors, scale = sample(3, 2, 9, 11)
    expected = ops.biased_attention(*tensors, scale, backend="torch")
    moved = [LAYOUTS[layout](target.put(tensor)) for tensor in tensors]
    torch.testing.assert_close(target(ops.biased_attention, *moved, scale), expected)


@pytest.mark.parametrize("target", PRODUCTS)
def test_heads_merge_without_a_copy(target):
    q, *rest = map(target.put, sample(2, 2, 9, 7))
    out = ops.biased_attention(q, *rest, backend=target.backend)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("target", PRODUCTS)
def test_excluded_keys_are_not_used(target):
    """Neither a NaN in k nor one in v of an excluded key survives."""
    q, k, v, bias, scale = sample(2, 2, 9, 40)
    expected = target(ops.biased_attention, q, k, v, bias, scale)
    for rows in (k, v):
        rows[0, :, 20:], rows[1, :, 1] = float("nan"), float("inf")
    assert torch.equal(target(ops.biased_attention, q, k, v, bias, scale), expected)


@pytest.mark.parametrize("target", PRODUCTS)
def test_a_row_without_keys_is_zero(target):
    q, k, v, bias, scale = sample(2, 2, 9, 40)
    bias[0] = -math.inf
    out = target(ops.biased_attention, q, k, v, bias, scale)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].isfinite().all()
    assert (out[1] != 0).all()


@pytest.mark.parametrize("target", PRODUCTS)
def test_equal_keys_are_one_key_with_log_m(target):
    """The identity that coalescing rests on."""
    q, k, v, _, scale = sample(1, 2, 9, 12)
    k[:, :, 4:], v[:, :, 4:] = k[:, :, 4:5], v[:, :, 4:5]
    full = target(ops.biased_attention, q, k, v, torch.zeros(1, 12), scale)
    bias = torch.tensor([[0, 0, 0, 0, math.log(8)]])
    few = target(ops.biased_attention, q, k[:, :, :5], v[:, :, :5], bias, scale)
    torch.testing.assert_close(few, full)


@pytest.mark.parametrize("target", PRODUCTS)
def test_large_logits(target):
    """Nothing overflows, and a row that all but one key loses has that key's value."""
    q, k, v, bias, scale = sample(1, 1, 5, 33)
    bias[:] = -1e30
    bias[0, 32] = 3e38
    assert torch.equal(target(ops.biased_attention, q, k, v, bias, scale), v[:, :, 32:].expand(1, 1, 5, 40))
    lowest = torch.full_like(bias, torch.finfo(torch.float32).min)
    everywhere = target(ops.biased_attention, q, k, v, lowest, 0.0)
    torch.testing.assert_close(everywhere, v.mean(2, keepdim=True).expand(1, 1, 5, 40))
    out = target(ops.biased_attention, q * 1e4, k * 1e4, v, torch.zeros_like(bias), scale)
    assert out.isfinite().all()


@pytest.mark.parametrize(("overload", "device"), overloads("biased_attention"))
@pytest.mark.parametrize("wants_grad", [False, True])
def test_opcheck(overload, device, wants_grad):
    *tensors, scale = sample(2, 2, 5, 7, 8)
    leaves = [tensor.to(device).requires_grad_(wants_grad) for tensor in tensors]
    torch.library.opcheck(overload, (*leaves, scale))


@pytest.mark.parametrize("per_head", [False, True])
def test_gradcheck(per_head):
    q, k, v, bias, scale = sample(2, 2, 3, 5, 4, torch.float64, per_head)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *rows: ops.biased_attention(*rows, bias, scale), leaves)


@pytest.mark.parametrize("target", PRODUCTS)
@pytest.mark.parametrize("per_head", [False, True])
def test_gradients(target, per_head):
    """The gradients of q, k, v and bias, against autograd through the definition."""
    *tensors, scale = sample(2, 2, 9, 7, per_head=per_head)
    grads = []
    for run in (lambda *arguments: target(ops.biased_attention, *arguments), by_hand):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        grads.append(torch.autograd.grad(run(*leaves, scale).square().sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiles_into_one_graph(backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def attended(*arguments):
        return ops.biased_attention(*arguments, backend=backend)

    arguments = sample(2, 2, 9, 7)
    torch.testing.assert_close(attended(*arguments), ops.biased_attention(*arguments))


def test_scale_defaults_to_the_head_dims():
    *tensors, scale = sample(2, 2, 9, 7)
    assert torch.equal(ops.biased_attention(*tensors), ops.biased_attention(*tensors, scale))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 9, 40)}, ValueError, r"q: expected shape \[B, H, N, D\], got \[2, 9, 40\]"),
        ({"k": torch.zeros(2, 3, 7, 40)}, ValueError, r"k: expected shape \[2, 2, n, 40\], got \[2, 3, 7, 40\]"),
        ({"v": torch.zeros(2, 2, 8, 40)}, ValueError, r"v: expected shape \[2, 2, 7, 40\], got \[2, 2, 8, 40\]"),
        ({"v": torch.zeros(2, 2, 7, 40).half()}, TypeError, "v: expected dtype torch.float32, got torch.float16"),
        ({"bias": torch.zeros(2, 8)}, ValueError, r"bias: expected shape \[2, 7\], got \[2, 8\]"),
        ({"bias": torch.zeros(2, 1, 7)}, ValueError, r"bias: expected shape \[2, 2, 7\], got \[2, 1, 7\]"),
        ({"bias": torch.zeros(2, 7).bool()}, TypeError, "bias: expected dtype torch.float32, got torch.bool"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot run: .*cuda has no biased_attention"),
    ],
)
def test_refusals(change, error, message):
    arguments = dict(zip(("q", "k", "v", "bias", "scale"), sample(2, 2, 9, 7), strict=True))
    with pytest.raises(error, match=message):
        ops.biased_attention(**arguments | change)


@needs_cpp
@pytest.mark.parametrize("capability", INSTRUCTION_SETS)
def test_older_instruction_sets(capability, tmp_path):
    arguments = sample(2, 3, 37, 77, width=40)
    out = on_instruction_set(capability, "biased_attention", arguments, tmp_path)
    assert_accurate(out, by_hand(*arguments), exactly(*arguments))

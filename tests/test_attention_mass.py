"""attention_mass: the mean over queries of softmax(q kᵀ · scale + bias), and what chosen keys get of each query."""

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
from test_biased_attention import sample as attention_sample

from memkern import ops

SHAPES = [(2, 2, 33, 77), (1, 3, 7, 1), (3, 1, 64, 16), (1, 2, 65, 154), (1, 1, 3, 300)]
EMPTY = [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)]


def sample(batch, heads, queries, keys, width=40, dtype=torch.float32, per_head=False):
    q, k, _, bias, scale = attention_sample(batch, heads, queries, keys, width, dtype, per_head)
    return q, k, bias, torch.rand(batch, keys), scale


def by_hand(q, k, bias, weight, scale):
    """The definition in float32, or in float64, from products in the dtype of the tensors."""
    wide = torch.promote_types(q.dtype, torch.float32)
    by_key = torch.zeros(k.shape[:3], dtype=wide)
    by_query = torch.zeros(q.shape[:3], dtype=wide)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            row = bias[b] if bias.dim() == 2 else bias[b, h]
            kept = row != -math.inf
            if kept.any():
                p = ((q[b, h] @ k[b, h, kept].mT).to(wide) * scale + row[kept]).softmax(-1)
                by_key[b, h, kept] = p.mean(0)
                by_query[b, h] = p @ weight[b, kept].to(wide)
    return by_key, by_query


def exactly(q, k, bias, weight, scale):
    return by_hand(q.double(), k.double(), bias.double(), weight.double(), scale)


def check(target, arguments):
    found = target(ops.attention_mass, *arguments)
    for ours, plain, exact in zip(found, by_hand(*arguments), exactly(*arguments), strict=True):
        assert_accurate(ours, plain, exact)


@pytest.mark.parametrize(("target", "dtype"), with_dtypes(PRODUCTS))
@pytest.mark.parametrize("width", [8, 40, 64, 80, 160, 256])
def test_head_dims_against_float64(target, dtype, width):
    check(target, sample(2, 2, 33, 21, width, dtype))


@pytest.mark.parametrize(("target", "dtype"), with_dtypes(PRODUCTS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_shapes_against_float64(target, dtype, shape, per_head):
    check(target, sample(*shape, dtype=dtype, per_head=per_head))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_more_queries_than_are_held_at_once(backend):
    arguments = sample(2, 4, 2500, 77, 8)
    found = ops.attention_mass(*arguments, backend=backend)
    for ours, plain, exact in zip(found, by_hand(*arguments), exactly(*arguments), strict=True):
        assert_accurate(ours, plain, exact)


@needs_cpp
@pytest.mark.parametrize("capability", INSTRUCTION_SETS)
def test_older_instruction_sets(capability, tmp_path):
    arguments = sample(2, 3, 37, 77)
    found = on_instruction_set(capability, "attention_mass", arguments, tmp_path)
    for ours, plain, exact in zip(found, by_hand(*arguments), exactly(*arguments), strict=True):
        assert_accurate(ours, plain, exact)


@pytest.mark.parametrize("target", PRODUCTS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(target, shape):
    batch, heads, queries, keys = shape
    by_key, by_query = target(ops.attention_mass, *sample(*shape))
    assert torch.equal(by_key, torch.zeros(batch, heads, keys))
    assert torch.equal(by_query, torch.zeros(batch, heads, queries))


@pytest.mark.parametrize("target", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout):
    *tensors, scale = sample(3, 2, 9, 11)
    expected = ops.attention_mass(*tensors, scale, backend="torch")
    moved = [LAYOUTS[layout](target.put(tensor)) for tensor in tensors]
    torch.testing.assert_close(target(ops.attention_mass, *moved, scale), expected)


@pytest.mark.parametrize("target", PRODUCTS)
def test_all_of_the_mass_is_given_out(target):
    q, k, bias, _, scale = sample(2, 3, 33, 77)
    by_key, by_query = target(ops.attention_mass, q, k, bias, torch.ones(2, 77), scale)
    torch.testing.assert_close(by_key.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(by_query, torch.ones(2, 3, 33))


@pytest.mark.parametrize("target", PRODUCTS)
def test_excluded_keys_are_not_used(target):
    """A NaN in k of an excluded key does not survive."""
    q, k, bias, weight, scale = sample(2, 2, 9, 40)
    expected = target(ops.attention_mass, q, k, bias, weight, scale)
    assert (expected[0][0, :, 20:] == 0).all()
    k[0, :, 20:], k[1, :, 1] = float("nan"), float("inf")
    for ours, theirs in zip(target(ops.attention_mass, q, k, bias, weight, scale), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("target", PRODUCTS)
def test_a_row_without_keys_attends_to_nothing(target):
    q, k, bias, weight, scale = sample(2, 2, 9, 40)
    bias[0] = -math.inf
    by_key, by_query = target(ops.attention_mass, q, k, bias, weight, scale)
    assert not by_key[0].any()
    assert not by_query[0].any()
    torch.testing.assert_close(by_key[1].sum(-1), torch.ones(2))


@pytest.mark.parametrize("target", PRODUCTS)
def test_large_logits(target):
    q, k, bias, weight, scale = sample(1, 1, 5, 33)
    bias[:] = -1e30
    bias[0, 32] = 3e38
    by_key, by_query = target(ops.attention_mass, q, k, bias, weight, scale)
    assert torch.equal(by_key[0, 0], torch.eye(33)[32])
    assert torch.equal(by_query, weight[0, 32].expand(1, 1, 5))


@pytest.mark.parametrize(("overload", "device"), overloads("attention_mass"))
@pytest.mark.parametrize("wants_grad", [False, True])
def test_opcheck(overload, device, wants_grad):
    *tensors, scale = sample(2, 2, 5, 7, 8)
    leaves = [tensor.to(device).requires_grad_(wants_grad) for tensor in tensors]
    torch.library.opcheck(overload, (*leaves, scale))


@pytest.mark.parametrize("per_head", [False, True])
def test_gradcheck(per_head):
    """Gradients in q and k, in float64; those in bias and weight, in float32, are checked by the test below."""
    q, k, bias, weight, scale = sample(2, 2, 4, 5, 3, torch.float64, per_head)
    leaves = q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: ops.attention_mass(q, k, bias, weight, scale), leaves)


@pytest.mark.parametrize("target", PRODUCTS)
@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_are_those_of_the_definition(target, per_head):
    *tensors, scale = sample(2, 2, 9, 7, per_head=per_head)
    grads = []
    for run in (lambda *arguments: target(ops.attention_mass, *arguments), by_hand):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        by_key, by_query = run(*leaves, scale)
        grads.append(torch.autograd.grad(by_key.square().sum() + by_query.pow(3).sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiles_into_one_graph(backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def masses(*arguments):
        return ops.attention_mass(*arguments, backend=backend)

    arguments = sample(2, 2, 9, 7)
    torch.testing.assert_close(masses(*arguments), ops.attention_mass(*arguments))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 9, 40)}, ValueError, r"q: expected shape \[B, H, N, D\], got \[2, 9, 40\]"),
        ({"k": torch.zeros(2, 2, 7, 40).half()}, TypeError, "k: expected dtype torch.float32, got torch.float16"),
        ({"bias": torch.zeros(2, 8)}, ValueError, r"bias: expected shape \[2, 7\], got \[2, 8\]"),
        ({"weight": torch.zeros(2, 2, 7)}, ValueError, r"weight: expected shape \[2, 7\], got \[2, 2, 7\]"),
        ({"weight": torch.zeros(2, 7).bool()}, TypeError, "weight: expected dtype torch.float32, got torch.bool"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot run: .*cuda has no attention_mass"),
    ],
)
def test_refusals(change, error, message):
    arguments = dict(zip(("q", "k", "bias", "weight", "scale"), sample(2, 2, 9, 7), strict=True))
    with pytest.raises(error, match=message):
        ops.attention_mass(**arguments | change)


@needs_cpp
@pytest.mark.parametrize("capability", INSTRUCTION_SETS)
def test_weights_are_exact_to_roundings(capability, tmp_path):
    """One query's mean is the softmax itself: against its first weight, exp shows, from 1 down to e^-20."""
    k = -torch.linspace(0, 20, 4001).view(1, 1, -1, 1)
    arguments = torch.ones(1, 1, 1, 1), k, torch.zeros(1, 4001), torch.zeros(1, 4001), 1.0
    by_key, _ = on_instruction_set(capability, "attention_mass", arguments, tmp_path)
    weights = by_key.flatten().double()
    exact = k.double().flatten().exp()
    assert (weights / weights[0] / exact - 1).abs().max() < 1.25 * torch.finfo(torch.float32).eps

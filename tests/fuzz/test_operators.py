"""Operators on drawn shapes, strides, dtypes, plans and biases, each against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import assert_accurate

from memkern import ops
from memkern.ops import backends

BACKENDS = [name for name in ("cpp", "torch") if not backends.installed(name)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIZES = st.integers(0, 5)
SEEDS = st.integers(0, 2**31 - 1)


def strided(tensor, how):
    """The same values in other strides."""
    if how == "sliced":
        return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
    if how == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor


LAYOUTS = st.sampled_from(["contiguous", "sliced", "strided", "transposed"])


@st.composite
def edits(draw):
    """Rows, a bank or none, and a plan on them."""
    batch, length, extra, width = (
        draw(SIZES),
        draw(st.integers(1, 80)),
        draw(st.integers(0, 4)),
        draw(st.integers(0, 70)),
    )
    dtype, generator = draw(st.sampled_from(DTYPES)), torch.Generator().manual_seed(draw(SEEDS))
    rows = torch.randn(batch, length, width, generator=generator).to(dtype)
    bank = torch.randn(batch, extra, width, generator=generator).to(dtype) if extra else None
    source = torch.randint(0, length + extra, (batch, length), generator=generator, dtype=torch.int32)
    scale = torch.randn(batch, length, generator=generator)
    scale[torch.rand(batch, length, generator=generator) < 0.3] = 0
    if rows.numel() and draw(st.booleans()):
        rows[0, 0] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return strided(rows, draw(LAYOUTS)), bank, source, scale


def edited(rows, bank, source, scale):
    """The edited rows in float64: a scale of 0 selects 0."""
    every = rows.double() if bank is None else torch.cat([rows, bank], 1).double()
    taken = every.gather(1, source.long().unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
    return torch.where(scale.unsqueeze(-1) == 0, 0.0, taken * scale.unsqueeze(-1).double())


def assert_rounded(actual, expected):
    """Assert one product, rounded once: the error is that of the dtype's own rounding."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=2 * torch.finfo(actual.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=edits())
def test_edit_embeds(backend, drawn):
    rows, bank, source, scale = drawn
    out = ops.edit_embeds(rows, bank, source, scale, backend=backend)
    expected = edited(rows, bank, source, scale)
    assert out.dtype == rows.dtype
    torch.testing.assert_close(
        out, expected.to(rows.dtype), equal_nan=True, rtol=1e-2 if out.itemsize == 2 else 1e-6, atol=0
    )
    assert (out[(scale == 0)] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=edits(), seed=SEEDS)
def test_edit_kv(backend, drawn, seed):
    k, bank, source, scale = drawn
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(k.shape, generator=generator).to(k.dtype)
    v_bank = None if bank is None else bank.flip(-1)
    outs = ops.edit_kv(k, v, bank, v_bank, source, scale, scale.flip(-1), backend=backend)
    for out, rows, extra, factor in ((outs[0], k, bank, scale), (outs[1], v, v_bank, scale.flip(-1))):
        expected = edited(rows, extra, source, factor).to(k.dtype)
        assert_rounded(out, expected)


@st.composite
def attentions(draw):
    """q, k, v and a bias with excluded keys, or rows without any."""
    batch, heads, queries, keys = (
        draw(SIZES),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 70)),
        draw(st.integers(0, 90)),
    )
    width, dtype = draw(st.integers(1, 96)), draw(st.sampled_from(DTYPES[:3]))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    q = torch.randn(batch, heads, queries, width, generator=generator).to(dtype)
    k, v = torch.randn(2, batch, heads, keys, width, generator=generator).to(dtype)
    bias = torch.randn(batch, heads, keys, generator=generator) * draw(st.sampled_from([0.0, 1.0, 8.0]))
    bias = bias if draw(st.booleans()) else bias[:, 0].contiguous()
    bias[torch.rand(bias.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -math.inf
    return strided(q, draw(LAYOUTS)), strided(k, draw(LAYOUTS)), v, bias, width**-0.5


def probabilities(q, k, bias, scale):
    """The definition, in the dtype of the tensors; 0 in a row without keys."""
    added = (bias if bias.dim() == 3 else bias.unsqueeze(1)).unsqueeze(2).to(q.dtype)
    return torch.nan_to_num((q @ k.mT * scale + added).softmax(-1), nan=0.0)


def attended(q, k, v, bias, scale):
    """The attention that these give."""
    return probabilities(q, k, bias, scale) @ v


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=attentions())
def test_biased_attention(backend, drawn):
    q, k, v, bias, scale = drawn
    out = ops.biased_attention(q, k, v, bias, scale, backend=backend)
    exact = attended(q.double(), k.double(), v.double(), bias.double(), scale)
    assert_accurate(out, attended(q, k, v, bias, scale), exact, v)


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=attentions())
def test_attention_mass(backend, drawn):
    q, k, _, bias, scale = drawn
    weight = torch.rand(k.shape[0], k.shape[2], generator=torch.Generator().manual_seed(0))
    by_key, by_query = ops.attention_mass(q, k, bias, weight, scale, backend=backend)
    p = probabilities(q.double(), k.double(), bias.double(), scale)
    torch.testing.assert_close(by_key.double(), p.sum(2) / max(1, q.shape[2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_query.double(), (p * weight.double()[:, None, None]).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=attentions(), seed=SEEDS)
def test_absorbed_attention(backend, drawn, seed):
    """x is one head's q, and the keys and values stand for A and VO."""
    q, a, vo, bias, _ = drawn
    x, a = q[:, 0].contiguous() / 8, a.contiguous()
    out_bias = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    out = ops.absorbed_attention(x, a, bias, vo, out_bias, backend=backend)

    def by_hand(x, a, vo, out_bias):
        heads = a.shape[1]
        p = probabilities(x.unsqueeze(1).expand(-1, heads, -1, -1), a, bias, 1.0)
        rows, values = p.transpose(1, 2).flatten(2), vo.flatten(1, 2)
        # As addmm sums: onto the bias, a rounding at its size with every term.
        return torch.stack([torch.addmm(out_bias, *pair) for pair in zip(rows, values, strict=True)]) if len(x) else x

    exact = by_hand(x.double(), a.double(), vo.double(), out_bias.double())
    # Logits are rounded to the dtype between the products, by all: that changes a weight by eps · logit of itself.
    logits = (x.double().unsqueeze(1) @ a.double().mT).abs()
    largest = 1 + (float(logits.max()) if logits.numel() else 0)
    assert_accurate(out, by_hand(x, a, vo, out_bias), exact, vo * a.shape[1] * largest, out_bias)

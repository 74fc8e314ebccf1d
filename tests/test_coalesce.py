"""Coalescing: m equal keys are one key with log m, read from a context or from a plan."""

from __future__ import annotations

import math

import pytest
import torch

from memkern import lower, ops
from memkern.coalesce import MULTIPLE, coalesce, coalesce_plan


def attended(context, keys=None):
    """Attention of fixed queries over a context, all rows or the keys that are left, in float64."""
    torch.manual_seed(0)
    width = context.shape[-1]
    q = torch.randn(context.shape[0], 2, 9, 8, dtype=torch.float64)
    to_k, to_v = torch.randn(2, width, 16, dtype=torch.float64)
    rows = context.double() if keys is None else keys.rows(context).double()
    bias = torch.zeros(rows.shape[:2]) if keys is None else keys.bias
    k, v = ((rows @ weight).unflatten(-1, (2, 8)).transpose(1, 2) for weight in (to_k, to_v))
    return ops.biased_attention(q, k, v, bias, backend="torch")


def test_zero_rows_and_runs_are_one_key_each():
    torch.manual_seed(1)
    context = torch.randn(3, 12, 8)
    context[0, 3:6] = 0
    context[0, 9] = 0
    context[1, 5:] = context[1, 5]
    keys = coalesce(context)
    assert keys.counts == (9, 6, 12)
    assert keys.bias.shape[1] % MULTIPLE == 0
    assert keys.bias[0, 3] == torch.tensor(math.log(4))
    assert keys.bias[1, 5] == torch.tensor(math.log(7))
    assert (keys.bias[1, 6:] == -math.inf).all()
    torch.testing.assert_close(attended(context, keys), attended(context), atol=1e-6, rtol=1e-6)


def test_equal_rows_apart_stay_apart_and_nan_equals_nothing():
    context = torch.ones(1, 4, 2)
    context[0, 1] = 2
    assert coalesce(context).counts == (3,)
    context[0] = float("nan")
    assert coalesce(context).counts == (4,)


@pytest.mark.parametrize("shape", [(0, 77, 8), (1, 1, 8), (2, 1, 0)])
def test_small(shape):
    keys = coalesce(torch.randn(shape))
    assert keys.index.shape == keys.bias.shape == (shape[0], MULTIPLE)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("none", 77), ("zero-pad:0.7", 33), ("pad-from-eot", 12), ("zero-pad:1", 13), ("swap-pad-zero-eot", 77)],
)
def test_plan_and_context_agree(policy, expected):
    """A 10-token prompt has 12 + 20 kept keys and one zero key under zero-pad:0.7."""
    roles = torch.tensor([[0] + [1] * 10 + [2] + [3] * 65], dtype=torch.uint8)
    torch.manual_seed(2)
    embeds = torch.randn(1, 77, 8)
    plan = lower(policy, roles, "cond")
    edited = ops.edit_embeds(embeds, None, plan.source, plan.v_scale)
    from_plan, from_context = coalesce_plan(plan), coalesce(edited)
    assert from_plan.counts == from_context.counts == (expected,)
    for keys in (from_plan, from_context):
        torch.testing.assert_close(attended(edited, keys), attended(edited), atol=1e-6, rtol=1e-6)


def test_excluded_keys_disappear():
    roles = torch.tensor([[0] + [1] * 10 + [2] + [3] * 65], dtype=torch.uint8)
    keys = coalesce_plan(lower("ren:1.25", roles, "cond"))
    assert keys.counts == (12,)
    assert keys.index[0, :12].tolist() == list(range(12))

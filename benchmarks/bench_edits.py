"""edit_embeds and edit_kv against a plain memory copy of the same bytes into new memory."""

from __future__ import annotations

import pytest
import torch
from pairs import compare

from memkern import lower, ops
from memkern.roles import Role

BATCH, LENGTH, WIDTH = 64, 77, 2048
POLICIES = ["swap-pad-zero-eot", "zero-pad:0.7", "pad-from-eot", "none"]


def plan_of(policy):
    """The plan of 64 prompts of 10 tokens."""
    row = [Role.SOT] + [Role.PROMPT] * 10 + [Role.EOT] + [Role.PAD] * 65
    return lower(policy, torch.tensor([row] * BATCH, dtype=torch.uint8), "cond")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_edit_embeds(benchmark, policy, dtype):
    plan, embeds = plan_of(policy), torch.randn(BATCH, LENGTH, WIDTH).to(dtype)
    compare(
        benchmark,
        lambda: ops.edit_embeds(embeds, None, plan.source, plan.v_scale),
        lambda: embeds.clone(),
        named="clone",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_edit_kv(benchmark, policy, dtype):
    plan, (k, v) = plan_of(policy), torch.randn(2, BATCH, LENGTH, WIDTH).to(dtype)
    compare(
        benchmark,
        lambda: ops.edit_kv(k, v, None, None, plan.source, plan.k_scale, plan.v_scale),
        lambda: (k.clone(), v.clone()),
        named="clone of both",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_edit_embeds_against_torch(benchmark, dtype):
    plan, embeds = plan_of("zero-pad:0.7"), torch.randn(BATCH, LENGTH, WIDTH).to(dtype)
    compare(
        benchmark,
        lambda: ops.edit_embeds(embeds, None, plan.source, plan.v_scale),
        lambda: ops.edit_embeds(embeds, None, plan.source, plan.v_scale, backend="torch"),
        named="torch reference",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_embed_tokens_against_torch(benchmark, dtype):
    tokens, positions = torch.randn(49408, 768).to(dtype), torch.randn(LENGTH, 768).to(dtype)
    ids = torch.randint(0, 49408, (BATCH, LENGTH))
    roles = torch.full((BATCH, LENGTH), int(Role.PAD), dtype=torch.uint8)
    roles[:, :12] = Role.PROMPT
    compare(
        benchmark,
        lambda: ops.embed_tokens(ids, roles, tokens, positions, 0),
        lambda: ops.embed_tokens(ids, roles, tokens, positions, 0, backend="torch"),
        named="torch reference",
    )

"""attention_mass against the probabilities themselves, made by torch's own product and softmax and then summed."""

from __future__ import annotations

import pytest
import torch
from pairs import compare

from memkern import ops
from memkern.ops.triton.layers import BATCH, LAYERS

SD15 = [layer for layer in LAYERS if layer.model == "SD 1.5"]


def arguments(layer, keys, dtype, device="cpu"):
    """q, k, a bias without exclusions and a weight that chooses one key."""
    q = torch.randn(BATCH, layer.queries, layer.heads, layer.head_dim, device=device).to(dtype).transpose(1, 2)
    k = torch.randn(BATCH, keys, layer.heads, layer.head_dim, device=device).to(dtype).transpose(1, 2)
    bias, weight = torch.zeros(2, BATCH, keys, device=device)
    weight[:, 5] = 1
    return q, k, bias, weight, layer.head_dim**-0.5


def materialized(q, k, bias, weight, scale):
    """The plain way to write it."""
    p = torch.softmax((q @ k.mT).float() * scale + bias[:, None, None], -1)
    return p.mean(2), p @ weight[:, None, :, None]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", SD15, ids=lambda layer: f"{layer.queries}x{layer.width}")
def test_attention_mass(benchmark, layer, dtype):
    given = arguments(layer, 77, dtype)
    compare(benchmark, lambda: ops.attention_mass(*given), lambda: materialized(*given), named="materialized")

"""Implementations that the benchmarks compare are one function: each gives the same output."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from cross_attention import CrossAttention


@torch.no_grad()
@pytest.mark.parametrize("keys", [(77, 77), (77, 33), (5, 1)], ids=str)
def test_implementations_agree(keys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: module)
    layer = CrossAttention(9, 32, 4, 24, keys, torch.float32, "cpu")
    outputs = {name: call() for name, call in layer.implementations().items()}
    exact = CrossAttention(9, 32, 4, 24, keys, torch.float64, "cpu").implementations()["diffusers"]()
    assert len(outputs) == 6
    for output in outputs.values():
        torch.testing.assert_close(output.double(), exact, atol=1e-5, rtol=1e-4)

"""`make gpu`'s report of UNet steps, on the CPU with small UNets: what a card runs, but for capturing."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: no kernels")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_steps

from memkern.benchmark import Run, Timed
from memkern.ops.triton import estimate
from memkern.ops.triton.configs import Card

SMALL = {
    "sd15": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (2, 2, 4),
    },
}


@pytest.mark.parametrize("name", SMALL)
def test_a_row_for_each_policy(name, monkeypatch):
    for sizes in (gpu_steps.VIT_L, gpu_steps.VIT_G):
        monkeypatch.setitem(sizes, "num_hidden_layers", 2)
    policies = ("swap-pad-zero-eot", "zero-pad:0.7")
    model = gpu_steps.Model(name, functools.partial(getattr(gpu_steps, name), **SMALL[name]), policies)
    shown = "\n".join(gpu_steps.report(model, "cpu", compile=False, rounds=3))
    assert f"## A UNet step of {name}" in shown
    assert shown.count("| unpatched |") == 1
    for policy in policies:
        times, change = (line for line in shown.splitlines() if line.startswith(f"| {policy} |"))
        assert times.count("|") == 10
        assert all(float(cell) <= 1e3 for cell in change.split("|")[2:4])
    assert torch.get_default_dtype() == torch.float32


def test_predictions_are_of_the_paths_that_were_chosen():
    card = Card.typical("sm80")
    layers = {
        "first": {"path": "absorbed", "keys": (77, 33), "sizes": (4096, 320, 8)},
        "second": {"path": "former", "keys": (77, 33), "sizes": (1024, 640, 8)},
        "branches": {"choice": "computed once"},
    }
    run = Run("zero-pad:0.7", False, Timed((1.0, 2.0)), None, None, None, 0, layers)
    layer = estimate.Layer(4096, 320, 8, (77, 33), 77, 768)
    expected = estimate.seconds("absorbed", layer, card) - estimate.seconds("former", layer, card)
    assert gpu_steps.predicted(run, 768, card) == expected < 0

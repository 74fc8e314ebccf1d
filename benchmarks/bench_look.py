"""A denoising step of SD 1.5's UNet: one that looks at its input, against one that does not."""

from __future__ import annotations

import pytest
import torch
from bench_kv import pipelines, stepper
from pairs import compare

import memkern


@torch.no_grad()
@pytest.mark.parametrize("policy", ["none", "zero-pad:0.7"])
def test_look(benchmark, policy):
    """The look alone: at the embeds stage, with the UNet's own computation left as it is."""
    ours, theirs = pipelines()
    with memkern.patched(ours, policy, accelerate=False):
        compare(benchmark, stepper(ours), stepper(theirs), named="unpatched", rounds=15)

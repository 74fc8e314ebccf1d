"""A denoising step of SD 1.5's UNet: looking at what reaches it, against a UNet that nobody looks at."""

from __future__ import annotations

import pytest
import torch
from bench_kv import pipelines, stepper
from pairs import compare

import memkern


@torch.no_grad()
@pytest.mark.parametrize("policy", ["none", "zero-pad:0.7"])
def test_look(benchmark, policy):
    """At the embeds stage, with the UNet's own computation left as it is: the look alone."""
    ours, theirs = pipelines()
    with memkern.patched(ours, policy, accelerate=False):
        compare(benchmark, stepper(ours), stepper(theirs), named="unpatched", rounds=15)

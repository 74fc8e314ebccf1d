"""A denoising step of SD 1.5's UNet, patched and not, in the ways in which people run it: compiled, in inference mode,
under autocast.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from bench_kv import pipelines, stepper
from bench_unet_step import unet
from pairs import compare

import memkern
from memkern.testing import tiny_pipeline

POLICIES = ["swap-pad-zero-eot", "zero-pad:0.7"]
PAIRS = 21


@functools.lru_cache(maxsize=1)
def compiled():
    """The same two pipelines, their UNets compiled by torch's own compiler."""
    made = pipelines()
    for pipe in made:
        pipe.unet = torch.compile(pipe.unet, fullgraph=True)
    return made


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled(benchmark, policy):
    ours, theirs = compiled()
    with memkern.patched(ours, policy):
        compare(benchmark, stepper(ours), stepper(theirs), named="compiled, unpatched", rounds=PAIRS)


@pytest.mark.parametrize("policy", POLICIES)
def test_inference_mode(benchmark, policy):
    ours, theirs = pipelines()
    with memkern.patched(ours, policy), torch.inference_mode():
        compare(benchmark, stepper(ours), stepper(theirs), named="unpatched", rounds=PAIRS)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_autocast(benchmark, policy):
    """float32 weights, products in bfloat16."""
    tokenizer, model = pipelines()[0].tokenizer, unet(torch.float32)
    ours, theirs = (tiny_pipeline(tokenizer, width=768, unet=copy.deepcopy(model)) for _ in range(2))
    with memkern.patched(ours, policy), torch.autocast("cpu", torch.bfloat16):
        steppers = stepper(ours, torch.float32), stepper(theirs, torch.float32)
        compare(benchmark, *steppers, named="unpatched", rounds=PAIRS)

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
        compare(benchmark, stepper(ours), stepper(theirs), named="compiled, unpatched", rounds=15)


@pytest.mark.parametrize("policy", POLICIES)
def test_inference_mode(benchmark, policy):
    ours, theirs = pipelines()
    with memkern.patched(ours, policy), torch.inference_mode():
        compare(benchmark, stepper(ours), stepper(theirs), named="unpatched", rounds=15)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_autocast(benchmark, policy):
    """float32 weights, products in bfloat16."""
    pipe = tiny_pipeline(pipelines()[0].tokenizer, width=768, unet=unet(torch.float32))
    theirs = copy.copy(pipe)
    theirs.unet = copy.deepcopy(pipe.unet)
    with memkern.patched(pipe, policy), torch.autocast("cpu", torch.bfloat16):
        compare(benchmark, stepper(pipe), stepper(theirs), named="unpatched", rounds=15)

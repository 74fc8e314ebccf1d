"""A denoising step of SD 1.5's UNet: a policy at the kv stage against the embeds stage, and a probe against none."""

from __future__ import annotations

import copy
import functools
from contextlib import ExitStack

import pytest
import torch
from bench_unet_step import unet
from pairs import compare

import memkern
from memkern.testing import tiny_pipeline, train_tokenizer

PROMPT = "a photograph of an astronaut riding a horse"


@functools.lru_cache(maxsize=1)
def pipelines():
    """Two pipelines around two copies of the UNet, bfloat16."""
    tokenizer, model = train_tokenizer([PROMPT]), unet(torch.bfloat16)
    made = [tiny_pipeline(tokenizer, width=768, unet=copy.deepcopy(model)) for _ in range(2)]
    return [pipe.to(torch.bfloat16) for pipe in made]


def stepper(pipe, dtype=torch.bfloat16):
    """A call of the UNet as the pipeline makes it, with the same context each time."""
    cond, uncond = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    context, sample = torch.cat([uncond, cond]), torch.cat([torch.randn(1, 4, 64, 64, dtype=dtype)] * 2)
    pipe.scheduler.set_timesteps(20)

    def step():
        return pipe.unet(sample, pipe.scheduler.timesteps[3], context).sample

    step(), step()
    return step


@torch.no_grad()
@pytest.mark.parametrize("policy", ["swap-pad-zero-eot", "zero-pad:0.7"])
def test_kv_stage(benchmark, policy):
    ours, theirs = pipelines()
    with memkern.patched(ours, policy, stage="kv"), memkern.patched(theirs, policy, stage="embeds"):
        compare(benchmark, stepper(ours), stepper(theirs), named="embeds stage", rounds=8)


@torch.no_grad()
@pytest.mark.parametrize("policy", [None, "swap-pad-zero-eot"], ids=str)
def test_probe(benchmark, policy):
    ours, theirs = pipelines()
    with ExitStack() as stack:
        for pipe in (ours, theirs):
            if policy is not None:
                stack.enter_context(memkern.patched(pipe, policy))
        stack.enter_context(memkern.probe(ours))
        compare(benchmark, stepper(ours), stepper(theirs), named="no probe", rounds=8)

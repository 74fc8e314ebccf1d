"""A denoising step of SD 1.5's UNet, patched and not: random weights, 64×64 latents, a prompt and its negative."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from pairs import compare

from memkern.pipelines.acceleration import Acceleration
from memkern.pipelines.cross_attention import Sites, cross_attention_layers


@functools.cache
def unet() -> UNet2DConditionModel:
    """SD 1.5's configuration."""
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    )
    return made.eval().to(torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("zeroed", [1, 45], ids=["swap-pad-zero-eot", "zero-pad:0.7"])
def test_unet_step(benchmark, zeroed):
    model, sample = unet(), torch.randn(2, 4, 64, 64, dtype=torch.bfloat16)
    context = torch.randn(2, 77, 768).bfloat16()
    context[1, 12 : 12 + zeroed] = 0
    attentions = [attn for _, attn in cross_attention_layers(model)]
    formers = {attn: attn.processor for attn in attentions}
    sites = Sites(model, Acceleration("auto"))
    ours = {attn: attn.processor for attn in attentions}

    def step(processors, seen):
        for attn, processor in processors.items():
            attn.set_processor(processor)
        return model(sample, 500, seen)

    step(ours, context), step(ours, context)
    compare(benchmark, lambda: step(ours, context), lambda: step(formers, context), named="unpatched", rounds=8)
    step(ours, context)
    sites.remove()

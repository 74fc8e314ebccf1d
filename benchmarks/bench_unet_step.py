"""A denoising step of SD 1.5's UNet, patched and not: random weights, 64×64 latents, a prompt and its negative."""

from __future__ import annotations

import functools

import pytest
import torch
from configurations import SD15_UNET
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from pairs import compare

from memkern.testing import SiteHolder


@functools.lru_cache(maxsize=1)
def unet(dtype: torch.dtype) -> UNet2DConditionModel:
    """SD 1.5's configuration."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**SD15_UNET).eval().to(dtype)


CASES = [
    pytest.param(zeroed, dtype, again, id=f"{policy}-{str(dtype).removeprefix('torch.')}{'' if again else '-one step'}")
    for dtype, policy, zeroed, again in (
        (torch.bfloat16, "swap-pad-zero-eot", 1, True),
        (torch.bfloat16, "zero-pad:0.7", 45, True),
        (torch.bfloat16, "pad-from-eot", 0, True),
        (torch.bfloat16, "swap-pad-zero-eot", 1, False),
        (torch.float32, "swap-pad-zero-eot", 1, True),
        (torch.float32, "zero-pad:0.7", 45, True),
    )
]


@torch.no_grad()
@pytest.mark.parametrize(("zeroed", "dtype", "again"), CASES)
def test_unet_step(benchmark, zeroed, dtype, again):
    """A step that is not the first, or, as in a pipeline of one step, the first and last."""
    # Both branches of guidance are given the same latents.
    model, sample = unet(dtype), torch.cat([torch.randn(1, 4, 64, 64, dtype=dtype)] * 2)
    context = torch.randn(2, 77, 768).to(dtype)
    context[1, 12 : 12 + zeroed] = 0
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    formers = {attn: attn.processor for attn in attentions}
    holder = SiteHolder(model)
    ours = {attn: attn.processor for attn in attentions}

    def step(processors):
        for attn, processor in processors.items():
            attn.set_processor(processor)
        return model(sample, 500, context if again else context.clone())

    step(ours), step(ours)
    compare(benchmark, lambda: step(ours), lambda: step(formers), named="unpatched", rounds=15)
    step(ours)
    holder.site.release(holder)

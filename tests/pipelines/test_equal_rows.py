"""A negative prompt that is the prompt: equal rows, of which some are edited and some are not."""

from __future__ import annotations

import pytest
import torch
from families import sd_families, sdxl_families

import memkern

SD = [name for name in sd_families({}) if name not in ("StableDiffusionUpscalePipeline",)]
SDXL = [name for name in sdxl_families({}) if name != "StableDiffusion3Pipeline"]


@pytest.mark.parametrize("prompt", ["", "a cat"])
@pytest.mark.parametrize("name", [*SD, *SDXL])
def test_both_stages_give_the_same_image(tokenizers, name, prompt):
    images = []
    for stage in ("embeds", "kv"):
        family = {**sd_families(tokenizers), **sdxl_families(tokenizers)}[name]()
        memkern.patch(family.pipe, "zero-eot", stage=stage)
        images.append(family(prompt, negative_prompt=prompt, steps=3))
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)

"""Five hundred generations of one pipeline, in which everything changes: no stale result, no growing memory."""

from __future__ import annotations

import gc
import random

import psutil
import pytest
import torch
from companions import lora

import memkern
from memkern.testing import tiny_pipeline

GENERATIONS, WARM = 500, 100
POLICIES = ["swap-pad-zero-eot", "zero-pad:0.7", "ren:1.25", "guard:0.2,0.5", "none", "prompt-eot-from-pad"]
WORDS = "a red blue cat dog house on the moon mat astronaut riding horse".split()


def draw(drawn):
    """Arguments of one call: prompts, a policy, a LoRA's weight, and options."""
    prompts = [" ".join(drawn.choices(WORDS, k=drawn.randint(0, 12))) for _ in range(drawn.randint(1, 3))]
    options = {
        "guidance_scale": drawn.choice([1.0, 7.5]),
        "num_images_per_prompt": drawn.randint(1, 2),
        "num_inference_steps": drawn.randint(1, 4),
    }
    return prompts, drawn.choice(POLICIES), drawn.choice([0.0, 0.5, 1.0]), options


def image(pipe, prompts, options):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompts, generator=generator, output_type="latent", **options).images


@pytest.mark.slow
def test_five_hundred_generations(tokenizers):
    drawn = random.Random(0)
    pipe = tiny_pipeline(tokenizers["sd1"])
    lora(pipe)
    patch = memkern.patch(pipe)
    process, memory = psutil.Process(), []
    for index in range(GENERATIONS):
        prompts, policy, weight, options = draw(drawn)
        patch.update(policy)
        pipe.unet.set_adapters(["style"], [weight])
        found = image(pipe, prompts, options)
        fresh = tiny_pipeline(tokenizers["sd1"])
        lora(fresh)
        fresh.unet.set_adapters(["style"], [weight])
        memkern.patch(fresh, policy)
        assert torch.equal(found, image(fresh, prompts, options)), (index, prompts, policy, weight, options)
        memkern.unpatch(fresh)
        del fresh
        gc.collect()
        memory.append(process.memory_info().rss)
        assert not patch.last.kept
    grown = min(memory[-50:]) - min(memory[WARM : WARM + 50])
    assert grown < 16 * 2**20, f"{grown / 2**20:.1f} MiB in {GENERATIONS - WARM} generations"

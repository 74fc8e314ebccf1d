"""Every flag of the paper's published code has a method here that does the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published import FLAGS, PAGE, Difference, difference, loaded, prompts, render, wen_by_hand

from memkern import demo
from memkern.audit.images import Job, generate
from memkern.audit.methods import method
from memkern.audit.prompts import Prompt

OPTIONS = {"num_inference_steps": 2, "guidance_scale": 7.5}
CAPTION = demo.memorized()[0][0]


@pytest.fixture(scope="module")
def pipe():
    return loaded()


@pytest.mark.parametrize("name", FLAGS.values())
def test_g33_the_same_context_and_image(pipe, name):
    """To the bit, but for the one preset that computes a mean; images to a level of rounding."""
    for text in prompts(pipe)[1:]:
        found = difference(pipe, name, text, 7, OPTIONS)
        assert found.context <= (1e-6 if name == "prompt-eot-from-pad" else 0), text
        assert found.image <= 1, text


def test_the_page_has_every_flag_and_method():
    page = PAGE.read_text(encoding="utf-8").splitlines()
    made = render(dict.fromkeys(FLAGS, Difference())).splitlines()

    def words(lines):
        return [line.rsplit("|", 3)[0] for line in lines]

    assert words(page) == words(made)


@pytest.mark.parametrize(("target", "first_stop"), [("0", False), ("1000", True)])
def test_g33_wen_is_the_published_loop_bit_for_bit(pipe, target, first_stop):
    expected, uncond, losses = wen_by_hand(pipe, CAPTION, 7, float(target), 2)
    assert (len(losses) == 1) == first_stop
    generator = torch.Generator().manual_seed(7)
    found = method(f"wen:{target}").inputs(pipe, [CAPTION], [generator], OPTIONS)
    assert torch.equal(found["prompt_embeds"], expected)
    assert torch.equal(found["negative_prompt_embeds"], uncond)
    image = generate(pipe, [Job(method(f"wen:{target}"), Prompt("0", CAPTION), 7)], OPTIONS, "cpu")[0][0]
    embeds = {"prompt_embeds": expected, "negative_prompt_embeds": uncond}
    by_hand = pipe(**embeds, generator=torch.Generator().manual_seed(7), **OPTIONS).images[0]
    assert np.array_equal(image, by_hand)

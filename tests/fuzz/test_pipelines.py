"""Whole pipelines over drawn prompts, batches, guidance and policies: results that must be equal are equal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import memkern
from memkern.policy import replace, strength, zero
from memkern.testing import tiny_pipeline

TEXTS = ["", "a cat", "hi!", "cat " * 80, "a <|endoftext|> b", "a red house, a dog"]
NAMES = "swap-pad-zero-eot swap-pad zero-pad:0.7 zero-eot-pad pad-from-eot prompt-eot-from-pad none"
EDITS = st.builds(
    memkern.Edit,
    role=st.sampled_from(["prompt", "eot", "pad"]),
    action=st.sampled_from([zero(), strength(0.5), replace("sot"), replace("pad-mean")]),
    branch=st.sampled_from(["cond", "uncond", "both"]),
    fraction=st.sampled_from([0.5, 1.0]),
    order=st.sampled_from(["first", "even", "random"]),
    roles_of=st.sampled_from(["own", "cond"]),
)


@st.composite
def own_policies(draw):
    edits, pads = draw(st.lists(EDITS, max_size=3)), draw(st.sampled_from([None, "!"]))
    try:
        return memkern.Policy(edits, pads)
    except ValueError:  # a later edit leaves nothing of an earlier one
        reject()


POLICIES = st.sampled_from(NAMES.split()) | own_policies()
STAGES = st.sampled_from(["embeds", "kv"])
FEWER = settings(max_examples=max(5, settings.default.max_examples // 8))


@pytest.fixture(scope="module")
def pipe(tokenizers):
    return tiny_pipeline(tokenizers["sd1"])


@st.composite
def calls(draw):
    prompts = draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3))
    same_number = {"min_size": len(prompts), "max_size": len(prompts)}
    negatives = draw(st.none() | st.lists(st.sampled_from(["", "bad", prompts[0]]), **same_number))
    return {
        "prompt": prompts,
        "negative_prompt": negatives,
        "guidance_scale": draw(st.sampled_from([0.0, 1.0, 1.01, 7.5])),
        "num_images_per_prompt": draw(st.integers(1, 2)),
        "num_inference_steps": draw(st.integers(1, 3)),
    }


def image(pipe, call):
    generator = torch.Generator().manual_seed(0)
    return pipe(**call, generator=generator, output_type="latent").images


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@FEWER
@given(call=calls(), stage=STAGES, accelerate=st.booleans())
def test_edits_off_is_unpatched_and_unpatched_is_never_patched(pipe, call, stage, accelerate):
    before = image(pipe, call)
    with memkern.patched(pipe, "none", stage=stage, accelerate=accelerate):
        close(image(pipe, call), before)
    assert torch.equal(image(pipe, call), before)


@FEWER
@given(call=calls(), first=POLICIES, second=POLICIES, stage=STAGES)
def test_the_way_to_a_policy_does_not_matter(pipe, call, first, second, stage):
    with memkern.patched(pipe, second, stage=stage):
        expected = image(pipe, call)
    with memkern.patched(pipe, first) as patch:
        image(pipe, call)
        patch.update(second, stage=stage)
        assert torch.equal(image(pipe, call), expected)
        with memkern.patched(pipe, first, stage="kv"):
            image(pipe, call)
        assert torch.equal(image(pipe, call), expected)


@FEWER
@given(call=calls(), policy=POLICIES, accelerate=st.booleans())
def test_both_stages_are_the_same(pipe, call, policy, accelerate):
    made = []
    for stage in ("embeds", "kv"):
        with memkern.patched(pipe, policy, stage=stage, accelerate=accelerate):
            made.append(image(pipe, call))
    close(*made)

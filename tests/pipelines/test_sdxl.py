"""Two text encoders: each one's columns are edited by its own roles, and the pooled output is left alone."""

from __future__ import annotations

import pytest
import torch
from by_hand import SWAPS, edit, tokenize
from diffusers import DDIMScheduler
from families import sdxl_families

import memkern
from memkern.audit.scores import SCORES, Passes

PROMPTS = ["a cat", "a photograph of an astronaut riding a horse!"]
SECOND = ["a painting", "in the style of a very long and windy description"]
POLICIES = ["swap-pad-zero-eot", "zero-pad:0.7", "zero-eot-pad", "prompt-eot-from-pad", "none"]


@pytest.fixture
def sdxl(tokenizers):
    return sdxl_families(tokenizers)["StableDiffusionXLPipeline"]().pipe


@pytest.fixture
def refiner(tokenizers):
    return sdxl_families(tokenizers)["StableDiffusionXLImg2ImgPipeline, refiner"]().pipe


@pytest.fixture
def sd3(tokenizers):
    return sdxl_families(tokenizers)["StableDiffusion3Pipeline"]().pipe


def columns(encoder, tokenizer, prompts, policy, *, edited):
    """One encoder's part of the context, by hand."""
    ids, eots = tokenize(tokenizer, prompts, policy in SWAPS)
    hidden = encoder(ids, output_hidden_states=True).hidden_states[-2]
    return torch.stack([edit(row, eot, policy) if edited else row for row, eot in zip(hidden, eots, strict=True)])


def encode(pipe, prompts=PROMPTS, **options):
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True, **options}
    return pipe.encode_prompt(prompts, **options)


def assert_same(actual, expected, policy):
    if policy == "prompt-eot-from-pad":
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("second", [None, SECOND], ids=["one prompt", "prompt_2"])
@pytest.mark.parametrize("negative", ["", "bad picture"])
def test_each_encoder_by_its_own_roles(sdxl, policy, second, negative):
    unpatched = encode(sdxl, prompt_2=second, negative_prompt=negative)
    expected = []
    for prompts, edited in ((PROMPTS, True), ([negative] * 2, False)):
        others = second if edited and second else prompts
        expected.append(
            torch.cat(
                [
                    columns(sdxl.text_encoder, sdxl.tokenizer, prompts, policy, edited=edited),
                    columns(sdxl.text_encoder_2, sdxl.tokenizer_2, others, policy, edited=edited),
                ],
                -1,
            )
        )
    memkern.patch(sdxl, policy)
    cond, uncond, pooled, negative_pooled = encode(sdxl, prompt_2=second, negative_prompt=negative)
    assert_same(cond, expected[0], policy)
    assert_same(uncond, expected[1], policy)
    assert torch.equal(pooled, unpatched[2])
    assert torch.equal(negative_pooled, unpatched[3])


@torch.no_grad()
@pytest.mark.parametrize("stage", ["embeds", "kv"])
def test_negatives_that_are_zero(sdxl, stage):
    """Without a negative prompt SDXL's are zero, and no text encoder is called for them."""
    memkern.patch(sdxl, "swap-pad-zero-eot", stage=stage)
    cond, uncond, *_ = encode(sdxl, num_images_per_prompt=2)
    assert (uncond == 0).all()
    assert cond.shape[0] == 4
    assert {row.branch for row in memkern.status(sdxl).prompts} == {"cond"}
    sdxl(PROMPTS, num_inference_steps=2, output_type="latent", height=16, width=16, num_images_per_prompt=2)
    memkern.patch(sdxl, "ren:1.25")
    sdxl(PROMPTS, num_inference_steps=2, output_type="latent", height=16, width=16, num_images_per_prompt=2)


@torch.no_grad()
def test_the_refiner_has_the_second_encoder_alone(refiner):
    unpatched = encode(refiner, negative_prompt="")
    parts = refiner.text_encoder_2, refiner.tokenizer_2
    expected = columns(*parts, PROMPTS, "swap-pad-zero-eot", edited=True)
    negative = columns(*parts, ["", ""], "swap-pad-zero-eot", edited=False)
    memkern.patch(refiner)
    cond, uncond, pooled, _ = encode(refiner, negative_prompt="")
    assert torch.equal(cond, expected)
    assert torch.equal(uncond, negative)
    assert torch.equal(pooled, unpatched[2])


@torch.no_grad()
def test_c5_status_names_each_encoder(sdxl):
    memkern.patch(sdxl)
    encode(sdxl, ["a cat"], negative_prompt="")
    shown = str(memkern.status(sdxl))
    assert "note        the tokenizer_2 pads with '!' already: no pad is re-embedded" in shown
    assert "cond of text_encoder: SOT 1 PROMPT 2 EOT 1 PAD 73; 1 EOT zeroed, 73 PAD re-embedded" in shown
    assert "cond of text_encoder_2: SOT 1 PROMPT 2 EOT 1 PAD 73; 1 EOT zeroed" in shown
    assert "site        CLIPTextModelWithProjection embeddings: pad swap" in shown


@torch.no_grad()
def test_different_prompts_at_the_kv_stage(sdxl):
    """A key belongs to both encoders; where their roles differ nothing says which to edit."""
    memkern.patch(sdxl, "ren:1.25")
    encode(sdxl, ["a cat"], prompt_2=["a dog"])
    with pytest.raises(
        memkern.UnmitigatedError, match="its tokenizers split it differently, so that a key has different roles: key"
    ):
        encode(sdxl, ["a cat"], prompt_2=["a very long dog"])


@torch.no_grad()
@pytest.mark.parametrize("policy", ["swap-pad-zero-eot", "zero-pad:0.7"])
def test_sd3_edits_the_rows_of_clip_alone(sd3, policy):
    """CLIP's columns side by side, filled up with zeros, in front of T5's rows."""
    arguments = {"prompt": PROMPTS, "prompt_2": None, "prompt_3": None, "device": "cpu", "max_sequence_length": 16}
    before = sd3.encode_prompt(**arguments)
    clip = torch.cat(
        [
            columns(sd3.text_encoder, sd3.tokenizer, PROMPTS, policy, edited=True),
            columns(sd3.text_encoder_2, sd3.tokenizer_2, PROMPTS, policy, edited=True),
        ],
        -1,
    )
    memkern.patch(sd3, policy)
    after = sd3.encode_prompt(**arguments)
    assert torch.equal(after[0][:, :77, :72], clip)
    assert torch.equal(after[0][:, 77:], before[0][:, 77:])
    assert torch.equal(after[2], before[2])
    assert "site        SD3" not in str(memkern.status(sd3))
    with pytest.raises(ValueError, match="those of this StableDiffusion3Pipeline cannot be: it has no UNet"):
        memkern.patch(sd3, "ren:1.25")


@torch.no_grad()
def test_text_encoder_calls_of_ones_own(sdxl):
    patch = memkern.patch(sdxl)
    expected, *_ = encode(sdxl, ["a cat"])
    ids = [t("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
           for t in (sdxl.tokenizer, sdxl.tokenizer_2)]  # fmt: skip
    with patch.encoding("cond") as edited:
        first = sdxl.text_encoder(ids[0], output_hidden_states=True).hidden_states[-2]
        with pytest.raises(ValueError, match="embeds: text_encoder_2 has not been called inside"):
            edited(first)
        second = sdxl.text_encoder_2(ids[1], output_hidden_states=True).hidden_states[-2]
        with pytest.raises(ValueError, match="expected at least the 72 columns of the text encoders, got 32"):
            edited(first)
        made = edited(torch.cat([first, second], -1))
    assert torch.equal(made, expected)


def test_screening(sdxl):
    """Scores of memorization are computed from all that the pipeline's own call gives the UNet."""
    sdxl.scheduler = DDIMScheduler.from_config(sdxl.scheduler.config)
    texts = ["a cat", "a photograph of two dogs"]
    passes = Passes(sdxl, texts, [torch.Generator().manual_seed(0) for _ in texts], 5)
    given = {}
    handle = sdxl.unet.register_forward_pre_hook(lambda m, args, kwargs: given.update(kwargs), with_kwargs=True)
    assert all(SCORES["pads"](passes) > 0)
    assert all(SCORES["noise"](passes) > 0)
    handle.remove()
    assert set(given["added_cond_kwargs"]) == {"text_embeds", "time_ids"}
    assert memkern.status(sdxl).patched is False

"""Rare ways through a patched pipeline, each with the result that must come out of it."""

from __future__ import annotations

import copy

import pytest
import torch
from families import sd_families, sdxl_families
from unet_input import context_of

import memkern
from memkern import Edit, Policy
from memkern.pipelines.unet.layers import cross_attention_layers
from memkern.pipelines.unet.schedule import position
from memkern.policy import exclude, zero
from memkern.scope import in_steps

PAIRED = Policy([Edit("pad", exclude(), branch="both", roles_of="cond")])


def image(pipe, *args, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(*args, num_inference_steps=2, generator=generator, output_type="latent", **options).images


TIMES = torch.tensor([900, 600, 300, 0])


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (TIMES[2], 0.5),
        (TIMES[2].clone(), 0.5),
        (TIMES[1:2].expand(4), 0.25),
        (torch.tensor(300.0), 0.5),
        (600, 0.25),
        (601, None),
        (None, None),
    ],
    ids=str,
)
def test_where_in_the_schedule_a_step_is(timestep, expected):
    assert position(timestep, TIMES) == expected


@pytest.mark.parametrize("timesteps", [None, TIMES[:0], TIMES.view(2, 2)], ids=["none", "empty", "two dimensions"])
def test_schedules_that_are_none(timesteps):
    assert position(torch.tensor(300), timesteps) is None
    with pytest.raises(
        ValueError, match="has a window of steps, and the place of this step in the schedule is unknown"
    ):
        in_steps(Edit("pad", zero(), steps=(0, 0.5)), None)


@torch.no_grad()
def test_an_exchanged_encoder_where_unknown_prompts_pass(sd1):
    """An encoder that was copied alone takes nothing of the patch along."""
    memkern.patch(sd1, "zero-pad:1", on_unknown="warn")
    sd1.text_encoder = copy.deepcopy(sd1.text_encoder)
    with pytest.warns(memkern.UnmitigatedWarning, match="called the text encoders 0 times"):
        actual = context_of(sd1, "a cat")
    memkern.unpatch(sd1)
    assert torch.equal(actual, context_of(sd1, "a cat"))


def test_an_exchanged_unet_warns_and_is_taken_again(sd1):
    memkern.patch(sd1, "zero-pad:1")
    sd1.unet = copy.deepcopy(sd1.unet)
    with pytest.warns(UserWarning, match="the pipeline's UNet or ControlNet was exchanged"):
        first = image(sd1, "a cat")
    memkern.patch(sd1, "zero-pad:1")
    torch.testing.assert_close(image(sd1, "a cat"), first, rtol=1e-4, atol=1e-4)


def test_a_negative_edited_by_the_roles_of_a_prompt_that_was_not_encoded(sd1):
    """At the kv stage, with unknown prompts let through: neither row is edited."""
    raw = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))
    plain = image(sd1, prompt_embeds=raw, negative_prompt="blurry")
    with memkern.patched(sd1, PAIRED, on_unknown="pass"):
        torch.testing.assert_close(image(sd1, prompt_embeds=raw, negative_prompt="blurry"), plain, rtol=1e-3, atol=1e-4)
    with memkern.patched(sd1, PAIRED), pytest.raises(memkern.UnmitigatedError):
        image(sd1, prompt_embeds=raw, negative_prompt="blurry")


@torch.no_grad()
def test_a_negative_of_two_encoders_whose_prompt_came_as_embeddings(tokenizers):
    """The roles of both its encoders are known by the prompt's rows."""
    family = sdxl_families(tokenizers)["StableDiffusionXLPipeline"]()
    memkern.patch(family.pipe, Policy([Edit("pad", zero(), branch="uncond", roles_of="cond")]))
    cond, _, pooled, _ = family.pipe.encode_prompt("a cat", negative_prompt="blurry", device="cpu")
    given = family(None, prompt_embeds=cond, pooled_prompt_embeds=pooled, negative_prompt="blurry")
    assert torch.equal(given, family("a cat", negative_prompt="blurry"))


@torch.no_grad()
def test_an_attention_mask_at_the_kv_stage(sd1):
    """With a mask nothing is edited, and memkern says so."""
    mask = torch.ones(2, 77)
    mask[:, 40:] = 0
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with memkern.patched(sd1, PAIRED) as patch:
        cond, uncond = sd1.encode_prompt("a cat", "cpu", 1, True)
        context = torch.cat([uncond, cond])
        with pytest.raises(memkern.UnmitigatedError, match="was called with an attention mask"):
            sd1.unet(sample, 5, context, encoder_attention_mask=mask)
        patch.update(PAIRED, on_unknown="pass")
        passed = sd1.unet(sample, 5, context, encoder_attention_mask=mask).sample
    assert torch.equal(passed, sd1.unet(sample, 5, context, encoder_attention_mask=mask).sample)


@pytest.mark.parametrize("stage", ["embeds", "kv"])
def test_the_reference_alone(sd1, stage):
    """The reference has no faster attention: layers keep that of their processors unless keys and values are edited."""
    with memkern.patched(sd1, "zero-pad:1", accelerate=False):
        expected = image(sd1, "a cat")
    memkern.patch(sd1, "zero-pad:1", backend="torch", stage=stage)
    torch.testing.assert_close(image(sd1, "a cat"), expected, rtol=1e-3, atol=1e-4)
    assert "backend 'torch' has no faster attention" in str(memkern.status(sd1))


def test_support_says_which_layers_are_left(sd1):
    layers = dict(cross_attention_layers(sd1.unet))
    hooked, *_, foreign = layers
    layers[hooked].to_q.register_forward_hook(lambda *_: None)
    layers[foreign].set_processor(type("Own", (), {"__call__": lambda self, attn, x, *_, **__: x})())
    text = str(memkern.support(sd1))
    assert f"{hooked}: its modules are called: to_q has hooks" in text
    assert f"{foreign}: keeps its Own" in text


def test_dropout_in_training_is_left_to_the_layer(sd1):
    for _, attn in cross_attention_layers(sd1.unet):
        attn.to_out[1].p = 0.5
    sd1.unet.train()
    assert "it is training with dropout" in str(memkern.support(sd1))


def test_instruct_pix2pix_without_guidance(tokenizers):
    """Its method returns one tensor of the prompt's rows alone."""
    family = sd_families(tokenizers)["StableDiffusionInstructPix2PixPipeline"]()
    plain = family(guidance_scale=1.0)
    with memkern.patched(family.pipe, "none"):
        torch.testing.assert_close(family(guidance_scale=1.0), plain, rtol=1e-3, atol=1e-4)
    with memkern.patched(family.pipe, "zero-pad:1"):
        assert not torch.equal(family(guidance_scale=1.0), plain)

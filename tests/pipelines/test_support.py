"""Pipelines that cannot be patched, each with the sentence that says why."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.pipelines.ddpm import DDPMPipeline
from transformers import T5Config, T5EncoderModel

import memkern
from memkern.pipelines.family.encoders import clip_embeddings


@pytest.mark.parametrize("thing", [None, 3, "a model", torch.nn.Linear(1, 1), object()], ids=lambda x: type(x).__name__)
def test_not_a_pipeline(thing):
    with pytest.raises(TypeError, match=f"pipe: expected a diffusers pipeline, got {type(thing).__name__}"):
        memkern.patch(thing)
    memkern.unpatch(thing)
    assert not memkern.status(thing).patched


def test_a19_no_text_encoder_at_all(sd1):
    pipe = DDPMPipeline(sd1.unet, sd1.scheduler)
    with pytest.raises(
        ValueError,
        match=r"DDPMPipeline cannot be patched: it has no text_encoder; it has no tokenizer; it has no encode_prompt. "
        r"Supported are pipelines whose context comes from CLIP text encoders",
    ):
        memkern.patch(pipe)


def test_another_text_encoder(sd1):
    sd1.text_encoder = tiny_t5()
    with pytest.raises(ValueError, match="its text_encoder is a T5EncoderModel, not a CLIP text model"):
        memkern.patch(sd1)


def tiny_t5():
    return T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def flux(sd1):
    transformer = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=32, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler, sd1.vae, sd1.text_encoder, sd1.tokenizer, tiny_t5(), sd1.tokenizer, transformer)


def pixart(sd1):
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, cross_attention_dim=16,
        sample_size=8, caption_channels=8,
    )  # fmt: skip
    return PixArtAlphaPipeline(sd1.tokenizer, tiny_t5(), sd1.vae, transformer, sd1.scheduler)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (flux, "FluxPipeline cannot be patched: its text_encoder_2 is a T5EncoderModel, not a CLIP text model"),
        (pixart, "PixArtAlphaPipeline cannot be patched: its text_encoder is a T5EncoderModel, not a CLIP text model"),
    ],
)
def test_other_families_are_refused_with_the_reason(sd1, make, reason):
    pipe = make(sd1)
    with pytest.raises(ValueError, match=reason):
        memkern.patch(pipe)
    assert reason.partition(": ")[2] in str(memkern.support(pipe))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"policy": "zero-everything"}, ValueError, "unknown preset 'zero-everything'; the presets are"),
        ({"policy": 0.7}, TypeError, "policy: expected a Policy or a preset's name, got float"),
        ({"policy": "zero-pad:1.5"}, ValueError, r"r must be in \[0, 1\], got 1.5"),
        ({"policy": "ren:1.25", "stage": "embeds"}, ValueError, "policy 'ren:1.25' needs the kv stage, not 'embeds'"),
        ({"policy": memkern.Policy(reembed_pads="memorized")}, ValueError, "the tokenizer has no token 'memorized'"),
        ({"backend": "metal"}, ValueError, "there is no backend 'metal'; use one of auto, cpp, cuda, triton, torch"),
        ({"on_unknown": "ignore"}, ValueError, "on_unknown: expected 'raise', 'warn' or 'pass', got 'ignore'"),
    ],
)
def test_refused_arguments_leave_nothing_behind(sd1, arguments, error, message):
    attributes = dict(vars(sd1))
    with pytest.raises(error, match=message):
        memkern.patch(sd1, **arguments)
    assert vars(sd1) == attributes
    assert not clip_embeddings(sd1.text_encoder)._forward_pre_hooks


@torch.no_grad()
def test_status_tells_only_what_happened(sd1):
    """No prompt under a policy that it was not encoded with, and not the one before a prompt that it could not read."""
    patch = memkern.patch(sd1, "zero-eot", on_unknown="pass")
    cond, _ = sd1.encode_prompt("a cat", torch.device("cpu"), 1, False)
    assert patch.status().prompts[0].edited == {"EOT zeroed": 1}
    patch.update("zero-pad:1")
    assert not patch.status().prompts
    sd1.encode_prompt("a cat", torch.device("cpu"), 1, False)
    assert patch.status().prompts[0].edited == {"PAD zeroed": 73}
    sd1.encode_prompt(None, torch.device("cpu"), 1, False, prompt_embeds=cond)
    assert not patch.status().prompts


@torch.no_grad()
def test_status_says_what_is_in_force(pipe, family):
    assert str(memkern.status(pipe)) == "memkern: not patched"
    memkern.patch(pipe)
    pipe("a cat!", num_inference_steps=1, output_type="latent")
    status = memkern.status(pipe)
    cond, uncond = status.prompts
    assert cond.roles == {memkern.Role.SOT: 1, memkern.Role.PROMPT: 3, memkern.Role.EOT: 1, memkern.Role.PAD: 72}
    assert cond.edited == {"EOT zeroed": 1}
    assert not uncond.edited
    text = str(status)
    for line in (
        "policy      swap-pad-zero-eot",
        "site        CLIPTextModel embeddings: pad swap",
        "site        StableDiffusionPipeline.encode_prompt: edits of embeddings",
        "on_unknown  raise",
    ):
        assert line in text
    if family == "sd1":
        assert (cond.reembedded, uncond.reembedded) == (72, 75)
        assert "prompt      cond: SOT 1 PROMPT 3 EOT 1 PAD 72; 1 EOT zeroed, 72 PAD re-embedded" in text
    else:
        # c5: the pads are "!" already.
        assert (cond.reembedded, uncond.reembedded) == (0, 0)
        assert "note        the tokenizer pads with '!' already: no pad is re-embedded" in text

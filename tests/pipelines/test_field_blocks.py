"""Pipelines and UNets that read the text elsewhere than others do (G2, G6)."""

from __future__ import annotations

import diffusers
import pytest
import torch
from families import build, unet
from field import ON_UNKNOWN, PROMPT, STAGES, counts, differ, edited_image, edited_or_told, halves, image, same
from kv_by_hand import install, roles_of, zero_pads

import memkern
from memkern import Edit, Policy
from memkern.policy import zero
from memkern.testing import tiny_pipeline

POLICY = "zero-pad:1"


def attend_and_excite(tokenizer):
    parts = tiny_pipeline(tokenizer).components
    return build(diffusers.StableDiffusionAttendAndExcitePipeline, parts, safety_checker=None)


def excited(pipe, **options):
    options = {"prompt_embeds": None, **options}
    torch.manual_seed(0)
    made = pipe(
        PROMPT, token_indices=[1, 2], max_iter_to_alter=1, thresholds={}, attn_res=(8, 8), num_inference_steps=2,
        height=16, width=16, output_type="latent", generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip
    return made.images.detach()


class ByHand:
    """An `encode_prompt` that returns the context edited by hand."""

    def __init__(self, pipe):
        self.rows = halves(pipe, PROMPT, POLICY)

    def __call__(self, *args, **kwargs):
        return self.rows


@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
@pytest.mark.parametrize("stage", STAGES)
def test_g2_attend_and_excite(tokenizers, stage, on_unknown):
    """Attend-and-Excite takes every processor out after the prompt was encoded, and puts them back at the end."""
    plain, ours = (attend_and_excite(tokenizers["sd1"]) for _ in range(2))
    unedited = excited(plain)
    plain.encode_prompt = ByHand(plain)
    edited = excited(plain)
    differ(edited, unedited)
    memkern.patch(ours, POLICY, stage=stage, on_unknown=on_unknown)
    if stage == "embeds":
        same(excited(ours), edited)
        assert counts(ours) == (1, 0, 0, 0)
    else:
        edited_or_told(ours, on_unknown, lambda: excited(ours), edited)


ONLY_CROSS = {
    "everywhere": {"only_cross_attention": True},
    "one block": {"only_cross_attention": (True, False)},
}


def only_cross(tokenizer, options):
    torch.manual_seed(0)
    return tiny_pipeline(tokenizer, unet=unet(32, **options))


def reading_layers(pipe):
    """The layers that are given a context in a call."""
    reading, handles = {}, []
    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn1", "attn2")):

            def look(module, args, kwargs, name=name):
                if kwargs.get("encoder_hidden_states") is not None:
                    reading[name] = module

            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    image(pipe, steps=1)
    for handle in handles:
        handle.remove()
    return reading


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ONLY_CROSS)
def test_g6_blocks_whose_first_attention_reads_the_text_too(tokenizers, kind, stage):
    plain, ours = (only_cross(tokenizers["sd1"], ONLY_CROSS[kind]) for _ in range(2))
    expected = edited_image(plain, POLICY)
    differ(expected, image(plain))
    memkern.patch(ours, POLICY, stage=stage)
    same(image(ours), expected)
    assert counts(ours) == (1, 0, 0, 0)


@pytest.mark.parametrize("kind", ONLY_CROSS)
def test_g6_support_counts_them(tokenizers, kind):
    pipe = only_cross(tokenizers["sd1"], ONLY_CROSS[kind])
    count = len(reading_layers(pipe))
    assert count == 7
    assert f"{count} of {count}" in str(memkern.support(pipe))


def test_g6_in_a_window_of_steps(tokenizers):
    """The same by hand in both attentions of a block."""
    plain, ours = (only_cross(tokenizers["sd1"], {"only_cross_attention": True}) for _ in range(2))
    reading = reading_layers(plain)
    install(plain, zero_pads(roles_of(plain, [PROMPT]), lambda layer, step: step == 0))
    made = next(attn.processor for name, attn in reading.items() if name.endswith("attn2"))
    for name, attn in reading.items():
        attn.set_processor(type(made)(name, made.edit, made.clock))
    memkern.patch(ours, Policy((Edit("pad", zero(), steps=(0, 0.3)),)), stage="kv")
    same(image(ours), image(plain))

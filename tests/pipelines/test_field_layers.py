"""Layers that an edit does not reach, whatever the cause: edited or reported, in that very call (G3, G27)."""

from __future__ import annotations

import copy

import pytest
import torch
from companions import fused_qkv, ip_adapter, slicing
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from field import (
    ON_UNKNOWN,
    STAGES,
    claims,
    counts,
    edited_image,
    edited_or_told,
    image,
    is_same,
    lines,
    outcome,
    pads_zeroed,
    same,
    told,
)

import memkern
from memkern import Edit, Policy
from memkern.policy import zero
from memkern.testing import tiny_pipeline

POLICY = "zero-pad:1"
pytestmark = pytest.mark.filterwarnings("ignore:.*processors of the UNet were replaced:UserWarning")


@pytest.fixture
def plain(tokenizers):
    """The same pipeline, never patched."""
    return tiny_pipeline(tokenizers["sd1"])


def layers(pipe):
    """The layers that read the text, found by name alone."""
    return {name: module for name, module in pipe.unet.named_modules() if name.endswith("attn2")}


class Theirs(AttnProcessor2_0):
    """A tool's own processor."""


def unet_processors(pipe):
    pipe.unet.set_attn_processor(AttnProcessor2_0())


def foreign_processors(pipe):
    pipe.unet.set_attn_processor({name: Theirs() for name in pipe.unet.attn_processors})


def one_processor(pipe):
    next(iter(layers(pipe).values())).set_processor(AttnProcessor())


def one_attribute(pipe):
    """Past `set_processor`."""
    next(iter(layers(pipe).values())).processor = Theirs()


def layer_forward(pipe):
    """Wrap attention layers as HyperTile or prompt-to-prompt do: the processor is not asked at all."""
    for attn in layers(pipe).values():

        def forward(x, encoder_hidden_states=None, attention_mask=None, attn=attn, **kwargs):
            return AttnProcessor2_0()(attn, x, encoder_hidden_states, attention_mask)

        attn.forward = forward


def one_layer_forward(pipe):
    attn = list(layers(pipe).values())[-1]
    attn.forward = lambda x, encoder_hidden_states=None, **kwargs: AttnProcessor2_0()(attn, x, encoder_hidden_states)


def block_forward(pipe):
    """A transformer block that runs its layers by itself (token merging does that), and not by calling them."""
    for name, attn in layers(pipe).items():
        block = pipe.unet.get_submodule(name.removesuffix(".attn2"))

        def forward(x, attention_mask=None, encoder_hidden_states=None, block=block, attn=attn, **kwargs):
            x = block.attn1(block.norm1(x)) + x
            x = AttnProcessor2_0()(attn, block.norm2(x), encoder_hidden_states) + x
            return block.ff(block.norm3(x)) + x

        block.forward = forward


def layers_exchanged(pipe):
    """The modules themselves are copies, with processors of the plain kind."""
    for name, attn in layers(pipe).items():
        other = copy.deepcopy(attn)
        other.set_processor(AttnProcessor2_0())
        pipe.unet.get_submodule(name.removesuffix(".attn2")).attn2 = other


TOOLS = pytest.mark.parametrize(
    "tool",
    [
        unet_processors,
        foreign_processors,
        one_processor,
        one_attribute,
        layer_forward,
        one_layer_forward,
        block_forward,
        layers_exchanged,
    ],
    ids=lambda tool: tool.__name__,
)


@TOOLS
@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
def test_g3_layers_taken_before_a_call(sd1, plain, on_unknown, tool):
    memkern.patch(sd1, POLICY, stage="kv", on_unknown=on_unknown)
    tool(sd1)
    edited_or_told(sd1, on_unknown, lambda: image(sd1), edited_image(plain, POLICY))


@TOOLS
@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
def test_g3_layers_taken_inside_a_call(sd1, plain, on_unknown, tool):
    """A callback does it after the first step; the same call warns or raises."""

    def callback(pipe, step, timestep, tensors):
        if step == 0:
            tool(pipe)
        return {}

    memkern.patch(sd1, POLICY, stage="kv", on_unknown=on_unknown)
    call = lambda: image(sd1, callback_on_step_end=callback)  # noqa: E731
    edited_or_told(sd1, on_unknown, call, edited_image(plain, POLICY))


@TOOLS
@pytest.mark.parametrize("when", ["before", "inside"])
def test_g3_at_the_embeds_stage_nothing_is_lost(sd1, plain, tool, when):
    """The context is edited, whatever reads it: no warning of a loss that there is not."""
    memkern.patch(sd1, POLICY)
    if when == "before":
        tool(sd1)
    made, said = outcome(
        lambda: image(sd1, callback_on_step_end=lambda pipe, step, *rest: tool(pipe) or {} if step == 0 else {})
    )
    assert said == []
    same(made, edited_image(plain, POLICY))
    assert counts(sd1) == (1, 0, 0, 0)


def test_g3_a_layer_that_is_named(sd1):
    """The message names the layer and the cause."""
    memkern.patch(sd1, POLICY, stage="kv")
    one_layer_forward(sd1)
    _, said = outcome(lambda: image(sd1))
    name = list(layers(sd1))[-1]
    assert any(name in one for one in said), said
    assert name in lines(memkern.status(sd1).reached)


def test_g3_a_processor_put_in_and_back_between_two_steps(sd1, plain):
    """One step alone was unedited, and everything looks as it was when the call is over."""
    kept = {}

    def callback(pipe, step, timestep, tensors):
        if step == 0:
            kept.update(pipe.unet.attn_processors)
            unet_processors(pipe)
        elif step == 1:
            pipe.unet.set_attn_processor(dict(kept))
        return {}

    memkern.patch(sd1, POLICY, stage="kv")
    edited_or_told(sd1, "raise", lambda: image(sd1, callback_on_step_end=callback), edited_image(plain, POLICY))


def test_g3_the_next_call_is_protected_again(sd1, plain):
    memkern.patch(sd1, POLICY, stage="kv")
    attn = next(iter(layers(sd1).values()))
    one_layer = attn.forward
    layer_forward(sd1)
    told("raise", lambda: image(sd1))
    for other in layers(sd1).values():
        vars(other).pop("forward", None)
    assert attn.forward == one_layer
    same(image(sd1), edited_image(plain, POLICY))


def test_g3_a_window_leaves_layers_alone(sd1, plain):
    """Layers outside the policy's window are not missing; a window of sizes that no layer has in a call is reported."""
    down = lambda layer, step: layer.startswith("down")  # noqa: E731
    memkern.patch(sd1, Policy((Edit("pad", zero(), layers="down"),)))
    made, said = outcome(lambda: image(sd1))
    assert said == []
    same(made, pads_zeroed(plain.tokenizer, down))
    assert counts(sd1) == (1, 0, 0, 0)


@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
def test_g3_a_size_window_that_met_no_layer(sd1, plain, on_unknown):
    memkern.patch(sd1, Policy((Edit("pad", zero(), layers="64x64"),)), on_unknown=on_unknown)
    edited_or_told(sd1, on_unknown, lambda: image(sd1), edited_image(plain, POLICY), match="64")


def exchanged_unet(pipe):
    pipe.unet = copy.deepcopy(tiny_pipeline(pipe.tokenizer).unet)
    return {}


LOST = {"fused QKV": fused_qkv, "attention slicing": slicing, "IP-Adapter": ip_adapter, "a UNet": exchanged_unet}


@pytest.mark.parametrize("on_unknown", ["warn", "pass"])
@pytest.mark.parametrize("name", LOST)
def test_g27_status_tells_what_reached_the_unet(sd1, plain, name, on_unknown):
    memkern.patch(sd1, POLICY, stage="kv", on_unknown=on_unknown)
    options = LOST[name](sd1)
    LOST[name](plain)
    made, _ = outcome(lambda: image(sd1, **options))
    status = memkern.status(sd1)
    if is_same(made, image(plain, **options)):
        assert claims(status) == []
        assert counts(sd1) == (0, 0, 1, 0)
        assert lines(status.reached)
    else:
        same(made, edited_image(plain, POLICY, **options))
        assert claims(status)
        assert counts(sd1) == (1, 0, 0, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_g27_status_claims_what_did_reach_it(sd1, stage):
    memkern.patch(sd1, POLICY, stage=stage)
    image(sd1)
    status = memkern.status(sd1)
    assert claims(status)
    assert counts(sd1) == (1, 0, 0, 0)


def test_g27_passed_embeddings_are_not_claimed(sd1, plain):
    """Raw embeddings after a prompt that was edited: the former prompt's edits are not claimed for them."""
    cond, uncond = (part.detach() for part in plain.encode_prompt("a cat", torch.device("cpu"), 1, True))
    memkern.patch(sd1, POLICY, on_unknown="pass")
    image(sd1)
    assert claims(memkern.status(sd1))
    image(sd1, None, prompt_embeds=cond, negative_prompt_embeds=uncond)
    status = memkern.status(sd1)
    assert claims(status) == []
    assert counts(sd1) == (1, 0, 1, 0)

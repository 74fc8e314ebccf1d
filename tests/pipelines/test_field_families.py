"""Pipelines whose text goes other ways than most, and encoders that are not what they were (G7, G8, G9, G24, G25)."""

from __future__ import annotations

import re
import types

import diffusers
import pytest
import torch
from by_hand import context
from families import build, sdxl_families, text_encoder, unet
from field import ON_UNKNOWN, PROMPT, STAGES, claims, counts, differ, halves, image, outcome, same, told
from kv_by_hand import install, ren, roles_of
from transformers import CLIPTextModelWithProjection

import memkern
from memkern import Edit, Policy
from memkern.policy import exclude, zero
from memkern.testing import tiny_pipeline

POLICY = "zero-pad:0.7"


def cascade_unet(**options):
    given = {
        "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 16,
        "block_out_channels": (16,), "num_attention_heads": (2,), "down_num_layers_per_block": (1,),
        "up_num_layers_per_block": (1,), "down_blocks_repeat_mappers": (1,), "up_blocks_repeat_mappers": (1,),
        "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),),
        "clip_text_pooled_in_channels": 32, "clip_seq": 1, "dropout": (0.0,), "self_attn": (True,),
        "switch_level": (),
    }  # fmt: skip
    return diffusers.models.StableCascadeUNet(**{**given, **options}).eval()


def cascade_parts(tokenizers):
    torch.manual_seed(0)
    tokenizer = tokenizers["sd1"]
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder(tokenizer, 32, CLIPTextModelWithProjection),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
        "decoder": cascade_unet(),
        "prior": cascade_unet(clip_text_in_channels=32, clip_image_in_channels=16),
    }


CASCADE = ["StableCascadeDecoderPipeline", "StableCascadePriorPipeline", "StableCascadeCombinedPipeline"]


@pytest.mark.parametrize("policy", [POLICY, "none", "swap-pad-zero-eot"])
@pytest.mark.parametrize("name", CASCADE)
def test_g7_stable_cascade_is_refused(tokenizers, name, policy):
    """Its decoder reads pooled outputs only; its prior returns other outputs in other places."""
    parts = cascade_parts(tokenizers)
    if name == "StableCascadeCombinedPipeline":
        named = {f"prior_{part}": parts[part] for part in ("prior", "text_encoder", "tokenizer", "scheduler")}
        parts |= {**named, "prior_prior": parts["prior"]}
    pipe = build(getattr(diffusers, name), parts)
    with pytest.raises(ValueError, match=rf"{name} cannot be patched: .*\w") as refusal:
        memkern.patch(pipe, policy)
    assert not memkern.support(pipe)
    assert memkern.support(pipe).refusals
    assert not memkern.status(pipe).patched
    if name != "StableCascadeCombinedPipeline":
        reason = str(refusal.value).partition("cannot be patched:")[2]
        assert re.search("pooled|returns|outputs", reason), "the reason is what its encode_prompt returns, and where"


def gligen(tokenizer):
    parts = tiny_pipeline(tokenizer).components
    torch.manual_seed(0)
    parts["unet"] = unet(32, attention_type="gated")
    for name, parameter in parts["unet"].named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):  # zero in a new one: its boxes would not matter
            parameter.data.fill_(1.0)
    return build(diffusers.StableDiffusionGLIGENPipeline, parts, safety_checker=None)


def grounded(pipe, prompt=PROMPT, phrases=("a dog", "a tree"), **options):
    boxes = [[0.1, 0.1, 0.5, 0.5], [0.4, 0.4, 0.9, 0.9]][: len(phrases)]
    options = {"gligen_scheduled_sampling_beta": 1.0, **options}
    return image(pipe, prompt, gligen_phrases=list(phrases), gligen_boxes=boxes, **options)


@pytest.mark.parametrize("policy", ["swap-pad-zero-eot", "swap-pad", "zero-pad:1", "zero-eot-pad"])
@pytest.mark.parametrize("stage", STAGES)
def test_g8_gligen(tokenizers, stage, policy):
    """Its phrases are encoded inside the call, and their pooled output is what it was; the prompt is edited."""
    plain, ours = (gligen(tokenizers["sd1"]) for _ in range(2))
    cond, uncond = halves(plain, PROMPT, policy)
    expected = grounded(plain, None, prompt_embeds=cond, negative_prompt_embeds=uncond)
    unedited = grounded(plain)
    differ(expected, unedited)
    differ(unedited, grounded(plain, phrases=["a house", "a boat"]))
    memkern.patch(ours, policy, stage=stage)
    for _ in range(2):
        same(grounded(ours), expected)
    assert counts(ours) == (2, 0, 0, 0)
    memkern.unpatch(ours)
    assert torch.equal(grounded(ours), unedited)


@pytest.mark.parametrize("phrase", [PROMPT, ""])
def test_g8_gligen_with_an_edit_of_logits(tokenizers, phrase):
    """A phrase may be the prompt itself."""
    plain, ours = (gligen(tokenizers["sd1"]) for _ in range(2))
    memkern.patch(ours, "ren:1.25")
    expected = grounded(install(plain, ren(roles_of(plain, [PROMPT]), 1, 1.25)), phrases=[phrase])
    same(grounded(ours, phrases=[phrase]), expected)


class Engine(torch.nn.Module):
    """A text encoder as TensorRT and the like replace it: it is called the same, and has no CLIP inside."""

    def __init__(self, encoder):
        super().__init__()
        self.config, self.dtype = encoder.config, encoder.dtype
        self.run = types.SimpleNamespace(encoder=encoder)  # not a submodule

    @property
    def device(self):
        return torch.device("cpu")

    def forward(self, input_ids, attention_mask=None, **options):
        return self.run.encoder(input_ids, attention_mask=attention_mask, **options)


def sdxl(tokenizers):
    return sdxl_families(tokenizers)["StableDiffusionXLPipeline"]().pipe


@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("which", ["text_encoder", "SDXL's text_encoder", "SDXL's text_encoder_2", "both"])
def test_g9_a_text_encoder_exchanged_for_an_engine(tokenizers, which, stage, on_unknown):
    make = sdxl if which != "text_encoder" else lambda tokenizers: tiny_pipeline(tokenizers["sd1"])
    plain, ours = make(tokenizers), make(tokenizers)
    memkern.patch(ours, POLICY, stage=stage, on_unknown=on_unknown)
    protected = image(ours)
    names = ["text_encoder", "text_encoder_2"] if which == "both" else [which.split()[-1]]
    kept = {name: getattr(ours, name) for name in names}
    for name in names:
        setattr(ours, name, Engine(getattr(plain, name)))
    made = told(on_unknown, lambda: image(ours), "exchanged|not a CLIP|Engine")
    if made is not None and which in ("text_encoder", "both"):
        same(made, image(plain))
        assert claims(memkern.status(ours)) == []
    assert counts(ours)[2:] == ((0, 1) if on_unknown == "raise" else (1, 0))
    str(memkern.status(ours))
    for name, encoder in kept.items():
        setattr(ours, name, encoder)
    same(image(ours), protected)
    memkern.unpatch(ours)
    same(image(ours), image(plain))


def test_g9_unpatch_with_the_engine_in_place(tokenizers):
    pipe = tiny_pipeline(tokenizers["sd1"])
    former = pipe.text_encoder
    memkern.patch(pipe, POLICY)
    pipe.text_encoder = Engine(tiny_pipeline(tokenizers["sd1"]).text_encoder)
    memkern.unpatch(pipe)
    assert not memkern.status(pipe).patched
    image(pipe)
    pipe.text_encoder = former
    assert torch.equal(image(pipe), image(tiny_pipeline(tokenizers["sd1"])))


SPLIT_APART = "wow!! a cat"
"""The two tokenizers of SDXL make different tokens of it: "!" alone is the second one's padding."""


def test_g24_the_tokenizers_do_differ(tokenizers):
    ids = [tokenizers[name](SPLIT_APART).input_ids for name in ("sd1", "sd2")]
    assert len(ids[0]) != len(ids[1])


@pytest.mark.parametrize("prompt", [SPLIT_APART, [SPLIT_APART, "a photograph of a dog"]], ids=["one", "two"])
@pytest.mark.parametrize("policy", [POLICY, "swap-pad-zero-eot", "zero-eot-pad"])
def test_g24_each_encoders_columns_by_their_own_roles(tokenizers, policy, prompt):
    """The image at the kv stage is that at the embeds stage."""
    plain, ours = sdxl(tokenizers), sdxl(tokenizers)
    memkern.patch(plain, policy)
    memkern.patch(ours, policy, stage="kv")
    made, said = outcome(lambda: image(ours, prompt))
    assert said == []
    same(made, image(plain, prompt))
    assert counts(ours) == (1 if isinstance(prompt, str) else 2, 0, 0, 0)


def test_g24_a_second_prompt_of_other_roles(tokenizers):
    plain, ours = sdxl(tokenizers), sdxl(tokenizers)
    memkern.patch(plain, POLICY)
    memkern.patch(ours, POLICY, stage="kv")
    options = {"prompt_2": "a photograph of a dog"}
    same(image(ours, **options), image(plain, **options))


@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
def test_g24_a_key_that_cannot_be_both(tokenizers, on_unknown):
    """A logit belongs to a whole key. The refusal says why, and blames no `prompt_2` that was not given."""
    pipe = sdxl(tokenizers)
    memkern.patch(pipe, "ren:1.25", on_unknown=on_unknown)
    made, said = outcome(lambda: image(pipe, SPLIT_APART))
    assert (made is None) == (on_unknown == "raise")
    assert bool(said) == (on_unknown != "pass")
    for one in said:
        assert "tokenizer" in one
        assert "prompt_2" not in one
    image(pipe, PROMPT)
    # Of the prompt and of its negative, which is cut at its length.
    assert counts(pipe) == ((1, 0, 0, 1) if on_unknown == "raise" else (1, 0, 2, 0))


def overflowing(tokenizer):
    """A pipeline whose text encoder returns NaN behind the end of each prompt, and is fine up to there."""
    pipe = tiny_pipeline(tokenizer)

    def spoil(module, args, kwargs, output):
        ids = args[0] if args else kwargs["input_ids"]
        for row, own in zip(output.last_hidden_state, ids.tolist(), strict=True):
            row[own.index(tokenizer.eos_token_id) + 1 :] = torch.nan

    pipe.text_encoder.register_forward_hook(spoil, with_kwargs=True)
    return pipe


BOTH = {
    "zeroed": Policy((Edit("pad", zero(), branch="both"),)),
    "excluded": Policy((Edit("pad", exclude(), branch="both"),)),
}


@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_g25_nan_in_a_pads_embedding(tokenizers, family, stage):
    """The pad is recognised as what was encoded, and zeroed."""
    plain, ours = (overflowing(tokenizers[family]) for _ in range(2))
    rows = context(plain, [PROMPT], "zero-pad:1", guided=False)
    assert rows.isfinite().all()
    expected = image(plain, None, prompt_embeds=rows, guidance_scale=1.0)
    memkern.patch(ours, "zero-pad:1", stage=stage)
    made, said = outcome(lambda: image(ours, guidance_scale=1.0))
    assert said == []
    assert made.isfinite().all()
    same(made, expected)
    assert counts(ours) == (1, 0, 0, 0)


@pytest.mark.parametrize("name", BOTH)
def test_g25_nan_on_both_branches(tokenizers, name):
    """Excluded too: the values of a key that gets no attention do not matter."""
    plain, ours = tiny_pipeline(tokenizers["sd1"]), overflowing(tokenizers["sd1"])
    memkern.patch(plain, BOTH[name], stage="kv")
    memkern.patch(ours, BOTH[name], stage="kv")
    made, said = outcome(lambda: image(ours))
    assert said == []
    same(made, image(plain))

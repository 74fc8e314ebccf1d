"""The tensor that reaches the UNet is the one of the paper's procedure, bit for bit where nothing is computed."""

from __future__ import annotations

import pytest
import torch
from by_hand import PRESETS, context, tokenize
from presets import numbered
from prompts import published_prompts
from unet_input import context_of

import memkern
from memkern import Edit
from memkern.policy import zero

PROMPTS = [
    "a photograph of an astronaut riding a horse",
    "",
    "hi!",
    "cat " * 200,
    "cat " * 76,
    "cat " * 75,
    "cat " * 74,
    "a ! b !! <|endoftext|> c",
    "ends with <|endoftext|>",
    "cat",
]


def assert_same(actual, expected, policy):
    """Bitwise; the one preset that computes a mean, to float32's rounding of it."""
    if policy == "prompt-eot-from-pad":
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(actual, expected)


def test_every_embeds_preset_is_here():
    embeds_stage = {name for name, preset in memkern.PRESETS.items() if not numbered(preset).kv_reasons()}
    assert {policy.partition(":")[0] for policy in PRESETS} == embeds_stage


@torch.no_grad()
@pytest.mark.parametrize("policy", PRESETS)
def test_single_prompts(pipe, policy):
    memkern.patch(pipe, policy)
    for prompt in PROMPTS:
        actual = context_of(pipe, prompt)
        memkern.unpatch(pipe)
        assert_same(actual, context(pipe, [prompt], policy), policy)
        memkern.patch(pipe, policy)


@torch.no_grad()
@pytest.mark.parametrize("policy", PRESETS)
def test_a_batch_with_negatives_and_several_images(pipe, policy):
    negatives = ["blurry", "", "bad! <|endoftext|> worse", *PROMPTS[3:]]
    with memkern.patched(pipe, policy):
        actual = context_of(pipe, PROMPTS, negative_prompt=negatives, num_images_per_prompt=2)
    assert_same(actual, context(pipe, PROMPTS, policy, negatives, images=2), policy)


@torch.no_grad()
@pytest.mark.parametrize("policy", PRESETS)
def test_published_prompts(pipe, policy):
    prompts = published_prompts(100)
    if not prompts:
        prompts = PROMPTS * 4
    with memkern.patched(pipe, policy):
        actual = context_of(pipe, prompts)
    assert_same(actual, context(pipe, prompts, policy), policy)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0, 1, 1.01])
def test_c15_guidance_off_and_on(pipe, guidance):
    with memkern.patched(pipe) as patch:
        actual = context_of(pipe, "a cat", guidance_scale=guidance)
        assert {row.branch for row in patch.status().prompts} == ({"cond", "uncond"} if guidance > 1 else {"cond"})
    assert torch.equal(actual, context(pipe, ["a cat"], "swap-pad-zero-eot", guided=guidance > 1))


@torch.no_grad()
@pytest.mark.parametrize("negative", [None, "", "text"])
def test_negative_prompts(pipe, negative):
    with memkern.patched(pipe):
        actual = context_of(pipe, "a cat", negative_prompt=negative)
    assert torch.equal(actual, context(pipe, ["a cat"], "swap-pad-zero-eot", [negative or ""]))


class NestedTextModel(torch.nn.Module):
    """The layout of transformers before 5.6: the parts of CLIPTextModel under `.text_model`."""

    def __init__(self, flat):
        super().__init__()
        self.text_model = flat
        self.config = flat.config

    @property
    def dtype(self):
        return self.text_model.dtype

    @property
    def device(self):
        return self.text_model.device

    def forward(self, *args, **kwargs):
        return self.text_model(*args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("policy", ["swap-pad-zero-eot", "zero-pad:0.7"])
def test_c21_clip_skip_in_both_layouts(pipe, layout, policy):
    flat = pipe.text_encoder
    if not hasattr(flat, "text_model"):
        if layout == "nested":
            pipe.text_encoder = NestedTextModel(flat)
        else:
            # diffusers 0.42 reaches final_layer_norm through `.text_model`, which transformers 5.6 took away.
            flat.__dict__["text_model"] = flat
    prompts = ["a cat", "hi! there"]
    with memkern.patched(pipe, policy):
        actual = context_of(pipe, prompts, clip_skip=1)
    expected = context(pipe, prompts, policy, clip_skip=1)
    assert torch.equal(actual, expected)
    assert not torch.equal(expected, context(pipe, prompts, policy))


@torch.no_grad()
def test_c6_a_pad_swap_changes_pads_only(sd1):
    """Rows up to EOT and the pooled output are bitwise those of the unpatched encoder."""
    prompts = published_prompts(200) or [prompt for prompt in PROMPTS if "endoftext" not in prompt]
    ids = sd1.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    before = sd1.text_encoder(ids)
    with memkern.patched(sd1, "swap-pad") as patch, patch.encoding("cond"):
        after = sd1.text_encoder(ids)
    assert torch.equal(after.pooler_output, before.pooler_output)
    roles = memkern.token_roles(ids)
    pads = roles == memkern.Role.PAD
    assert torch.equal(after.last_hidden_state[~pads], before.last_hidden_state[~pads])
    assert not torch.isclose(after.last_hidden_state[pads], before.last_hidden_state[pads]).all(-1).any()


@torch.no_grad()
def test_c3_the_tokenizer_is_not_touched(pipe):
    tokenizer = pipe.tokenizer
    before = (vars(tokenizer).copy(), tokenizer.pad_token, tokenizer("hi! you").input_ids)
    with memkern.patched(pipe):
        context_of(pipe, "hi! you")
        assert pipe.tokenizer is tokenizer
    assert (vars(tokenizer), tokenizer.pad_token, tokenizer("hi! you").input_ids) == before
    assert pipe.config["tokenizer"][1] == type(tokenizer).__name__


PAIRED = memkern.Policy([Edit("pad", zero(), branch="uncond", roles_of="cond")])


@torch.no_grad()
@pytest.mark.parametrize("given", [False, True], ids=["encoded together", "the prompt's embeddings given"])
def test_negatives_edited_by_the_roles_of_their_prompts(sd1, given):
    prompts, negatives = ["a cat", "a photograph of an astronaut"], ["blurry and dull, a bad picture", ""]
    plain = context(sd1, prompts, "none", negatives)
    eots = tokenize(sd1.tokenizer, prompts, False)[1]
    expected = plain.clone()
    for row, eot in enumerate(eots):
        expected[row, eot + 1 :] = 0
    patch = memkern.patch(sd1, PAIRED)
    prompt = {"prompt": prompts}
    if given:
        prompt = {"prompt_embeds": sd1.encode_prompt(prompts, "cpu", 1, True, negatives)[0]}
    assert torch.equal(context_of(sd1, **prompt, negative_prompt=negatives), expected)

    raw, ids = plain[:2], tokenize(sd1.tokenizer, negatives, False)[0]
    with pytest.raises(
        ValueError,
        match="cond_input_ids: policy 'zero PAD on uncond by the roles of cond' edits negative rows by the roles",
    ):
        memkern.apply_policy(raw, ids, PAIRED, branch="uncond")
    cond_ids = tokenize(sd1.tokenizer, prompts, False)[0]
    assert torch.equal(memkern.apply_policy(raw, ids, PAIRED, branch="uncond", cond_input_ids=cond_ids), expected[:2])
    with patch.encoding("uncond") as edited:
        rows = sd1.text_encoder(ids)[0]
        with pytest.raises(memkern.UnmitigatedError, match="its prompt was not encoded with it"):
            edited(rows)

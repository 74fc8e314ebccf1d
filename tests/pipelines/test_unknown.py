"""Prompts that cannot be classified raise or warn as `on_unknown` says; what memkern edited itself is recognised."""

from __future__ import annotations

import warnings

import pytest
import torch
from by_hand import context
from unet_input import context_of

import memkern

CPU = torch.device("cpu")


def encode(pipe, prompt):
    """Embeddings made without the pipeline's encode_prompt, [1, 77, D], and their ids."""
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return pipe.text_encoder(ids)[0], ids


@pytest.fixture
def foreign(sd1):
    with torch.no_grad():
        return encode(sd1, "a cat")


@torch.no_grad()
def test_c10_raise_is_the_default_and_forgets_the_previous_prompt(sd1, foreign):
    memkern.patch(sd1)
    context_of(sd1, "another prompt of six words")
    with pytest.raises(memkern.UnmitigatedError, match="prompt_embeds carries no token ids and is not made by memkern"):
        context_of(sd1, prompt_embeds=foreign[0])


@torch.no_grad()
def test_warn_and_pass_leave_the_embeddings_alone(sd1, foreign):
    embeds = foreign[0]
    plain = context_of(sd1, prompt_embeds=embeds, negative_prompt_embeds=embeds)
    with (
        memkern.patched(sd1, "zero-pad:0.7", on_unknown="warn"),
        pytest.warns(memkern.UnmitigatedWarning, match=r"would not be protected: prompt_embeds .*on_unknown='warn'"),
    ):
        assert torch.equal(context_of(sd1, prompt_embeds=embeds, negative_prompt_embeds=embeds), plain)
    with memkern.patched(sd1, on_unknown="pass"), warnings.catch_warnings():
        warnings.simplefilter("error", memkern.UnmitigatedWarning)
        assert torch.equal(context_of(sd1, prompt_embeds=embeds, negative_prompt_embeds=embeds), plain)
        passed, _ = sd1.encode_prompt(None, CPU, 1, False, prompt_embeds=embeds)
    with memkern.patched(sd1), pytest.raises(memkern.UnmitigatedError, match="not made by memkern"):
        context_of(sd1, prompt_embeds=passed)


@torch.no_grad()
def test_only_what_the_policy_touches_is_asked_for(sd1, foreign):
    embeds = foreign[0]
    with memkern.patched(sd1, "none"):
        context_of(sd1, prompt_embeds=embeds, negative_prompt_embeds=embeds)
        encode(sd1, "the text encoder, directly")
    with memkern.patched(sd1, "zero-eot"):  # leaves the uncond branch alone
        actual = context_of(sd1, "a cat", negative_prompt_embeds=embeds)
    assert torch.equal(actual[:1], embeds)
    with (
        memkern.patched(sd1, "swap-pad"),
        pytest.raises(memkern.UnmitigatedError, match="negative_prompt_embeds carries"),
    ):
        context_of(sd1, "a cat", negative_prompt_embeds=embeds)
    with memkern.patched(sd1, "swap-pad"):  # guidance off: negative embeddings are not used
        context_of(sd1, "a cat", negative_prompt_embeds=embeds, guidance_scale=1)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["swap-pad-zero-eot", "zero-pad:0.7"])
def test_what_encode_prompt_returned_is_recognised(sd1, policy):
    memkern.patch(sd1, policy)
    direct = context_of(sd1, "a cat", negative_prompt="blurry", num_images_per_prompt=2)
    cond, uncond = sd1.encode_prompt("a cat", CPU, 1, True, "blurry")
    again = context_of(sd1, prompt_embeds=cond, negative_prompt_embeds=uncond, num_images_per_prompt=2)
    assert torch.equal(again, direct)


@torch.no_grad()
def test_recognition_is_by_value_and_policy(sd1):
    patch = memkern.patch(sd1, "zero-eot")
    cond, uncond = sd1.encode_prompt("a cat", CPU, 1, True)
    assert torch.equal(context_of(sd1, prompt_embeds=cond.clone())[1:], cond)
    assert torch.equal(context_of(sd1, prompt_embeds=torch.cat([cond, cond]), guidance_scale=1)[:1], cond)
    for other in (cond + 1e-3, cond.double().float() * 2):
        with pytest.raises(memkern.UnmitigatedError, match="not made by memkern"):
            context_of(sd1, prompt_embeds=other)
    patch.update("zero-pad:0.7")
    with pytest.raises(memkern.UnmitigatedError, match="as cond under 'zero-eot', while 'zero-pad:0.7' is in force"):
        context_of(sd1, prompt_embeds=cond, negative_prompt_embeds=uncond)
    patch.update("zero-eot")
    context_of(sd1, prompt_embeds=cond, negative_prompt_embeds=uncond)
    cond.mul_(2)
    with pytest.raises(memkern.UnmitigatedError, match="not made by memkern"):
        context_of(sd1, prompt_embeds=cond, negative_prompt_embeds=uncond)


@torch.no_grad()
def test_embeddings_of_the_other_branch_are_not_vouched_for(sd1, foreign):
    """A row that was left alone as a negative prompt is not protected as a prompt."""
    memkern.patch(sd1, "zero-eot")
    _, uncond = sd1.encode_prompt("a cat", CPU, 1, True, "a cat")
    with pytest.raises(memkern.UnmitigatedError, match="is edited as uncond under 'zero-eot'"):
        context_of(sd1, prompt_embeds=uncond, negative_prompt_embeds=uncond)
    untouched = memkern.apply_policy(*foreign, "zero-eot", branch="uncond")
    with pytest.raises(memkern.UnmitigatedError):
        context_of(sd1, prompt_embeds=untouched, negative_prompt_embeds=uncond)
    memkern.patch(sd1, "swap-pad-zero-eot")
    _, uncond = sd1.encode_prompt("a cat", CPU, 1, True, "a cat")
    with pytest.raises(memkern.UnmitigatedError, match="edited as uncond under 'swap-pad-zero-eot'"):
        context_of(sd1, prompt_embeds=uncond, negative_prompt_embeds=uncond)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["zero-pad:0.7", "prompt-from-eot", "zero-eot-pad"])
def test_apply_policy_to_embeddings_made_elsewhere(sd1, foreign, policy):
    embeds, ids = foreign
    edited = memkern.apply_policy(embeds, ids, policy)
    assert torch.equal(edited, context(sd1, ["a cat"], policy, guided=False))
    memkern.patch(sd1, policy)
    assert torch.equal(context_of(sd1, prompt_embeds=edited, guidance_scale=1), edited)
    several = memkern.apply_policy(embeds.repeat_interleave(3, 0), ids, policy)
    assert torch.equal(several, edited.repeat(3, 1, 1))
    assert memkern.apply_policy(embeds, ids, policy, branch="uncond") is embeds


@torch.no_grad()
def test_apply_policy_checks_that_the_pads_are_re_embedded(sd1, foreign):
    embeds, ids = foreign
    with pytest.raises(ValueError, match=r"re-embeds the pads, which embeddings alone cannot do: input_ids has 73 PAD"):
        memkern.apply_policy(embeds, ids, "swap-pad-zero-eot")
    swapped = ids.masked_fill(memkern.token_roles(ids) == memkern.Role.PAD, 0)
    edited = memkern.apply_policy(sd1.text_encoder(swapped)[0], swapped, "swap-pad-zero-eot")
    assert torch.equal(edited, context(sd1, ["a cat"], "swap-pad-zero-eot", guided=False))


@torch.no_grad()
def test_direct_calls_of_the_text_encoder(sd1):
    expected = context(sd1, ["a cat"], "swap-pad-zero-eot", ["a cat"])
    patch = memkern.patch(sd1)
    with pytest.raises(memkern.UnmitigatedError, match=r"or directly \(use `with patch.encoding\('cond'\):`\)"):
        encode(sd1, "a cat")
    rows = {}
    for branch in ("uncond", "cond"):
        with patch.encoding(branch) as edited:
            with pytest.raises(ValueError, match="embeds: text_encoder has not been called inside patch.encoding"):
                edited(torch.zeros(1, 77, 32))
            rows[branch] = edited(encode(sd1, "a cat")[0])
    assert torch.equal(torch.cat([rows["uncond"], rows["cond"]]), expected)
    actual = context_of(sd1, prompt_embeds=rows["cond"], negative_prompt_embeds=rows["uncond"])
    assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="branch: expected one of cond, uncond, got 'left'"), patch.encoding("left"):
        pass


@torch.no_grad()
def test_an_encode_prompt_that_encodes_otherwise_is_reported(sd1):
    original = sd1.encode_prompt

    def twice(
        prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt=None,
        prompt_embeds=None, negative_prompt_embeds=None, **options,
    ):  # fmt: skip
        encode(sd1, "something else")
        return original(prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, **options)

    sd1.encode_prompt = twice
    memkern.patch(sd1)
    with pytest.raises(memkern.UnmitigatedError, match="called the text encoders 3 times where 2 were expected"):
        context_of(sd1, "a cat")


@pytest.mark.parametrize(
    ("embeds", "ids", "message"),
    [
        (
            torch.zeros(1, 76, 8),
            torch.full((1, 77), 49407),
            r"embeds: expected \[B·n, L, D\] for roles \[1, 77\], got \[1, 76, 8\]",
        ),
        (
            torch.zeros(3, 77, 8),
            torch.full((2, 77), 49407),
            r"embeds: expected \[B·n, L, D\] for roles \[2, 77\], got \[3, 77, 8\]",
        ),
        (torch.zeros(1, 77, 8), torch.zeros(1, 77, dtype=torch.int64), "has no end-of-text token"),
    ],
)
def test_apply_policy_refusals(embeds, ids, message):
    with pytest.raises(ValueError, match=message):
        memkern.apply_policy(embeds, ids, "zero-eot")


def test_apply_policy_needs_the_reembedded_rows_it_reads():
    policy = memkern.Policy([memkern.Edit("pad", memkern.policy.replace("pad-reembedded"))])
    ids = torch.tensor([[49406, 320, 2368] + 74 * [49407]])
    with pytest.raises(
        ValueError, match="reembedded: policy .* reads the prompt encoded with '!' for its pads as well"
    ):
        memkern.apply_policy(torch.randn(1, 77, 8), ids, policy)

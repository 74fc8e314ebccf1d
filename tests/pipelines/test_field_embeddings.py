"""Embeddings that are not what they seem: written to, put in by a callback, returned by a cache (G1, G4, G5, G26)."""

from __future__ import annotations

import pytest
import torch
from families import sdxl_families
from field import ON_UNKNOWN, OTHER, PROMPT, STAGES, counts, edited_image, halves, image, outcome, same, told
from kv_by_hand import install, ren, roles_of

import memkern
from memkern.testing import tiny_pipeline

CPU = torch.device("cpu")
POLICY = "zero-pad:0.7"


@pytest.fixture
def plain(tokenizers):
    """The same pipeline, never patched."""
    return tiny_pipeline(tokenizers["sd1"])


def encode(pipe, prompt=PROMPT):
    return pipe.encode_prompt(prompt, CPU, 1, True)


def overwritten(cond, unedited):
    cond.copy_(unedited)


def scaled(cond, unedited):
    cond.mul_(2)


def written_through_a_view(cond, unedited):
    cond[0, 5:].copy_(unedited[0, 5:])


WRITES = pytest.mark.parametrize("write", [overwritten, scaled, written_through_a_view])


@WRITES
@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
@pytest.mark.parametrize("stage", STAGES)
@torch.inference_mode()
def test_g1_embeddings_of_inference_mode_that_were_written_to(sd1, plain, stage, on_unknown, write):
    """Inference tensors do not count their writes: identity alone does not prove that they are unchanged."""
    unedited, _ = encode(plain)
    memkern.patch(sd1, POLICY, stage=stage, on_unknown=on_unknown)
    cond, uncond = encode(sd1)
    write(cond, unedited if stage == "embeds" else unedited + 1)
    made = told(on_unknown, lambda: image(sd1, None, prompt_embeds=cond, negative_prompt_embeds=uncond))
    if made is not None:
        same(made, image(plain, None, prompt_embeds=cond, negative_prompt_embeds=uncond))
        assert counts(sd1) == (0, 0, 1, 0)


@pytest.mark.parametrize("stage", STAGES)
@torch.inference_mode()
def test_g1_negatives_that_were_written_to(sd1, plain, stage):
    """A swap of pads is for the uncond rows as well."""
    _, unedited = encode(plain)
    memkern.patch(sd1, "swap-pad", stage=stage)
    cond, uncond = encode(sd1)
    uncond.copy_(unedited)
    told("raise", lambda: image(sd1, None, prompt_embeds=cond, negative_prompt_embeds=uncond))


@torch.inference_mode()
def test_g1_what_apply_policy_made_and_was_written_to(sd1, plain):
    unedited, _ = encode(plain)
    ids = plain.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    memkern.patch(sd1, POLICY)
    edited = memkern.apply_policy(unedited, ids, POLICY)
    _, uncond = encode(sd1)
    same(
        image(sd1, None, prompt_embeds=edited, negative_prompt_embeds=uncond),
        edited_image(plain, POLICY),
    )
    edited.copy_(unedited)
    told("raise", lambda: image(sd1, None, prompt_embeds=edited, negative_prompt_embeds=uncond))


class PutIn:
    """A callback that gives the pipeline another context after its first step."""

    def __init__(self, context, *, in_place=False):
        self.context, self.in_place = context, in_place

    def __call__(self, pipe, step, timestep, tensors):
        if step != 0:
            return {}
        if self.in_place:
            tensors["prompt_embeds"].copy_(self.context)
            return {}
        return {"prompt_embeds": self.context}


def with_callback(pipe, callback, prompt=PROMPT, **options):
    return image(
        pipe,
        prompt,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        **options,
    )


def scheduled(pipe, policy, first, second):
    """The image of an unpatched pipeline: its context edited by hand, then another one edited by hand."""
    cond, uncond = halves(pipe, first, policy)
    callback = PutIn(torch.cat(halves(pipe, second, policy)[::-1]))
    return with_callback(pipe, callback, None, prompt_embeds=cond, negative_prompt_embeds=uncond)


@pytest.mark.parametrize("in_place", [False, True], ids=["another tensor", "written to"])
@pytest.mark.parametrize("prompt", [PROMPT, OTHER])
@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
@pytest.mark.parametrize("stage", STAGES)
def test_g4_unedited_embeddings_put_in_by_a_callback_are_noticed(sd1, plain, stage, on_unknown, prompt, in_place):
    """The prompt's own, which at the kv stage is what memkern itself encoded, and another prompt's."""
    if stage == "kv" and prompt == PROMPT:
        prompt = "something else"
    unedited = torch.cat(encode(plain, prompt)[::-1])
    memkern.patch(sd1, POLICY, stage=stage, on_unknown=on_unknown)
    made = told(on_unknown, lambda: with_callback(sd1, PutIn(unedited, in_place=in_place)))
    if made is None:
        assert counts(sd1) == (0, 0, 0, 1)
        return
    _, exempt, unedited_rows, refused = counts(sd1)
    assert (exempt, refused) == (0, 0)
    assert unedited_rows >= 1
    cond, uncond = halves(plain, PROMPT, POLICY)
    same(
        made,
        with_callback(plain, PutIn(unedited), None, prompt_embeds=cond, negative_prompt_embeds=uncond),
    )


def test_g4_a_callback_of_one_branch_only(sd1, plain):
    """Half of the context is memkern's own; the other half is unedited."""
    unedited, _ = encode(plain)
    memkern.patch(sd1, POLICY)

    def callback(pipe, step, timestep, tensors):
        uncond, _ = tensors["prompt_embeds"].chunk(2)
        return {"prompt_embeds": torch.cat([uncond, unedited])}

    told("raise", lambda: with_callback(sd1, callback))


@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
@torch.inference_mode()
def test_g4_a_context_of_inference_mode_written_to_by_a_callback(sd1, plain, on_unknown):
    unedited = torch.cat(encode(plain)[::-1])
    memkern.patch(sd1, POLICY, on_unknown=on_unknown)
    told(on_unknown, lambda: with_callback(sd1, PutIn(unedited, in_place=True)))
    assert bool(counts(sd1)[2]) == (on_unknown != "raise")


@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
@torch.no_grad()
def test_g4_unedited_embeddings_of_sdxl(tokenizers, on_unknown):
    plain, ours = (sdxl_families(tokenizers)["StableDiffusionXLPipeline"]() for _ in range(2))
    cond, uncond, *_ = plain.pipe.encode_prompt(PROMPT, device=CPU)
    memkern.patch(ours.pipe, POLICY, on_unknown=on_unknown)
    callback = PutIn(torch.cat([uncond, cond]))
    inputs = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    told(on_unknown, lambda: ours(PROMPT, steps=3, **inputs))
    assert bool(counts(ours.pipe)[2]) == (on_unknown != "raise")


@pytest.mark.parametrize("kept", [True, False], ids=["parts kept", "parts dropped"])
@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_g5_memkerns_own_embeddings_put_in_by_a_callback(sd1, plain, stage, kept):
    """A schedule of edited contexts is edited at every step; concatenated ones are recognised by value."""
    expected = scheduled(plain, POLICY, PROMPT, OTHER)
    memkern.patch(sd1, POLICY, stage=stage)
    cond, uncond = encode(sd1, OTHER)
    callback = PutIn(torch.cat([uncond, cond]))
    if not kept:
        del cond, uncond
    made, said = outcome(lambda: with_callback(sd1, callback))
    assert said == []
    same(made, expected)
    assert counts(sd1)[2:] == (0, 0)


@torch.no_grad()
def test_g5_logits_follow_the_schedule(sd1, plain):
    """Edits of the kv stage go by the roles of the prompt that is in force at that step."""
    of = [ren(roles_of(plain, [prompt]), 1, 1.25) for prompt in (PROMPT, OTHER)]
    other = torch.cat(encode(plain, OTHER)[::-1])
    by_step = install(tiny_pipeline(plain.tokenizer), lambda layer, step, *rest: of[min(step, 1)](layer, step, *rest))
    expected = with_callback(by_step, PutIn(other))
    memkern.patch(sd1, "ren:1.25")
    cond, uncond = encode(sd1, OTHER)
    made, said = outcome(lambda: with_callback(sd1, PutIn(torch.cat([uncond, cond]))))
    assert said == []
    same(made, expected)


@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_g5_embeddings_of_another_policy_are_noticed(sd1, stage):
    patch = memkern.patch(sd1, "zero-eot", stage=stage)
    cond, uncond = encode(sd1, OTHER)
    patch.update(POLICY)
    told("raise", lambda: with_callback(sd1, PutIn(torch.cat([uncond, cond]))), "zero-eot")


class Cached:
    """A cache around `encode_prompt`, by prompt."""

    def __init__(self, pipe, copies=False):
        self.inner, self.kept, self.copies = pipe.encode_prompt, {}, copies
        pipe.encode_prompt = self

    def __call__(self, prompt=None, *args, **kwargs):
        # diffusers looks at neither; a real cache has more in its key.
        if prompt not in self.kept:
            self.kept[prompt] = self.inner(prompt, *args, **kwargs)
        found = self.kept[prompt]
        return tuple(part.clone() for part in found) if self.copies else found


@pytest.mark.parametrize("copies", [False, True], ids=["kept", "copied"])
@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
@pytest.mark.parametrize("stage", STAGES)
def test_g26_a_cache_that_returns_the_former_policys_embeddings(sd1, plain, stage, on_unknown, copies):
    """Embeddings of the same policy are as good as new; after `update` they are noticed, and counted as unedited."""
    patch = memkern.patch(sd1, POLICY, stage=stage, on_unknown=on_unknown)
    Cached(sd1, copies)
    for _ in range(2):
        same(image(sd1), edited_image(plain, POLICY))
    patch.update("zero-eot-pad")
    told(on_unknown, lambda: image(sd1), "zero-pad|not made by memkern|nobody")
    assert counts(sd1) == ((2, 0, 0, 1) if on_unknown == "raise" else (2, 0, 1, 0))


@pytest.mark.parametrize("stage", STAGES)
def test_g26_a_cache_across_requests_of_different_policies(sd1, stage):
    memkern.patch(sd1, POLICY, stage=stage)
    Cached(sd1)
    image(sd1)
    with memkern.using(sd1, "zero-eot-pad"):
        told("raise", lambda: image(sd1))

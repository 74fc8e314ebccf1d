"""Threads and shallow copies of one patched pipeline (G10)."""

from __future__ import annotations

import threading

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from field import (
    OTHER,
    PROMPT,
    STAGES,
    WAIT,
    between_steps,
    counts,
    edited_image,
    image,
    in_thread,
    locked,
    ren_image,
    request_copy,
    same,
    told,
)
from test_patching import snapshot

import memkern
from memkern.testing import tiny_pipeline

POLICY = "zero-pad:0.7"


@pytest.fixture
def plain(tokenizers):
    """The same pipeline, never patched."""
    return tiny_pipeline(tokenizers["sd1"])


@pytest.mark.parametrize("policy", [POLICY, "swap-pad-zero-eot", "ren:1.25"])
def test_g10_no_attribute_changes_during_a_call(sd1, policy):
    """The tokenizer's stand-in stayed, six deep, when two requests overlapped. This looks from inside a call."""
    memkern.patch(sd1, policy)
    seen = []
    names = ("tokenizer", "text_encoder", "unet", "scheduler", "encode_prompt")

    def look(*args):
        own = {name: id(value) for name, value in vars(sd1).items() if name in names or not name.startswith("_")}
        seen.append((type(sd1), own))

    look()
    handles = [part.register_forward_pre_hook(look) for part in (sd1.text_encoder, sd1.unet)]
    image(sd1)
    for handle in handles:
        handle.remove()
    look()
    assert len(seen) > 4
    assert all(one == seen[0] for one in seen)


@pytest.mark.parametrize("stage", STAGES)
def test_g10_a_shallow_copy_is_patched_too(sd1, plain, stage):
    memkern.patch(sd1, POLICY, stage=stage)
    own = request_copy(sd1)
    assert memkern.status(own).patched
    assert str(memkern.status(own).policy) == POLICY
    expected = edited_image(plain, POLICY)
    for pipe in (own, sd1, own):
        same(image(pipe), expected)
    assert counts(own) == counts(sd1) == (3, 0, 0, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_g10_a_copy_has_a_session_of_its_own(sd1, plain, stage):
    memkern.patch(sd1, POLICY, stage=stage)
    own = request_copy(sd1)
    memkern.patch(own, "zero-eot-pad", stage=stage)
    same(image(own), edited_image(plain, "zero-eot-pad"))
    same(image(sd1), edited_image(plain, POLICY))
    assert [str(memkern.status(pipe).policy) for pipe in (sd1, own)] == [POLICY, "zero-eot-pad"]


@pytest.mark.parametrize("stage", STAGES)
def test_g10_a_copy_inside_using(sd1, plain, stage):
    memkern.patch(sd1, POLICY, stage=stage)
    own = request_copy(sd1)
    with memkern.using(own, "none"):
        same(image(own), image(plain))
    same(image(own), edited_image(plain, POLICY))
    assert counts(sd1) == (1, 1, 0, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_g10_unpatching_a_copy_leaves_the_original(sd1, plain, stage):
    memkern.patch(sd1, POLICY, stage=stage)
    own = request_copy(sd1)
    image(own)
    assert memkern.status(own).patched
    memkern.unpatch(own)
    assert not memkern.status(own).patched
    assert memkern.status(sd1).patched
    same(image(sd1), edited_image(plain, POLICY))


@pytest.mark.parametrize("stage", STAGES)
def test_g10_unpatching_the_original_leaves_nothing(sd1, plain, stage):
    before = snapshot(sd1)
    memkern.patch(sd1, POLICY, stage=stage)
    own = request_copy(sd1)
    own.encode_prompt(PROMPT, torch.device("cpu"), 1, True)
    memkern.unpatch(own)
    memkern.unpatch(sd1)
    after = snapshot(sd1)
    assert {key: after.get(key) for key in before} == before
    assert set(after) == set(before)
    assert torch.equal(image(own), image(plain))
    assert torch.equal(image(sd1), image(plain))


@pytest.mark.parametrize("policy", [POLICY, "swap-pad-zero-eot", "ren:1.25"])
def test_g10_a_request_in_the_middle_of_another(sd1, plain, policy):
    """One request's prompt does not clear another's."""
    expected = {
        prompt: ren_image(plain.tokenizer, prompt=prompt)
        if policy == "ren:1.25"
        else edited_image(plain, policy, prompt)
        for prompt in (PROMPT, OTHER)
    }
    memkern.patch(sd1, policy)
    first, second = request_copy(sd1), request_copy(sd1)
    made = {}

    def other():
        made[OTHER] = image(second, OTHER)

    made[PROMPT] = between_steps(lambda callback: image(first, callback_on_step_end=callback), other)
    for prompt, found in made.items():
        same(found, expected[prompt])
    assert counts(sd1) == (2, 0, 0, 0)


class Overlap:
    """A tokenizer that lets two threads into `encode_prompt`: the first to come is the first to go."""

    def __init__(self, pipe):
        self.first_is_in, self.second_is_in, self.first_is_out = (threading.Event() for _ in range(3))
        pipe.tokenizer = locked(pipe.tokenizer, self.inside)

    def inside(self, name):
        if name == "first" and not self.first_is_in.is_set():
            self.first_is_in.set()
            assert self.second_is_in.wait(WAIT)
        elif name == "second" and not self.second_is_in.is_set():
            assert self.first_is_in.wait(WAIT)
            self.second_is_in.set()
            assert self.first_is_out.wait(WAIT)

    def __call__(self, pipes, prompts=(PROMPT, OTHER)):
        """The images of two pipelines in threads."""
        made = {}

        def work(name, pipe, prompt):
            try:
                made[name] = image(pipe, prompt)
            except BaseException as error:
                made[name] = error
            finally:
                getattr(self, f"{name}_is_in").set()
                if name == "first":
                    self.first_is_out.set()

        threads = [
            threading.Thread(target=work, name=name, args=(name, pipe, prompt))
            for name, pipe, prompt in zip(("first", "second"), pipes, prompts, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        for one in made.values():
            if isinstance(one, BaseException):
                raise one
        return made["first"], made["second"]


@pytest.mark.parametrize("stage", STAGES)
def test_g10_two_prompts_that_are_encoded_at_once(sd1, plain, tmp_path, stage):
    """The tokenizer stayed wrapped: `save_pretrained` left it out then, and `from_pipe` handed it on."""
    overlap = Overlap(sd1)
    tokenizer = sd1.tokenizer
    memkern.patch(sd1, POLICY, stage=stage)
    pipes = [request_copy(sd1), request_copy(sd1)]
    made = overlap(pipes)
    assert all(pipe.tokenizer is tokenizer for pipe in (sd1, *pipes))
    for found, prompt in zip(made, (PROMPT, OTHER), strict=True):
        same(found, edited_image(plain, POLICY, prompt))
    sd1.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer").is_dir()
    other = StableDiffusionImg2ImgPipeline.from_pipe(sd1)
    assert other.tokenizer is tokenizer
    told("raise", lambda: other.encode_prompt(PROMPT, torch.device("cpu"), 1, True))
    memkern.unpatch(sd1)
    assert sd1.tokenizer is tokenizer


@pytest.mark.parametrize("policy", ["zero-eot", "ren:1.25"])
def test_g10_hooks_do_not_come_and_go_while_another_request_runs(sd1, plain, policy):
    """A pipeline by `from_pipe` is patched and unpatched while torch goes through the hooks of what they share."""
    memkern.patch(sd1, POLICY)
    modules = [*sd1.text_encoder.modules(), *sd1.unet.modules()]
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs")
    going = [iter(getattr(module, kind).items()) for module in modules for kind in kinds if getattr(module, kind)]
    other = StableDiffusionPipeline.from_pipe(sd1)
    in_thread(lambda: memkern.patch(other, policy))
    in_thread(lambda: memkern.unpatch(other))
    for one in going:
        list(one)  # RuntimeError: mutated during iteration
    assert going
    same(image(sd1), edited_image(plain, POLICY))

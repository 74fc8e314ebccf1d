"""Settings of a request are that request's alone: blocks that overlap, shared UNets (G11, G12)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import StableDiffusionPipeline
from field import (
    OTHER,
    PROMPT,
    STAGES,
    WAIT,
    between_steps,
    counts,
    edited_image,
    image,
    locked,
    ren_image,
    request_copy,
    same,
)
from test_patching import snapshot

import memkern
from memkern.testing import tiny_pipeline

POLICY = "zero-pad:0.7"


@pytest.fixture
def plain(tokenizers):
    """The same pipeline, never patched."""
    return tiny_pipeline(tokenizers["sd1"])


@pytest.mark.parametrize("stage", STAGES)
def test_g11_blocks_of_none_that_overlap(sd1, plain, stage):
    """The first to come is the first to go, and a third request comes in between: it is protected throughout."""
    memkern.patch(sd1, POLICY, stage=stage)
    inside, leave, left, end = (threading.Event() for _ in range(4))
    unedited, edited = image(plain), edited_image(plain, POLICY)

    def first():
        with memkern.patched(sd1, "none"):
            inside.set()
            assert leave.wait(WAIT)
            same(image(sd1), unedited)
        left.set()

    def second():
        assert inside.wait(WAIT)
        with memkern.patched(sd1, "none"):
            leave.set()
            assert left.wait(WAIT)
            assert end.wait(WAIT)
            same(image(sd1), unedited)

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(first), pool.submit(second)]
        try:
            assert left.wait(WAIT)
            same(image(sd1), edited)
        finally:
            for event in (inside, leave, left, end):
                event.set()
        for one in waiting:
            one.result(WAIT)
    same(image(sd1), edited)
    assert str(memkern.status(sd1).policy) == POLICY
    assert counts(sd1) == (2, 2, 0, 0)


@pytest.mark.parametrize("way", ["patched", "using"])
@pytest.mark.parametrize("stage", STAGES)
def test_g11_a_block_around_another_requests_calls(sd1, plain, stage, way):
    """24 requests, every second one inside a block of "none": the others are protected, all of them."""
    unedited, edited = image(plain, steps=2), edited_image(plain, POLICY, steps=2)
    sd1.tokenizer = locked(sd1.tokenizer)
    memkern.patch(sd1, POLICY, stage=stage)

    def request(number):
        own = request_copy(sd1)
        if number % 2:
            return image(own, steps=2)
        with getattr(memkern, way)(own, "none"):
            return image(own, steps=2)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(request, range(24)))
    for number, found in enumerate(made):
        same(found, edited if number % 2 else unedited)
    assert counts(sd1) == (12, 12, 0, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_g11_a_call_keeps_what_it_began_with(sd1, plain, stage):
    """`update` is for calls that begin afterwards: not for the rest of one that runs."""
    patch = memkern.patch(sd1, POLICY, stage=stage)
    own = request_copy(sd1)
    made = between_steps(
        lambda callback: image(own, callback_on_step_end=callback), lambda: patch.update("zero-eot-pad")
    )
    same(made, edited_image(plain, POLICY))
    same(image(sd1), edited_image(plain, "zero-eot-pad"))
    assert counts(sd1) == (2, 0, 0, 0)


@pytest.mark.parametrize("change", ["off", "another stage", "unpatched"])
@pytest.mark.parametrize("stage", STAGES)
def test_g11_what_changes_in_the_middle_of_a_call(sd1, plain, stage, change):
    """Whatever the default becomes meanwhile, the call that runs is wholly edited, or raises."""
    patch = memkern.patch(sd1, POLICY, stage=stage)

    def meanwhile():
        if change == "off":
            patch.update("none")
        elif change == "another stage":
            patch.update(stage="embeds" if stage == "kv" else "kv")
        else:
            patch.remove()

    call = lambda callback: image(sd1, callback_on_step_end=callback)  # noqa: E731
    try:
        made = between_steps(call, meanwhile)
    except memkern.UnmitigatedError:
        return
    same(made, edited_image(plain, POLICY))


def share(pipe):
    """Another pipeline of the same parts, with a scheduler of its own."""
    other = StableDiffusionPipeline.from_pipe(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return other


def of_policy(tokenizer, policy, prompt=PROMPT):
    """The image of a policy by hand."""
    if policy == "ren:1.25":
        return ren_image(tokenizer, prompt=prompt)
    return edited_image(tiny_pipeline(tokenizer), policy, prompt)


PAIRS = [
    (("ren:1.25", "auto"), ("none", "auto")),
    (("none", "auto"), ("ren:1.25", "auto")),
    (("ren:1.25", "auto"), (POLICY, "kv")),
    ((POLICY, "kv"), (POLICY, "embeds")),
    (("zero-eot", "embeds"), ("ren:1.25", "auto")),
    ((POLICY, "kv"), ("none", "kv")),
]


@pytest.mark.parametrize("prompts", [(PROMPT, PROMPT), (PROMPT, OTHER)], ids=["one prompt", "two"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_g12_pipelines_that_share_a_unet(sd1, plain, pair, prompts):
    """Each by its own policy and stage, whichever was patched first and whichever generates first."""
    pipes = [sd1, share(sd1)]
    before = snapshot(sd1)
    for pipe, (policy, stage) in zip(pipes, pair, strict=True):
        memkern.patch(pipe, policy, stage=stage)
    expected = [of_policy(plain.tokenizer, policy, prompt) for (policy, _), prompt in zip(pair, prompts, strict=True)]
    for index in (0, 1, 0, 1, 1, 0):
        same(image(pipes[index], prompts[index]), expected[index])
    for pipe, (policy, _) in zip(pipes, pair, strict=True):
        assert counts(pipe) == ((0, 3, 0, 0) if policy == "none" else (3, 0, 0, 0))
    memkern.unpatch(pipes[0])
    if pair[1][0] != "none":
        same(image(pipes[1], prompts[1]), expected[1])
    memkern.unpatch(pipes[1])
    after = snapshot(sd1)
    assert {key: after[key] for key in before if not key[1].startswith("_")} == {
        key: before[key] for key in before if not key[1].startswith("_")
    }
    assert torch.equal(image(sd1), image(plain))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_g12_between_each_others_steps(sd1, plain, pair):
    pipes = [sd1, share(sd1)]
    for pipe, (policy, stage) in zip(pipes, pair, strict=True):
        memkern.patch(pipe, policy, stage=stage)
    found = {}

    def other():
        found[1] = image(pipes[1])

    found[0] = between_steps(lambda callback: image(pipes[0], callback_on_step_end=callback), other)
    for index, (policy, _) in enumerate(pair):
        same(found[index], of_policy(plain.tokenizer, policy))

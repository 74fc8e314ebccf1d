"""What one request asks for is that request's alone: copies, blocks that overlap, shared UNets (G10, G11, G12)."""

from __future__ import annotations

import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from field import OTHER, PROMPT, STAGES, counts, edited_picture, picture, ren_picture, same, told
from test_patching import snapshot

import memkern
from memkern.testing import tiny_pipeline

POLICY = "zero-pad:0.7"
WAIT = 60
"""Seconds after which a thread that nobody lets go on fails."""


@pytest.fixture
def plain(tokenizers):
    """The same pipeline, never patched."""
    return tiny_pipeline(tokenizers["sd1"])


def request_copy(pipe):
    """diffusers' server example: a shallow copy with a scheduler of its own."""
    made = copy.copy(pipe)
    made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return made


def in_thread(function, *args):
    """What `function` returns in a thread of its own, or what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(WAIT)


@pytest.mark.parametrize("policy", [POLICY, "swap-pad-zero-eot", "ren:1.25"])
def test_g10_no_attribute_changes_during_a_call(sd1, policy):
    """The tokenizer's stand-in stayed, six deep, when two requests overlapped. Looked at from inside a call."""
    memkern.patch(sd1, policy)
    seen = []
    names = ("tokenizer", "text_encoder", "unet", "scheduler", "encode_prompt")

    def look(*args):
        own = {name: id(value) for name, value in vars(sd1).items() if name in names or not name.startswith("_")}
        seen.append((type(sd1), own))

    look()
    handles = [part.register_forward_pre_hook(look) for part in (sd1.text_encoder, sd1.unet)]
    picture(sd1)
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
    expected = edited_picture(plain, POLICY)
    for pipe in (own, sd1, own):
        same(picture(pipe), expected)
    assert counts(own) == counts(sd1) == (3, 0, 0, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_g10_a_copy_has_a_session_of_its_own(sd1, plain, stage):
    memkern.patch(sd1, POLICY, stage=stage)
    own = request_copy(sd1)
    memkern.patch(own, "zero-eot-pad", stage=stage)
    same(picture(own), edited_picture(plain, "zero-eot-pad"))
    same(picture(sd1), edited_picture(plain, POLICY))
    assert [str(memkern.status(pipe).policy) for pipe in (sd1, own)] == [POLICY, "zero-eot-pad"]


@pytest.mark.parametrize("stage", STAGES)
def test_g10_a_copy_inside_using(sd1, plain, stage):
    memkern.patch(sd1, POLICY, stage=stage)
    own = request_copy(sd1)
    with memkern.using(own, "none"):
        same(picture(own), picture(plain))
    same(picture(own), edited_picture(plain, POLICY))
    assert counts(sd1) == (1, 1, 0, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_g10_unpatching_a_copy_leaves_the_original(sd1, plain, stage):
    memkern.patch(sd1, POLICY, stage=stage)
    own = request_copy(sd1)
    picture(own)
    memkern.unpatch(own)
    assert not memkern.status(own).patched
    assert memkern.status(sd1).patched
    same(picture(sd1), edited_picture(plain, POLICY))


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
    assert torch.equal(picture(own), picture(plain))
    assert torch.equal(picture(sd1), picture(plain))


def between_steps(first, other, *, step=0):
    """Two functions in threads: `other` runs as a whole in the middle of `first`'s call, which gets it as callback."""
    raised = []

    def callback(pipe, index, timestep, tensors):
        if index == step:
            try:
                in_thread(other)
            except BaseException as error:
                raised.append(error)
        return {}

    made = in_thread(first, callback)
    for error in raised:
        raise error
    return made


@pytest.mark.parametrize("policy", [POLICY, "swap-pad-zero-eot", "ren:1.25"])
def test_g10_a_request_in_the_middle_of_another(sd1, plain, policy):
    """One request's prompt does not clear another's."""
    expected = {
        prompt: ren_picture(plain.tokenizer, prompt=prompt)
        if policy == "ren:1.25"
        else edited_picture(plain, policy, prompt)
        for prompt in (PROMPT, OTHER)
    }
    memkern.patch(sd1, policy)
    first, second = request_copy(sd1), request_copy(sd1)
    made = {}

    def other():
        made[OTHER] = picture(second, OTHER)

    made[PROMPT] = between_steps(lambda callback: picture(first, callback_on_step_end=callback), other)
    for prompt, found in made.items():
        same(found, expected[prompt])
    assert counts(sd1) == (2, 0, 0, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_g10_two_prompts_that_are_encoded_at_once(sd1, plain, stage):
    """Both threads are inside `encode_prompt` at the same time, each at its tokenizer, twice."""
    memkern.patch(sd1, POLICY, stage=stage)
    tokenizer, barrier = sd1.tokenizer, threading.Barrier(2)
    inner, lock = type(tokenizer).__call__, threading.Lock()

    class Meeting(type(tokenizer)):
        def __call__(self, *args, **kwargs):
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(5)
            with lock:
                return inner(self, *args, **kwargs)

    former, sd1_pipes = type(tokenizer), [request_copy(sd1), request_copy(sd1)]
    tokenizer.__class__ = Meeting
    try:
        with ThreadPoolExecutor(2) as pool:
            made = list(pool.map(picture, sd1_pipes, (PROMPT, OTHER)))
    finally:
        tokenizer.__class__ = former
    assert sd1.tokenizer is tokenizer
    assert all(pipe.tokenizer is tokenizer for pipe in sd1_pipes)
    for found, prompt in zip(made, (PROMPT, OTHER), strict=True):
        same(found, edited_picture(plain, POLICY, prompt))


def test_g10_hooks_do_not_come_and_go_while_another_request_runs(sd1, plain):
    """A pipeline by `from_pipe` is patched and unpatched while the text encoder they share is being called."""
    memkern.patch(sd1, POLICY)
    done = []

    def patch_another(*args):
        if done:
            return
        done.append(True)

        def another():
            other = StableDiffusionPipeline.from_pipe(sd1)
            memkern.patch(other, "zero-eot")
            memkern.unpatch(other)

        in_thread(another)

    # Inside of the encoder's own loop over what it calls: between two of its modules.
    embeddings = next(m for m in sd1.text_encoder.modules() if type(m).__name__ == "CLIPTextEmbeddings")
    handles = [module.register_forward_pre_hook(patch_another) for module in (embeddings, sd1.unet)]
    made = picture(sd1)
    for handle in handles:
        handle.remove()
    same(made, edited_picture(plain, POLICY))


def test_g10_what_is_made_of_it_afterwards(sd1, tmp_path):
    memkern.patch(sd1, POLICY)
    pipes = [request_copy(sd1) for _ in range(2)]
    between_steps(lambda callback: picture(pipes[0], callback_on_step_end=callback), lambda: picture(pipes[1], OTHER))
    assert sd1.tokenizer.__class__.__module__.partition(".")[0] == "transformers"
    sd1.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer").is_dir()
    other = StableDiffusionImg2ImgPipeline.from_pipe(sd1)
    assert other.tokenizer is sd1.tokenizer
    told("raise", lambda: other.encode_prompt(PROMPT, torch.device("cpu"), 1, True))


@pytest.mark.parametrize("stage", STAGES)
def test_g11_blocks_of_none_that_overlap(sd1, plain, stage):
    """The first to come is the first to go, and a third request comes in between: it is protected throughout."""
    memkern.patch(sd1, POLICY, stage=stage)
    inside, leave, left, end = (threading.Event() for _ in range(4))
    unedited, edited = picture(plain), edited_picture(plain, POLICY)

    def first():
        with memkern.patched(sd1, "none"):
            inside.set()
            assert leave.wait(WAIT)
            same(picture(request_copy(sd1)), unedited)
        left.set()

    def second():
        assert inside.wait(WAIT)
        with memkern.patched(sd1, "none"):
            leave.set()
            assert left.wait(WAIT)
            same(picture(request_copy(sd1)), unedited)
            assert end.wait(WAIT)

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(first), pool.submit(second)]
        try:
            assert left.wait(WAIT)
            same(picture(request_copy(sd1)), edited)
        finally:
            for event in (inside, leave, left, end):
                event.set()
        for one in waiting:
            one.result(WAIT)
    same(picture(sd1), edited)
    assert str(memkern.status(sd1).policy) == POLICY
    assert counts(sd1) == (2, 2, 0, 0)


@pytest.mark.parametrize("way", ["patched", "using"])
@pytest.mark.parametrize("stage", STAGES)
def test_g11_a_block_around_another_requests_calls(sd1, plain, stage, way):
    """24 requests, every second one inside a block of "none": the others are protected, all of them."""
    memkern.patch(sd1, POLICY, stage=stage)
    unedited, edited = picture(plain, steps=2), edited_picture(plain, POLICY, steps=2)
    lock = threading.Lock()
    tokenize = type(sd1.tokenizer).__call__

    class Locked(type(sd1.tokenizer)):
        def __call__(self, *args, **kwargs):
            with lock:
                return tokenize(self, *args, **kwargs)

    sd1.tokenizer = copy.deepcopy(sd1.tokenizer)
    sd1.tokenizer.__class__ = Locked
    memkern.patch(sd1, POLICY, stage=stage)

    def request(number):
        own = request_copy(sd1)
        if number % 2:
            return picture(own, steps=2)
        with getattr(memkern, way)(own, "none"):
            return picture(own, steps=2)

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
        lambda callback: picture(own, callback_on_step_end=callback), lambda: patch.update("zero-eot-pad")
    )
    same(made, edited_picture(plain, POLICY))
    same(picture(sd1), edited_picture(plain, "zero-eot-pad"))
    assert counts(sd1) == (2, 0, 0, 0)


@pytest.mark.parametrize("change", ["off", "another stage", "unpatched"])
@pytest.mark.parametrize("stage", STAGES)
def test_g11_what_changes_in_the_middle_of_a_call(sd1, plain, stage, change):
    """Whatever the default becomes meanwhile, the call that runs is wholly edited, or told."""
    patch = memkern.patch(sd1, POLICY, stage=stage)

    def meanwhile():
        if change == "off":
            patch.update("none")
        elif change == "another stage":
            patch.update(stage="embeds" if stage == "kv" else "kv")
        else:
            patch.remove()

    call = lambda callback: picture(sd1, callback_on_step_end=callback)  # noqa: E731
    try:
        made = between_steps(call, meanwhile)
    except memkern.UnmitigatedError:
        return
    same(made, edited_picture(plain, POLICY))


def share(pipe):
    """Another pipeline of the same parts, with a scheduler of its own."""
    other = StableDiffusionPipeline.from_pipe(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return other


def of_policy(tokenizer, policy, prompt=PROMPT):
    """The picture of a policy by hand."""
    if policy == "ren:1.25":
        return ren_picture(tokenizer, prompt=prompt)
    return edited_picture(tiny_pipeline(tokenizer), policy, prompt)


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
    """Each by its own policy and stage, whichever was patched first and whichever paints first."""
    pipes = [sd1, share(sd1)]
    before = snapshot(sd1)
    for pipe, (policy, stage) in zip(pipes, pair, strict=True):
        memkern.patch(pipe, policy, stage=stage)
    expected = [of_policy(plain.tokenizer, policy, prompt) for (policy, _), prompt in zip(pair, prompts, strict=True)]
    for index in (0, 1, 0, 1, 1, 0):
        same(picture(pipes[index], prompts[index]), expected[index])
    for pipe, (policy, _) in zip(pipes, pair, strict=True):
        assert counts(pipe) == ((0, 3, 0, 0) if policy == "none" else (3, 0, 0, 0))
    memkern.unpatch(pipes[0])
    if pair[1][0] != "none":
        same(picture(pipes[1], prompts[1]), expected[1])
    memkern.unpatch(pipes[1])
    after = snapshot(sd1)
    assert {key: after[key] for key in before if not key[1].startswith("_")} == {
        key: before[key] for key in before if not key[1].startswith("_")
    }
    assert torch.equal(picture(sd1), picture(plain))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_g12_between_each_others_steps(sd1, plain, pair):
    pipes = [sd1, share(sd1)]
    for pipe, (policy, stage) in zip(pipes, pair, strict=True):
        memkern.patch(pipe, policy, stage=stage)
    found = {}

    def other():
        found[1] = picture(pipes[1])

    found[0] = between_steps(lambda callback: picture(pipes[0], callback_on_step_end=callback), other)
    for index, (policy, _) in enumerate(pair):
        same(found[index], of_policy(plain.tokenizer, policy))

"""`memkern.using`: of one pipeline, one context, and only as long as its block."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from field import PROMPT, edited_image, image, same
from fleet import DEFAULT, Request, generate, kinds_of

import memkern
from memkern.testing import tiny_pipeline


@pytest.fixture
def plain(tokenizers):
    """A pipeline that is never patched."""
    return tiny_pipeline(tokenizers["sd1"])


@pytest.fixture(scope="module")
def kinds(tokenizers):
    return kinds_of(tokenizers)


def test_using_nests_and_ends_in_any_case(kinds):
    kind = kinds["SD"]
    pipe = kind.make()
    memkern.patch(pipe, DEFAULT)

    def is_now(policy, stage="embeds"):
        request = Request(policy, stage, PROMPT, 0)
        torch.testing.assert_close(generate(pipe, request), kind.alone(request), rtol=1e-4, atol=1e-4)

    with memkern.using(pipe, "zero-pad:0.7"):
        is_now("zero-pad:0.7")
        with memkern.using(pipe, "none"):
            is_now("none")
            with memkern.using(pipe, "ren:1.25"):
                is_now("ren:1.25", "kv")
            is_now("none")
            with contextlib.suppress(KeyError), memkern.using(pipe, "zero-eot-pad", on_unknown="warn"):
                is_now("zero-eot-pad")
                raise KeyError
            is_now("none")
        with memkern.using(pipe, stage="kv"):  # settings alone
            is_now("zero-pad:0.7", "kv")
        with memkern.patched(pipe, "zero-eot-pad"):
            is_now("zero-eot-pad")
        is_now("zero-pad:0.7")
    is_now(DEFAULT)
    assert str(memkern.status(pipe).policy) == DEFAULT


def test_using_is_of_one_pipeline_and_one_context(kinds):
    kind = kinds["SD"]
    pipe, other = kind.make(), kind.make()
    memkern.patch(pipe, DEFAULT)
    memkern.patch(other, "zero-eot-pad")
    with memkern.using(pipe, "none"):
        elsewhere = Request("zero-eot-pad", "embeds", PROMPT, 0)
        assert torch.equal(generate(other, elsewhere), kind.alone(elsewhere))
        here = Request(DEFAULT, "embeds", PROMPT, 0)
        with ThreadPoolExecutor(1) as pool:  # a thread begins with a context of its own
            assert torch.equal(pool.submit(generate, pipe, here).result(), kind.alone(here))


def test_using_takes_what_patch_takes(kinds):
    pipe = kinds["SD"].make()
    with pytest.raises(ValueError, match="patch"), memkern.using(pipe, "none"):
        pass
    memkern.patch(pipe, DEFAULT)
    for wrong in ({"policy": "nonsense"}, {"policy": "ren:1.25", "stage": "embeds"}, {"on_unknown": "shrug"}):
        with pytest.raises(ValueError), memkern.using(pipe, **wrong):
            pass
    here = Request(DEFAULT, "embeds", PROMPT, 0)
    assert torch.equal(generate(pipe, here), kinds["SD"].alone(here))
    memkern.unpatch(pipe)
    with pytest.raises(ValueError, match="patch"), memkern.using(pipe, "none"):
        pass


def test_blocks_of_generators_that_end_in_any_order(sd1, plain):
    """Nothing that one leaves behind is the other's."""
    memkern.patch(sd1, "zero-eot-pad")

    def request(policy):
        with memkern.using(sd1, policy):
            yield image(sd1)
            yield image(sd1)

    first, second = request("none"), request("zero-pad:1")
    next(first), next(second)
    first.close()
    same(next(second), edited_image(plain, "zero-pad:1"))
    second.close()
    same(image(sd1), edited_image(plain, "zero-eot-pad"))
    third = request("none")
    next(third)
    thread = threading.Thread(target=third.close)
    thread.start()
    thread.join()
    same(image(sd1), edited_image(plain, "zero-eot-pad"))


def test_methods_kept_from_before_unpatch(sd1, plain):
    memkern.patch(sd1)
    encode, call = sd1.encode_prompt, sd1.__call__
    memkern.unpatch(sd1)
    for made, wanted in zip(encode(PROMPT, "cpu", 1, True), plain.encode_prompt(PROMPT, "cpu", 1, True), strict=True):
        assert torch.equal(made, wanted)
    options = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16}
    made = call(PROMPT, generator=torch.Generator().manual_seed(0), **options).images
    assert torch.equal(made, image(plain, steps=2))
    assert not memkern.status(sd1).patched
    assert not sd1.unet._forward_pre_hooks


@pytest.mark.parametrize("how", ["data", "numpy"])
@torch.no_grad()
def test_writes_that_no_version_counts(sd1, plain, how):
    memkern.patch(sd1, "zero-pad:1")
    raw, _ = plain.encode_prompt(PROMPT, "cpu", 1, True)
    cond, uncond = sd1.encode_prompt(PROMPT, "cpu", 1, True)
    if how == "data":
        cond.data.copy_(raw)
    else:
        cond.numpy()[:] = raw.numpy()
    with pytest.raises(memkern.UnmitigatedError, match="prompt_embeds carries no token ids"):
        image(sd1, None, prompt_embeds=cond, negative_prompt_embeds=uncond)

"""`memkern.using`: of one pipeline, one context, and only as long as its block."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from field import PROMPT
from fleet import DEFAULT, Request, kinds_of, paint

import memkern


@pytest.fixture(scope="module")
def kinds(tokenizers):
    return kinds_of(tokenizers)


def test_using_nests_and_ends_in_any_case(kinds):
    kind = kinds["SD"]
    pipe = kind.make()
    memkern.patch(pipe, DEFAULT)

    def is_now(policy, stage="embeds"):
        request = Request(policy, stage, PROMPT, 0)
        torch.testing.assert_close(paint(pipe, request), kind.alone(request), rtol=1e-4, atol=1e-4)

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
        assert torch.equal(paint(other, elsewhere), kind.alone(elsewhere))
        here = Request(DEFAULT, "embeds", PROMPT, 0)
        with ThreadPoolExecutor(1) as pool:  # a thread begins with a context of its own
            assert torch.equal(pool.submit(paint, pipe, here).result(), kind.alone(here))


def test_using_takes_what_patch_takes(kinds):
    pipe = kinds["SD"].make()
    with pytest.raises(ValueError, match="patch"), memkern.using(pipe, "none"):
        pass
    memkern.patch(pipe, DEFAULT)
    for wrong in ({"policy": "nonsense"}, {"policy": "ren:1.25", "stage": "embeds"}, {"on_unknown": "shrug"}):
        with pytest.raises(ValueError), memkern.using(pipe, **wrong):
            pass
    here = Request(DEFAULT, "embeds", PROMPT, 0)
    assert torch.equal(paint(pipe, here), kinds["SD"].alone(here))
    memkern.unpatch(pipe)
    with pytest.raises(ValueError, match="patch"), memkern.using(pipe, "none"):
        pass

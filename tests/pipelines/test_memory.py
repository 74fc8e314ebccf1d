"""The memory that is kept of contexts stays within a budget, whatever else is running."""

from __future__ import annotations

import pytest
import torch
from field import image

import memkern
from memkern.pipelines.attention import budget
from memkern.testing import tiny_pipeline

STAGES = ["embeds", "kv"]


def kept(pipe):
    return memkern.status(pipe).kept


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_no_more_is_kept_than_there_is_room_for(tokenizers, share, stage):
    pipe, plain = (tiny_pipeline(tokenizers["sd1"]) for _ in range(2))
    memkern.patch(pipe, "zero-pad:0.7", stage=stage)
    expected = image(pipe)
    most = kept(pipe)
    memkern.patch(plain, "zero-pad:0.7", stage=stage, memory=int(share * most))
    torch.testing.assert_close(image(plain), expected, rtol=1e-4, atol=1e-4)
    status = memkern.status(plain)
    assert status.kept <= share * most
    assert (status.turned_down > 0) == (share < 1)
    assert (status.kept > 0) == (share >= 0.5)
    assert ("bytes fewer than without a limit" in str(status)) == (share < 1)


def test_the_default_is_a_share_of_the_device(sd1, monkeypatch):
    memkern.patch(sd1, "zero-pad:0.7")
    image(sd1)
    most = kept(sd1)
    monkeypatch.setattr(budget, "_whole", lambda device: 16 * most)
    image(sd1)
    assert 0 < kept(sd1) <= most / 2


def test_a_share(sd1, monkeypatch):
    monkeypatch.setattr(budget, "_whole", lambda device: 80_000)
    memkern.patch(sd1, "zero-pad:0.7", memory=0.5)
    image(sd1)
    assert 0 < kept(sd1) <= 40_000


@pytest.mark.parametrize("memory", [True, "much", -1, 2.0])
def test_bad_budgets_are_refused(sd1, memory):
    with pytest.raises((TypeError, ValueError), match="memory: expected"):
        memkern.patch(sd1, memory=memory)
    assert not memkern.status(sd1).patched


def test_the_same_image_for_the_same_budget(tokenizers):
    """A second request chooses as the first one did, whatever that kept."""
    pipe = tiny_pipeline(tokenizers["sd1"])
    memkern.patch(pipe, "zero-pad:0.7", memory=20_000)
    first = image(pipe)
    chosen = memkern.status(pipe).layers
    assert torch.equal(image(pipe), first)
    assert memkern.status(pipe).layers == chosen


def test_a_request_gives_back_what_it_kept(sd1):
    memkern.patch(sd1, "zero-pad:0.7", memory=50_000)
    sizes = []
    for prompt in ("a cat", "a dog", "a tree"):
        image(sd1, prompt)
        sizes.append(kept(sd1))
    assert len(set(sizes)) == 1
    assert 0 < sizes[0] <= 50_000

"""The budget of contexts: bytes, shares, and the layers that get them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memkern.pipelines.attention import budget
from memkern.pipelines.attention.budget import MOST, Wish, allot, bytes_of, check_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("memory", [None, 0, 1, 1 << 40, 0.0, 0.5, 1.0])
def test_what_can_be_given(memory):
    check_memory(memory)


@pytest.mark.parametrize(
    ("memory", "error", "said"),
    [
        (True, TypeError, "expected bytes, a share of the device's memory or None, got True"),
        ("1GB", TypeError, "got '1GB'"),
        (-1, ValueError, "expected bytes of 0 or more, got -1"),
        (1.5, ValueError, "expected a share between 0.0 and 1.0, or bytes as an int, got 1.5"),
        (float("nan"), ValueError, "got nan"),
    ],
)
def test_what_cannot_is_refused(memory, error, said):
    with pytest.raises(error, match=said):
        check_memory(memory)


def test_bytes(monkeypatch):
    monkeypatch.setattr(budget, "_whole", lambda device: 3200)
    assert bytes_of(None, CPU) == 100
    assert bytes_of(0.5, CPU) == 1600
    assert bytes_of(7, CPU) == 7
    monkeypatch.setattr(budget, "_whole", lambda device: 1 << 50)
    assert bytes_of(None, CPU) == MOST


def test_the_whole_memory_is_no_free_memory():
    assert budget._whole(CPU) == budget._whole(CPU) > 1 << 28


def test_what_saves_most_for_a_byte_goes_first():
    wishes = [Wish("a", (10, 100), (1.0, 2.0)), Wish("b", (10, 20), (3.0, 3.5))]
    assert allot(wishes, 0) == {"a": 0, "b": 0}
    assert allot(wishes, 10) == {"a": 0, "b": 10}
    assert allot(wishes, 20) == {"a": 10, "b": 10}
    assert allot(wishes, 30) == {"a": 10, "b": 20}
    assert allot(wishes, 119) == {"a": 10, "b": 20}
    assert allot(wishes, 120) == {"a": 100, "b": 20}


def test_what_is_left_is_for_layers_that_were_thought_slower():
    wishes = [Wish("a", (10, 20), (0.0, 5.0)), Wish("b", (10, 50), (-1.0, -1.0))]
    assert allot(wishes, 20) == {"a": 20, "b": 0}
    assert allot(wishes, 30) == {"a": 20, "b": 10}
    assert allot(wishes, 70) == {"a": 20, "b": 50}


SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True).map(sorted)


@given(st.lists(SIZES.flatmap(lambda s: st.tuples(st.just(s), st.tuples(*[st.floats(0, 9)] * len(s)))), max_size=4))
def test_no_more_than_there_is(drawn):
    wishes = [Wish(index, tuple(sizes), savings) for index, (sizes, savings) in enumerate(drawn)]
    for room in (0, 20, 60, 200):
        given_bytes = allot(wishes, room)
        assert sum(given_bytes.values()) <= room
        assert all(given_bytes[wish.key] in (0, *wish.sizes) for wish in wishes)
        saved = sum(dict(zip((0, *w.sizes), (0.0, *w.savings), strict=True))[given_bytes[w.key]] for w in wishes)
        best = max(
            (
                sum(part[1] for part in parts)
                for parts in itertools.product(*[[(0, 0.0), *zip(w.sizes, w.savings, strict=True)] for w in wishes])
                if sum(part[0] for part in parts) <= room
            ),
            default=0.0,
        )
        assert saved <= best + 1e-9
        if room >= sum(wish.sizes[-1] for wish in wishes):
            assert given_bytes == {wish.key: wish.sizes[-1] for wish in wishes}

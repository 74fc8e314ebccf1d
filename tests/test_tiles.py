"""The table of tile sizes: which candidates fit, which are written, and which of them a launch takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: nothing to compile")

from memkern.ops.triton import tune
from memkern.ops.triton.configs import Card, table
from memkern.ops.triton.cost import Work
from memkern.ops.triton.sizes import STEP, up

PROBABILITIES = next(place for place in tune.PLACES if place.kernel == "absorbed_probabilities")


def fitting_up_to(monkeypatch, most):
    """A budget in which a candidate fits up to `most[HEADS]` keys."""
    monkeypatch.setattr(tune, "fits", lambda kernel, entry, family: entry["keys"] <= most.get(entry["HEADS"], 0))


def test_an_entry_says_up_to_how_many_keys_it_fits(monkeypatch):
    fitting_up_to(monkeypatch, {5: 40, 4: 159, 1: 1000})
    found = list(tune.fitting(PROBABILITIES, "sm90"))
    assert {(entry["HEADS"], entry["keys"]) for entry in found} == {(5, 40), (4, 80), (1, 256)}
    in_order = [entry["HEADS"] for entry in PROBABILITIES.candidates if entry["HEADS"] != 2]
    assert [entry["HEADS"] for entry in found] == in_order
    assert tune.by_budget(replace(PROBABILITIES, holds=2), "sm90") == found[:2]


def test_the_limits_are_the_lengths_that_are_compiled():
    assert [limit["keys"] for limit in tune.BY_KEYS] == [up(keys, STEP) for keys in tune.LENGTHS]
    assert list(tune.LENGTHS) == sorted(tune.LENGTHS)


def test_what_is_measured_is_held_by_the_cases_that_it_wins(monkeypatch):
    """Times of three cases per candidate; `inf` where an entry does not serve a case."""
    fitting_up_to(monkeypatch, {1: 1000, 2: 1000})
    entries = list(tune.fitting(PROBABILITIES, "sm90"))[:3]
    times = dict(zip(map(str, entries), ([3, 3, 1], [2, 2, 5], [9, 9, 9]), strict=True))
    monkeypatch.setattr(tune, "fitting", lambda place, family: entries)
    monkeypatch.setattr(tune, "served", lambda kernel, entry, family: [[time] for time in times[str(entry)]])
    monkeypatch.setattr(tune, "seconds", lambda case: case[0])
    assert tune.measured(replace(PROBABILITIES, holds=9), "sm90") == [entries[1], entries[0]]
    assert tune.measured(replace(PROBABILITIES, holds=1), "sm90") == [entries[0]]


@pytest.mark.parametrize("family", table())
def test_the_table_holds_candidates_alone(family):
    """With one of their limits, in their order, and no more than a place holds."""
    for place in tune.PLACES:
        open_ones = [entry | limit for entry in place.candidates for limit in place.limits]
        written = [
            entry
            for entry in table()[family].get(place.kernel, ())
            if (entry["bits"], entry["width"]) == (place.candidates[0]["bits"], place.candidates[0]["width"])
        ]
        assert [open_ones.index(entry) for entry in written] == sorted(map(open_ones.index, written))
        assert len(written) <= place.holds


@pytest.mark.parametrize("family", table())
def test_every_number_of_keys_that_is_absorbed_has_a_tile(family):
    """One that takes a head at a time, so that it serves any number of heads."""
    card, kernels = Card.typical(family), ("absorbed_probabilities", "absorbed_values")
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for kernel, dtype, width, keys in product(kernels, dtypes, (320, 640, 1280, 24), range(1, tune.MOST_KEYS + 1)):
        assert any(config.constants.get("HEADS", 1) == 1 for config in card.configs(kernel, width, dtype, keys))


def entry(**others):
    return {"bits": 16, "width": None, "BLOCK_M": 16, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2} | others


def test_conditions_of_an_entry():
    card = Card(1, {"kernel": [entry(BLOCK_M=64, keys=40), entry(BLOCK_M=32, whole=True), entry(keys=80)]}, "sm90")
    heights = {
        (width, keys): [config.constants["BLOCK_M"] for config in card.configs("kernel", width, torch.float16, keys)]
        for width, keys in [(320, 33), (328, 33), (320, 41), (328, 80)]
    }
    assert heights == {(320, 33): [64, 32, 16], (328, 33): [64, 16], (320, 41): [32, 16], (328, 80): [16]}
    with pytest.raises(
        NotImplementedError, match=r"kernel: no configuration for torch.float16 and a width of 328 and 81"
    ):
        card.configs("kernel", 328, torch.float16, 81)
    assert not {"keys", "whole"} & set(card.configs("kernel", 320, torch.float16, 33)[0].constants)


def test_the_fastest_is_of_those_that_can_run():
    card = Card(1, {"kernel": [entry(BLOCK_M=64), entry(BLOCK_M=32), entry()]}, "sm90")
    products = {64: None, 32: 10**9, 16: 10**10}

    def work(config):
        made = products[config.constants["BLOCK_M"]]
        return None if made is None else Work(1, made, 0, 0)

    config, found = card.fastest("kernel", 320, torch.float16, 77, work)
    assert (config.constants["BLOCK_M"], found) == (32, Work(1, 10**9, 0, 0))
    with pytest.raises(NotImplementedError, match="no configuration can run"):
        card.fastest("kernel", 320, torch.float16, 77, lambda config: None)

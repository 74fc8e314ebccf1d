"""The estimate of a layer's paths on a GPU that need not be here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: no kernels")

from memkern.ops.triton.configs import Card, table
from memkern.ops.triton.cost import LAUNCH, Rates, Work
from memkern.ops.triton.estimate import PATHS, Layer, seconds
from memkern.ops.triton.layers import LAYERS
from memkern.pipelines.attention import choose
from memkern.pipelines.attention.estimated import on_card

CARDS = ["sm80", "sm89", "sm90"]


def layer_of(layer, counts):
    return Layer(layer.queries, layer.width, layer.heads, counts)


@pytest.mark.parametrize("family", CARDS)
@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("counts", [(77, 77), (33, 77), (33, 33)], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.model}-{layer.queries}x{layer.width}")
def test_some_path_is_faster_than_the_layers_own_in_every_cell(family, batch, counts, layer):
    given, card = layer_of(layer, counts * (batch // 2)), Card.typical(family)
    times = {path: seconds(path, given, card) for path in PATHS}
    assert min(times["projected"], times["absorbed"]) < times["former"]


@pytest.mark.parametrize("family", list(table()))
@pytest.mark.parametrize("path", PATHS)
def test_fewer_keys_take_no_longer(family, path):
    given, card = Layer(1024, 640, 8, (77, 77)), Card.typical(family)
    assert seconds(path, replace(given, counts=(24, 24)), card) <= seconds(path, given, card)


def test_more_keys_than_a_program_holds_are_estimated_too():
    assert seconds("projected", Layer(1024, 640, 8, (154, 154), 154), Card.typical("sm80")) > 0


REVIEWED = [
    ("sm80", 4096, 320, 8, 77),
    ("sm80", 4096, 320, 8, 33),
    ("sm80", 9216, 320, 5, 77),
    ("sm80", 9216, 320, 5, 33),
    ("sm80", 1024, 1280, 20, 77),
    ("sm89", 4096, 320, 8, 77),
    ("sm89", 4096, 320, 8, 33),
    ("sm89", 9216, 320, 5, 77),
    ("sm90", 4096, 320, 8, 77),
    ("sm90", 4096, 640, 10, 77),
    ("sm90", 1024, 1280, 20, 77),
]
"""Family, N, C, H and keys where a choice by operations alone would be slower than the layer's own processor."""


@pytest.mark.parametrize(("family", "queries", "width", "heads", "keys"), REVIEWED)
def test_a_card_is_estimated_by_its_l2_cache_too(monkeypatch, family, queries, width, heads, keys):
    monkeypatch.setattr(Card, "of", lambda device: Card.typical(family))
    device, sizes = torch.device("cuda", 0), (queries, width, heads, (keys, keys), 77, 768)
    times = on_card(device, torch.float16, *sizes)
    assert times == on_card(device, torch.bfloat16, *sizes)
    assert min(times.values()) < choose.MARGIN * times["former"]
    assert on_card(device, torch.float32, *sizes) is None
    assert on_card(torch.device("cpu"), torch.float16, *sizes) is None


def test_a_card_that_is_not_known_is_estimated_otherwise(monkeypatch):
    def of(device):
        raise NotImplementedError("triton: no configurations for gfx000")

    monkeypatch.setattr(Card, "of", of)
    assert on_card(torch.device("cuda", 0), torch.float16, 64, 64, 8, (77,), 77, 768) is None


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("width", "heads"), [(320, 8), (640, 8), (640, 10), (1280, 20)])
def test_by_operations_alone_fewer_keys_than_c_over_h_minus_1_are_absorbed(size, width, heads):
    rates = replace(choose.RATES["cuda", size], softmax=1e30, bytes=1e30)
    for keys in range(1, 200):
        absorbed, projected = (
            choose.seconds(path, 4096, width, heads, (keys,), 77, rates, size) for path in ("absorbed", "projected")
        )
        if keys * (heads - 1) != width:
            assert (absorbed < projected) == (keys * (heads - 1) < width)


RATES = Rates("a card", 10, 2e12, 1e12, 1e11, 1e6, 1e12)
"""10 processors of 1e11 multiply-adds a second each."""


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (Work(10, 7e6, 0, 0), ("products", 1e-4)),
        (Work(11, 7e6, 0, 0), ("products", 2e-4)),  # one program more takes a round more
        (Work(10, 0, 1e7, 0), ("L2", 1e-4)),
        (Work(10, 0, 0, 1e7), ("memory", 1e-4)),
        (Work(10, 0, 0, 0, between=1e7), ("memory", 1e-4)),
        (Work(10, 0, 0, 0, turns=594), ("loads", 1e-4)),
    ],
    ids=str,
)
def test_the_largest_of_four_times(work, expected):
    parts = work.parts(10, RATES)
    name = max(parts, key=parts.__getitem__)
    assert (name, parts[name]) == (expected[0], pytest.approx(expected[1]))
    assert work.seconds(10, RATES) == pytest.approx(expected[1] + LAUNCH)


def test_what_the_cache_holds_does_not_go_through_memory():
    assert Work(10, 0, 0, 0, between=4e5).parts(10, RATES)["memory"] == 0

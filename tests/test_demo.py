"""The demonstration's parts: the embedded model's data, the measures, the grids."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import memkern
from memkern import demo
from memkern.demo.grid import draw_grid
from memkern.demo.judge import seen
from memkern.demo.measure import Measured, Share


def test_captions_and_training_images():
    memorized, scenes = demo.memorized(), demo.scenes()
    assert len(memorized) == 16
    assert {image.size for _, image in memorized} == {(32, 32)}
    assert demo.ordinary() == [scene.caption for scene in scenes]
    assert len(set(demo.ordinary())) == 24
    assert not set(demo.ordinary()) & {caption for caption, _ in memorized}


def test_correlation():
    images = [image for _, image in demo.memorized()]
    for index, image in enumerate(images):
        assert demo.correlation(image, image) == pytest.approx(1)
        assert max(demo.correlation(image, other) for other in images[:index] + images[index + 1 :]) < 0.85
    assert demo.correlation(images[0], np.zeros((32, 32, 3), np.uint8)) == 0


@pytest.mark.parametrize(("left", "position"), [(3, "left"), (11, "centre"), (19, "right")])
def test_judge_reads_a_drawn_object(left, position):
    image = Image.new("RGB", (32, 32), (20, 28, 90))
    image.paste((250, 220, 40), (left, 11, left + 10, 21))
    assert seen(image) == {"background": "navy", "colour": "yellow", "position": position}
    scene = demo.Scene("", colour="yellow", background="mint", position=position)
    assert demo.judge(image, scene) == {"colour": True, "background": False, "position": True}
    assert seen(Image.new("RGB", (32, 32), "white")) == {"background": "white", "colour": "", "position": ""}


def test_shares_and_what_is_written_of_them():
    certain = Share.of(np.ones((16, 2)))
    assert certain == Share(1, 1, 1)
    half = Share.of(np.array([[1.0, 1.0], [0.0, 0.0]] * 8))
    assert half.mean == 0.5
    assert 0.2 < half.low < 0.5 < half.high < 0.8
    empty = np.zeros((1, 1, 32, 32, 3), np.uint8)
    names = ("copies", "correlation", "colour", "background", "position")
    result = Measured("none", empty, empty, dict.fromkeys(names, half) | {"copies": certain}, 0.25)
    assert "| none | 100 (100–100) | 0.50 (0." in demo.table([result])
    numbers = demo.as_json([result], (0, 1))
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["settings"]["seeds"] == [0, 1]
    assert numbers["policies"]["none"]["copies"] == 1
    assert numbers["policies"]["none"]["intervals"]["copies"] == [1, 1]
    assert numbers["policies"]["none"]["seconds_per_image"] == 0.25


def test_g35_policies_take_turns(monkeypatch):
    """A seed of each, then the next seed: a busier machine slows all of them. The images are those of one by one."""
    pipe = demo.load()
    pipe.set_progress_bar_config(disable=True)
    turns = []
    original = demo.measure.__globals__["generate"]

    def generate(pipe, captions, seeds, **options):
        turns.append((memkern.status(pipe).patched, *seeds))
        return original(pipe, captions, seeds, **options)

    monkeypatch.setitem(demo.measure.__globals__, "generate", generate)
    given = (demo.memorized()[:1], demo.scenes()[:1], (0, 1))
    both = demo.measure(pipe, ["none", "zero-pad:1"], *given)
    assert turns == [(patched, seed) for seed in (0, 1) for patched in (False, True) for _ in range(2)]
    for one, name in zip(both, ("none", "zero-pad:1"), strict=True):
        (alone,) = demo.measure(pipe, [name], *given)
        assert one.policy == name
        assert np.array_equal(one.memorized, alone.memorized)
        assert np.array_equal(one.ordinary, alone.ordinary)
        assert one.shares == alone.shares


def test_grid_puts_images_under_their_labels():
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    grid = draw_grid([[red, blue], [blue, red]], ["first", "second"], ["left", "right\nseed 0"], cell=96)
    width, height = grid.size
    assert grid.getpixel((width - 60, height - 60)) == (255, 0, 0)
    assert grid.getpixel((width - 160, height - 60)) == (0, 0, 255)
    assert grid.crop((0, 0, width, 40)).getcolors(2) is None  # labels are drawn

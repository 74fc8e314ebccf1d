"""Rows of a batch that read the same keys: found by value, projected and kept once."""

from __future__ import annotations

import pytest
import torch
from field import image

import memkern
from memkern.pipelines.attention.rows import Rows
from memkern.testing import tiny_pipeline


def test_rows_by_their_bits():
    x = torch.tensor([[1.0, 2], [3, 4], [1, 2], [0.0, 0], [-0.0, 0]])
    other = torch.tensor([[1], [1], [1], [1], [1]])
    assert Rows.of(x) == Rows((0, 1, 0, 2, 3), (0, 1, 3, 4))
    assert Rows.of(x, other).which == (0, 1, 0, 2, 3)
    assert Rows.of(x[:3], other[:3] * torch.tensor([[1], [1], [2]])).which == (0, 1, 2)
    assert Rows.of(x[:0]) == Rows((), ())
    assert Rows.of(x).distinct(x).tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("which", "count"),
    [
        ([0], 1),
        ([0, 1], 1),
        ([0, 0, 1, 1], 1),
        ([0, 0, 0], 1),
        ([0, 0, 1, 2], 2),
        ([0, 1, 0, 1], 2),
        ([0, 1, 1, 2, 2, 0], 3),
        ([0, 0, 1, 1, 0, 0], 2),
        ([], 0),
    ],
    ids=str,
)
def test_segments_go_through_the_batch_once(which, count):
    numbers = torch.tensor(which, dtype=torch.int64)
    rows = Rows.of(numbers.view(-1, 1))
    segments = list(rows.segments())
    assert len(segments) == count
    x = torch.arange(len(which) * 3).view(len(which), 3)
    kept, places = rows.distinct(numbers.view(-1, 1)).view(-1), []
    for segment in segments:
        for place, number in zip(segment.folded(x), kept[segment.distinct], strict=True):
            assert {which[i // 3] for i in place.tolist()} == {int(number)}
            places += place.tolist()
    assert places == x.view(-1).tolist()


STAGES = ["embeds", "kv"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("a cat", {"num_images_per_prompt": 4}),
        (["a cat", "a dog"], {}),
        (["a cat", "a dog"], {"negative_prompt": ["", "a tree"], "num_images_per_prompt": 2}),
        (["a cat", "a cat"], {}),
        (["a cat", "a dog", "a cat"], {"num_images_per_prompt": 2}),
    ],
    ids=str,
)
def test_images_of_one_prompt(tokenizers, prompt, options, stage):
    pipe, plain = (tiny_pipeline(tokenizers["sd1"]) for _ in range(2))
    memkern.patch(pipe, "zero-pad:0.7", stage=stage)
    memkern.patch(plain, "zero-pad:0.7", accelerate=False)
    made, expected = (image(one, prompt, **options) for one in (pipe, plain))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_g30_what_is_kept_does_not_grow_with_the_images(tokenizers, stage):
    kept = []
    for images in (1, 4):
        pipe = tiny_pipeline(tokenizers["sd1"])
        memkern.patch(pipe, "zero-pad:0.7", stage=stage)
        image(pipe, num_images_per_prompt=images)
        kept.append(memkern.status(pipe).kept)
    assert kept[0] == kept[1] > 0


def test_a_projection_is_called_with_each_prompt_once(sd1):
    memkern.patch(sd1, "none")
    calls = []
    attn = sd1.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.to_k.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    image(sd1, ["a cat", "a dog"], num_images_per_prompt=2)
    assert calls[0] == 8, "the layer's own processor, before the context was seen again"
    assert set(calls[1:]) == {3}

"""The published alternatives, against their published arithmetic written by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest

from memkern import demo
from memkern.audit.images import Job, generate
from memkern.audit.methods import method
from memkern.audit.prompts import Prompt

OPTIONS = {"num_inference_steps": 3, "guidance_scale": 7.5}
CAPTION = demo.memorized()[0][0]


@pytest.fixture(scope="module")
def pipe():
    found = demo.load()
    found.set_progress_bar_config(disable=True)
    return found


def test_g33_noise_magnitude_counts_the_images_own_steps(pipe):
    """With a target that is met at once the optimization changes nothing, and its pass does not count."""
    of = {
        name: generate(pipe, [Job(method(name), Prompt("0", CAPTION), 0)], OPTIONS, "cpu")
        for name in ("none", "wen:1000")
    }
    assert of["wen:1000"][1][0]["noise_magnitude"] == of["none"][1][0]["noise_magnitude"]
    assert np.array_equal(of["wen:1000"][0][0], of["none"][0][0])


def test_g33_random_numbers(pipe):
    added = [
        int(word)
        for seed in range(400)
        for word in method("random-numbers:4").prompt("a cat on a mat", seed, pipe.tokenizer).split()
        if word.isdigit()
    ]
    assert len(added) == 1600
    assert 99_000 < max(added) < 100_000
    assert len(set(added)) > 1500, "drawn again for each seed"


def test_g33_random_tokens_are_any_of_the_vocabulary(tokenizers):
    """Decoded ids, from the whole vocabulary but SOT and EOT, between the prompt's own words."""
    words = "a cat on a mat".split()
    for tokenizer in tokenizers.values():
        texts = [method("random-tokens:1").prompt(" ".join(words), seed, tokenizer) for seed in range(2000)]
        assert texts == [method("random-tokens:1").prompt(" ".join(words), seed, tokenizer) for seed in range(2000)]
        assert len(set(texts)) > 1900
        pattern = re.compile(".*".join(f"(?:^| ){word}" for word in words), re.DOTALL)
        assert all(pattern.search(text) for text in texts)
        assert not any("<|" in text for text in texts)
        assert any(not text.isascii() for text in texts), "no list of English words"


def test_batches_are_those_of_single_images(pipe):
    """A generator each: the images differ by rounding alone."""
    jobs = [Job(method("random-numbers:1"), Prompt(str(seed), CAPTION), seed) for seed in range(3)]
    images, records = generate(pipe, jobs, OPTIONS, "cpu")
    for job, image, record in zip(jobs, images, records, strict=True):
        (alone,), (own,) = generate(pipe, [job], OPTIONS, "cpu")
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1
        assert record["text"] == own["text"] != CAPTION
        assert record["noise_magnitude"] == pytest.approx(own["noise_magnitude"], rel=1e-4)

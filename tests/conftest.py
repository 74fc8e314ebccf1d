"""Fixtures: uninitialised memory is NaN, CLIP's real vocabulary, tiny pipelines."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from vocabulary import clip_vocabulary

from memkern.testing import clip_tokenizer, tiny_pipeline

pytest.register_assert_rewrite("field", "fleet")

# Timings differ from run to run, and take time; test_measured.py tests them. This is for subprocesses as well.
os.environ.setdefault("MEMKERN_CHOICE", "estimated")
os.environ.setdefault("MEMKERN_CACHE", "off")

# Threads of a process that shares its cores spin; the tensors here are small.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its kind return NaN, in C++ as well: an output that is not written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, object]:
    """CLIP tokenizers with the real vocabulary: "sd1" pads with EOT, "sd2" with "!"."""
    tokens, merges = clip_vocabulary()
    return {
        "sd1": clip_tokenizer(tokens, merges),
        "sd2": clip_tokenizer(tokens, merges, pad_token="!"),
    }


@pytest.fixture(params=["sd1", "sd2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(tokenizers, family):
    """A tiny StableDiffusionPipeline with CLIP's real vocabulary."""
    return tiny_pipeline(tokenizers[family])


@pytest.fixture
def sd1(tokenizers):
    return tiny_pipeline(tokenizers["sd1"])

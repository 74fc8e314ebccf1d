"""encode_prompt of a patched pipeline against an unpatched one, with a text encoder of CLIP ViT-L's size."""

from __future__ import annotations

import pytest
import torch
from configurations import VIT_L, text_config
from pairs import compare
from transformers import CLIPTextModel

import memkern
from memkern.testing import tiny_pipeline, train_tokenizer


def pipeline():
    """A pipeline whose text encoder has SD 1.x's size and vocabulary size, with random weights."""
    tokenizer = train_tokenizer(["a photograph of an astronaut riding a horse"])
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(text_config(tokenizer, VIT_L)).eval()
    return tiny_pipeline(tokenizer, width=VIT_L["hidden_size"], text_encoder=text_encoder)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["swap-pad-zero-eot", "zero-pad:0.7", "prompt-eot-from-pad"])
def test_encode_prompt(benchmark, policy):
    patched, unpatched = pipeline(), pipeline()
    memkern.patch(patched, policy)
    arguments = ("a photograph of an astronaut riding a horse", torch.device("cpu"), 1, True)
    compare(
        benchmark,
        lambda: patched.encode_prompt(*arguments),
        lambda: unpatched.encode_prompt(*arguments),
        named="unpatched",
        rounds=40,
    )

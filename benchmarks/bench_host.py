"""What a cross-attention layer costs the host: layers so small that computing them takes next to nothing, on one
thread, in calls of a module as a UNet is called.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from pairs import compare
from torch import nn

import memkern
from memkern.pipelines.session import entered
from memkern.testing import tiny_pipeline, train_tokenizer

LAYERS, QUERIES, WIDTH = 16, 4, 32


class Layers(nn.Module):
    """As many cross-attention layers as SD 1.5's UNet has, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.config = FrozenDict(sample_size=8, in_channels=WIDTH)
        for index in range(LAYERS):
            attn = Attention(WIDTH, cross_attention_dim=WIDTH, heads=4, dim_head=8, processor=AttnProcessor2_0())
            self.add_module(str(index), nn.ModuleDict({"attn2": attn}))

    def forward(self, sample: torch.Tensor, timestep: int, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.children():
            sample = block["attn2"](sample, encoder_hidden_states=encoder_hidden_states)
        return sample


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.parametrize("stage", ["embeds", "kv"])
@pytest.mark.parametrize("policy", ["none", "zero-pad:0.7"])
def test_host(benchmark, policy, stage):
    theirs = Layers().eval()
    pipe = tiny_pipeline(train_tokenizer(["a cat"]), width=WIDTH, unet=copy.deepcopy(theirs))
    patch, sample = memkern.patch(pipe, policy, stage=stage), torch.randn(2, QUERIES, WIDTH)
    context = torch.cat(pipe.encode_prompt("a cat", "cpu", 1, True)[::-1])

    def call(model):
        return [model(sample, 5, context) for _ in range(20)]

    # Within a request, in which weights that are written to count it.
    with one_thread(), entered(patch.direct()):
        call(pipe.unet), call(theirs)
        compare(benchmark, lambda: call(pipe.unet), lambda: call(theirs), named="unpatched", rounds=25)
    assert len(patch.direct().layers) == LAYERS

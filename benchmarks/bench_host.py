"""The host time of a cross-attention layer: layers so small that computing them takes next to nothing, on one
thread, in calls of a module as a UNet is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from pairs import compare
from torch import nn

import memkern
from memkern.ops import again
from memkern.ops.attention import zero_excluded
from memkern.ops.triton.launch import Launch
from memkern.pipelines.attention import choose, paths
from memkern.pipelines.session import entered
from memkern.testing import tiny_pipeline, train_tokenizer

LAYERS, QUERIES, WIDTH = 16, 4, 32


class Layers(nn.Module):
    """Cross-attention layers, as many as SD 1.5's UNet has, and nothing else."""

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


class Stub:
    """A compiled kernel whose launch takes no time."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: None


@pytest.fixture
def gpu_path(monkeypatch):
    """Layers on the CPU that run as on a GPU, except for the launches of Triton's kernels."""

    def launches(attn, a, bias, vo, out_bias, source):
        return paths._absorbed_launches(attn, a, bias, zero_excluded(vo, bias), out_bias, source, "triton")

    monkeypatch.setattr(Launch, "run", lambda launch: Stub())
    monkeypatch.setattr(paths, "_absorbed_rows", launches)
    monkeypatch.setattr(choose, "fastest", lambda times: "absorbed")
    monkeypatch.setattr(again, "_checked", {torch.device("cpu"): True})
    monkeypatch.setattr(again.Again, "_serves", lambda self, x: True)
    monkeypatch.setattr(again, "absorbed_attention", lambda x, *rest, **options: torch.empty_like(x))


@torch.no_grad()
@pytest.mark.parametrize("policy", ["none", "zero-pad:0.7"])
def test_host_of_a_gpu(benchmark, gpu_path, policy):
    """Time until everything is launched; the unpatched layer's includes computing, which takes next to nothing."""
    timed(benchmark, policy, "embeds")


@torch.no_grad()
@pytest.mark.parametrize("stage", ["embeds", "kv"])
@pytest.mark.parametrize("policy", ["none", "zero-pad:0.7"])
def test_host(benchmark, policy, stage):
    timed(benchmark, policy, stage)


def timed(benchmark, policy: str, stage: str) -> None:
    """Patched layers against the same layers unpatched."""
    theirs = Layers().eval()
    pipe = tiny_pipeline(train_tokenizer(["a cat"]), width=WIDTH, unet=copy.deepcopy(theirs))
    patch, sample = memkern.patch(pipe, policy, stage=stage), torch.randn(2, QUERIES, WIDTH)
    context = torch.cat(pipe.encode_prompt("a cat", "cpu", 1, True)[::-1])

    def call(model):
        return [model(sample, 5, context) for _ in range(20)]

    # Within a request: there, weights count the writes to them.
    with one_thread(), entered(patch.direct()):
        call(pipe.unet), call(theirs)
        compare(benchmark, lambda: call(pipe.unet), lambda: call(theirs), named="unpatched", rounds=25)
    assert len(patch.direct().layers) == LAYERS

"""Every cross-attention layer of SD 1.5 and SDXL × dtype × preset × batch, with cold caches: is one of them slower than
unpatched?
"""

from __future__ import annotations

import copy

import pytest
import torch
from bench_cross_attention import SD15, SDXL, named
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from pairs import compare

from memkern import apply_policy
from memkern.ops.triton.layers import CONTEXT_WIDTHS
from memkern.testing import SiteHolder

PRESETS = ["none", "swap-pad-zero-eot", "zero-pad:0.7", "zero-eot-pad", "pad-from-eot", "prompt-eot-from-pad"]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
LENGTH, SOT, EOT, WORDS = 77, 49406, 49407, 10


def context(preset: str, batch: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Edited embeddings `[batch, 77, width]`: one negative for the first half, a prompt for each row of the second."""
    half = batch // 2
    edits = preset.removeprefix("swap-pad-")  # pads as "!" are rows like others, and change no time
    ids = torch.full((half, LENGTH), EOT)
    ids[:, 0] = SOT
    negative = torch.randn(1, LENGTH, width).repeat(half, 1, 1).to(dtype)
    uncond = apply_policy(negative, ids, edits, branch="uncond")
    ids[:, 1 : 1 + WORDS] = torch.arange(WORDS) + 1000
    cond = apply_policy(torch.randn(half, LENGTH, width).to(dtype), ids, edits)
    return torch.cat([uncond, cond])


@torch.no_grad()
@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layer", [*SD15, *SDXL], ids=named)
def test_grid(benchmark, layer, dtype, preset, batch):
    torch.manual_seed(0)
    width = CONTEXT_WIDTHS[layer.model]
    options = {"cross_attention_dim": width, "heads": layer.heads, "dim_head": layer.width // layer.heads}
    theirs = Attention(query_dim=layer.width, processor=AttnProcessor2_0(), **options).to(dtype).eval()
    ours = copy.deepcopy(theirs)
    holder = SiteHolder(torch.nn.ModuleDict({"attn2": ours}))
    x, seen = torch.randn(batch, layer.queries, layer.width).to(dtype), context(preset, batch, width, dtype)
    for _ in range(2):
        ours(x, encoder_hidden_states=seen)
    rounds = 9 if layer.queries * batch > 4096 else 25
    compare(
        benchmark,
        lambda held=holder: ours(x, encoder_hidden_states=seen),
        lambda: theirs(x, encoder_hidden_states=seen),
        named="unpatched",
        rounds=rounds,
        cold=True,
    )
    what = f"{layer.model}, {layer.queries}×{layer.width}, {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info.update(grid=what, preset=preset, batch=batch)

"""Cross-attention layers of Stable Diffusion on the CPU: a patched layer against its alternatives."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from cross_attention import CrossAttention
from diffusers.models.attention_processor import AttnProcessor
from pairs import compare

from memkern.ops.cpu import Product, Softmax
from memkern.ops.triton.layers import CONTEXT_WIDTHS, Layer
from memkern.testing import SiteHolder

SD15 = [Layer("SD 1.5", *size, 8) for size in ((4096, 320), (1024, 640), (256, 1280), (64, 1280))]
SDXL = [Layer("SDXL", 4096, 640, 10), Layer("SDXL", 1024, 1280, 20)]
CASES = [("diffusers", layer, keys) for keys in ((77, 77), (77, 33), (33, 33)) for layer in SD15]
CASES += [("diffusers", layer, (33, 33)) for layer in SDXL]
OTHERS = ["diffusers, masked", "eager", "reference, absorbed", "diffusers, compiled"]
CASES += [(against, layer, (77, 33)) for against in OTHERS for layer in SD15]
DTYPES = [torch.bfloat16, torch.float32]


@functools.lru_cache(maxsize=1)
def made(layer, keys, dtype):
    """The layer in every available way; "patched" as in a pipeline that has seen the context before."""
    attention = CrossAttention(layer.queries, layer.width, layer.heads, CONTEXT_WIDTHS[layer.model], keys, dtype, "cpu")
    calls = attention.implementations()
    eager, patched = copy.deepcopy(attention.layer), copy.deepcopy(attention.layer)
    eager.set_processor(AttnProcessor())
    holder = SiteHolder(torch.nn.ModuleDict({"attn2": patched}))
    calls["eager"] = lambda: eager(attention.x, encoder_hidden_states=attention.context)
    calls["patched"] = lambda held=holder: patched(attention.x, encoder_hidden_states=attention.context)
    calls["patched"](), calls["patched"]()
    return calls


def named(value):
    """A parameter in a test's name."""
    if isinstance(value, Layer):
        return f"{value.queries}x{value.width}"
    return value if isinstance(value, str) else f"keys {value[0]}+{value[1]}"


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("against", "layer", "keys"), CASES, ids=named)
def test_cross_attention(benchmark, against, layer, keys, dtype):
    calls = made(layer, keys, dtype)
    benchmark.group = f"{layer.model}, keys {keys[0]}/{keys[1]}, {str(dtype).removeprefix('torch.')}, against {against}"
    compare(benchmark, calls["patched"], calls[against], named=against, rounds=15)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layer", SD15, ids=named)
def test_products(benchmark, layer, dtype):
    """The two products of an absorbed layer with the softmax between, 77 keys: no layer above can be faster here."""
    keys = 77 * layer.heads
    x = torch.randn(layer.queries, layer.width).to(dtype)
    a, vo = torch.randn(2, keys, layer.width).to(dtype)
    softmax, output = Softmax(a, torch.zeros(1, 77), dtype), Product(vo.mT)
    benchmark.extra_info["operations"] = 4 * x.numel() * keys
    benchmark.pedantic(lambda: output(softmax(x)), rounds=30, warmup_rounds=3)

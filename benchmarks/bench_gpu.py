"""On a GPU: cross-attention layers of Stable Diffusion and the edits, each in every available way; `make gpu`."""

from __future__ import annotations

import functools

import pytest
import torch
from bench_attention_mass import SD15, arguments, materialized
from cross_attention import CrossAttention
from model import BATCH, Ceiling, Work, absorbed, estimates, mass, projected, rows_work, unfused

from memkern import lower, ops
from memkern.ops import backends
from memkern.ops.triton.configs import Card
from memkern.ops.triton.layers import CONTEXT_WIDTHS, KEYS, LAYERS
from memkern.roles import Role

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from triton.testing import do_bench, do_bench_cudagraph

DTYPES = [torch.float16, torch.bfloat16]
FLOORS = {"memkern, projected": projected, "memkern, absorbed": absorbed}


@functools.cache
def ceiling() -> Ceiling:
    """The card's rates in this run: a copy of 512 MiB, and a product of 8192 × 8192 matrices."""
    big = torch.empty(1 << 28, dtype=torch.float16, device="cuda")
    square = torch.randn(8192, 8192, dtype=torch.float16, device="cuda")
    copy = do_bench(lambda: big.clone(), return_mode="median")
    product = do_bench(lambda: square @ square, return_mode="median")
    return Ceiling(2 * big.nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3)


def predicted(name: str, layer, keys: int) -> float:
    """The prediction of benchmarks/model.py for a path on this card, in microseconds; NaN if it has none."""
    path = {"diffusers": "former", "memkern, projected": "projected", "memkern, absorbed": "absorbed"}.get(name)
    if path is None:
        return float("nan")
    return estimates(layer, (keys, keys), BATCH, Card.of(torch.device("cuda", torch.cuda.current_device())))[path]


def measure(benchmark, function, work: Work, estimate: float = float("nan")) -> None:
    """Device time with a cold L2 cache, launches included; in a CUDA graph, without them; the floor's share."""
    low, median, high = (1e3 * quantile for quantile in do_bench(function, quantiles=[0.2, 0.5, 0.8]))
    try:
        graph = 1e3 * do_bench_cudagraph(function, return_mode="median")
    except RuntimeError as error:
        graph = float("nan")
        benchmark.extra_info["graph_error"] = str(error).splitlines()[0]
    floor = ceiling().microseconds(work)
    benchmark.extra_info.update(
        median_us=median,
        quantiles_us=[low, high],
        graph_us=graph,
        floor_us=floor,
        ceiling=vars(ceiling()),
        model_us=estimate,
    )
    benchmark.pedantic(lambda: (function(), torch.cuda.synchronize()), rounds=5, warmup_rounds=1)


NAMES = [
    "diffusers",
    "diffusers, masked",
    "diffusers, compiled",
    "memkern, projected",
    "memkern, absorbed",
    "reference, absorbed",
]


@functools.lru_cache(maxsize=1)
def made(layer, keys, dtype):
    attention = CrossAttention(
        layer.queries, layer.width, layer.heads, CONTEXT_WIDTHS[layer.model], (keys,) * BATCH, dtype, "cuda"
    )
    return attention.implementations("triton")


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.model} {layer.queries}x{layer.width}")
@pytest.mark.parametrize("name", NAMES)
def test_cross_attention(benchmark, layer, keys, dtype, name):
    benchmark.group = f"{layer.model} {layer.queries}×{layer.width}, {keys} keys, {str(dtype).removeprefix('torch.')}"
    benchmark.name = name
    implementations = made(layer, keys, dtype)
    torch.testing.assert_close(implementations[name](), implementations["diffusers"](), atol=3e-2, rtol=3e-2)
    measure(benchmark, implementations[name], FLOORS.get(name, unfused)(layer, keys), predicted(name, layer, keys))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layer", SD15, ids=lambda layer: f"{layer.queries}x{layer.width}")
@pytest.mark.parametrize("name", ["materialized", "triton"])
def test_mass(benchmark, layer, dtype, name):
    benchmark.group = f"attention_mass {layer.queries}×{layer.width}, {str(dtype).removeprefix('torch.')}"
    benchmark.name = name
    given = arguments(layer, 77, dtype, "cuda")
    function = materialized if name == "materialized" else functools.partial(ops.attention_mass, backend=name)
    measure(benchmark, lambda: function(*given), mass(layer, 77))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("width", CONTEXT_WIDTHS.values())
@pytest.mark.parametrize("operator", ["edit_embeds", "edit_kv"])
@pytest.mark.parametrize("backend", ["clone", "cuda", "triton", "torch"])
def test_edit(benchmark, operator, width, dtype, backend):
    benchmark.group = f"{operator} 64×77×{width}, {str(dtype).removeprefix('torch.')}"
    benchmark.name = backend
    if backend != "clone" and backends.installed(backend):
        pytest.skip(backends.installed(backend)[0])
    row = [Role.SOT] + [Role.PROMPT] * 10 + [Role.EOT] + [Role.PAD] * 65
    plan = lower("zero-pad:0.7", torch.tensor([row] * 64, dtype=torch.uint8, device="cuda"), "cond")
    k, v = torch.randn(2, 64, 77, width, device="cuda").to(dtype)
    tensors = 1 if operator == "edit_embeds" else 2
    if backend == "clone":
        function = k.clone if tensors == 1 else lambda: (k.clone(), v.clone())
    elif tensors == 1:
        function = functools.partial(ops.edit_embeds, k, None, plan.source, plan.v_scale, backend=backend)
    else:
        arguments = (k, v, None, None, plan.source, plan.k_scale, plan.v_scale)
        function = functools.partial(ops.edit_kv, *arguments, backend=backend)
    measure(benchmark, function, rows_work(width, tensors))

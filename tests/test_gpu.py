"""Tests that need a GPU: CUDA graphs, torch.compile with its own kernels, streams and devices, a whole pipeline."""

from __future__ import annotations

import pytest
import torch
from operators import random_plan

import memkern
from memkern import ops
from memkern.ops import backends
from memkern.ops.again import Again
from memkern.ops.attention import zero_excluded
from memkern.pipelines.attention.measured import Chooser
from memkern.testing import tiny_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def cases(device="cuda", dtype=torch.float16):
    """Operator → arguments of ordinary size."""
    torch.manual_seed(0)
    source, scale = random_plan(2, 77, 77)
    rows = torch.randn(2, 77, 64).to(dtype)
    q, k = torch.randn(2, 4, 33, 40).to(dtype), torch.randn(2, 4, 77, 40).to(dtype)
    x, a = torch.randn(2, 33, 320).to(dtype), (torch.randn(2, 4, 77, 320) / 18).to(dtype)
    bias = torch.randn(2, 77)
    bias[0, 30:] = -torch.inf
    ids, roles = torch.randint(0, 50, (2, 77)), torch.randint(0, 4, (2, 77), dtype=torch.uint8)
    roles[:, 0] = 0
    found = {
        "edit_embeds": (rows, None, source, scale),
        "edit_kv": (rows, rows, None, None, source, scale, scale),
        "embed_tokens": (ids, roles, torch.randn(50, 64).to(dtype), torch.randn(77, 64).to(dtype), 0),
        "biased_attention": (q, k, k, bias, 0.15),
        "attention_mass": (q, k, bias, bias.exp(), 0.15),
        "absorbed_attention": (x, a, bias, a, None, x),
    }
    return {
        name: tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments)
        for name, arguments in found.items()
    }


OPERATORS = list(cases("cpu"))


def same(ours, theirs):
    """Results of one computation in another setting."""
    ours, theirs = (value if isinstance(value, tuple) else (value,) for value in (ours, theirs))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.float().cpu(), other.float().cpu(), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_runs_a_kernel(operator):
    arguments = cases()[operator]
    same(getattr(ops, operator)(*arguments), getattr(ops, operator)(*arguments, backend="torch"))
    assert not [failure for failure in backends.failures() if operator in failure]


@pytest.mark.parametrize(
    ("operator", "backend"),
    [
        (operator, backend)
        for operator in OPERATORS
        for backend in ("auto", "cuda", "triton")
        if backend == "auto" or backend in backends.serving(operator)
    ],
)
def test_cuda_graph(operator, backend):
    """Captured once, replayed on other values."""
    arguments, run = cases()[operator], getattr(ops, operator)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(*arguments, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*arguments, backend=backend)
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.dtype == torch.float16:
            argument.mul_(0.5)
    graph.replay()
    same(captured, run(*arguments, backend="torch"))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compile(operator, backend):
    arguments, run = cases()[operator], getattr(ops, operator)
    compiled = torch.compile(lambda *given: run(*given, backend=backend), fullgraph=True)
    same(compiled(*arguments), run(*arguments, backend="torch"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_another_stream(operator):
    """Launches go to the current stream: they wait for what that stream waits for."""
    arguments, run = cases()[operator], getattr(ops, operator)
    expected = run(*arguments, backend="torch")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
        result = run(*late)
    stream.synchronize()
    same(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("operator", OPERATORS)
def test_another_device(operator):
    arguments = cases("cuda:1")[operator]
    same(getattr(ops, operator)(*arguments), getattr(ops, operator)(*arguments, backend="torch"))
    assert torch.cuda.current_device() == 0


def test_attention_mass_keeps_no_probabilities():
    q, k = torch.randn(2, 8, 4096, 40, device="cuda").half(), torch.randn(2, 8, 77, 40, device="cuda").half()
    bias = torch.zeros(2, 77, device="cuda")
    ops.attention_mass(q, k, bias, bias, backend="triton")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.attention_mass(q, k, bias, bias, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 2 * 8 * 4096 * 77 * 2 / 4  # a quarter of them in float16


def unet_call(tokenizers, dtype=torch.float16):
    """A patched tiny pipeline on the GPU, and a call of its UNet with a context that it has prepared."""
    pipe = tiny_pipeline(tokenizers["sd1"]).to("cuda", dtype)
    memkern.patch(pipe, "zero-pad:0.7")
    cond, uncond = pipe.encode_prompt("a cat on a mat", torch.device("cuda"), 1, True)
    context = torch.cat([uncond, cond])
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 8, 8).to("cuda", dtype)
    step = torch.tensor(10, device="cuda")
    return pipe, lambda: pipe.unet(latents, step, encoder_hidden_states=context).sample, latents


@torch.no_grad()
def test_a_captured_unet_step(tokenizers):
    """Warmed up, captured, and replayed on other latents: no host sync, and no memory but the graph's."""
    _, call, latents = unet_call(tokenizers)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    latents.mul_(0.5)
    graph.replay()
    same(captured, call())


@torch.no_grad()
def test_reduce_overhead(tokenizers):
    pipe, call, _ = unet_call(tokenizers)
    expected = call().clone()
    pipe.unet.compile(mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = call().clone()
    same(found, expected)


@torch.no_grad()
def test_steps_on_two_streams(tokenizers):
    _, call, _ = unet_call(tokenizers)
    expected = [call() for _ in range(3)][-1]
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append([call() for _ in range(4)][-1])
    torch.cuda.synchronize()
    for result in results:
        same(result, expected)


@torch.no_grad()
def test_steps_keep_no_memory(tokenizers):
    _, call, _ = unet_call(tokenizers)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("policy", ["swap-pad-zero-eot", "zero-pad:0.7", "prompt-eot-from-pad", "none"])
def test_a_patched_pipeline_gives_the_images_of_the_cpu(tokenizers, policy):
    latents, embeds = [], []
    for device in ("cpu", "cuda"):
        pipe = tiny_pipeline(tokenizers["sd1"]).to(device)
        pipe.set_progress_bar_config(disable=True)
        memkern.patch(pipe, policy)
        embeds.append(pipe.encode_prompt("a cat on a mat", torch.device(device), 1, True))
        generator = torch.Generator().manual_seed(0)
        result = pipe("a cat on a mat", num_inference_steps=3, output_type="latent", generator=generator)
        latents.append(result.images)
    for ours, theirs in zip(*embeds, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(latents[1].cpu(), latents[0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_paths_are_timed_once_and_nothing_of_the_image_moves(tokenizers, tmp_path, caplog, dtype):
    """The second pipeline reads what the first one wrote down, and makes the same image."""
    latents, shown = [], []
    for _ in range(2):
        pipe = tiny_pipeline(tokenizers["sd1"]).to("cuda", dtype)
        patch = memkern.patch(pipe, "zero-pad:0.7")
        patch.family.chooser = Chooser(True, 60.0, tmp_path)
        torch.cuda.manual_seed(0)
        state = torch.cuda.get_rng_state()
        generator = torch.Generator().manual_seed(0)
        result = pipe("a cat on a mat", num_inference_steps=4, output_type="latent", generator=generator)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        latents.append(result.images)
        shown.append([choice.times for choice in patch.last.layers.values()])
        assert patch.family.chooser.left > 0
    assert shown[0]
    assert "no path was timed" not in caplog.text
    assert shown[0] == shown[1]
    assert torch.equal(*latents)


@torch.no_grad()
def test_launches_are_repeated_as_they_were_compiled():
    x, a, bias, vo, _, _ = cases()["absorbed_attention"]
    vo = zero_excluded(vo, bias.unsqueeze(1))
    repeated = Again(a, bias, vo, None, "triton")
    repeated(x)
    assert repeated._launches is not None
    for _ in range(3):
        other = torch.randn_like(x)
        assert torch.equal(repeated(other), ops.absorbed_attention(other, a, bias, vo, zeroed=True))

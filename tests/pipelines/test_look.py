"""The UNet's context is looked at once: a step that brings no new one compares no values."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import sd_families

import memkern
from memkern import seen
from memkern.testing import tiny_pipeline


@pytest.fixture
def looks(monkeypatch):
    """The number of comparisons of values, which wait for a device."""
    counted = []
    fingerprints = seen.fingerprints
    for place in ("memkern.seen.fingerprints", "memkern.ledger.fingerprints"):
        monkeypatch.setattr(place, lambda rows: counted.append(rows.shape) or fingerprints(rows))
    return counted


def per_step(family, looks, **options):
    """The number of comparisons at the end of each step."""
    found = []

    def callback(pipe, step, timestep, tensors):
        found.append(len(looks))
        return {}

    family(steps=5, callback_on_step_end=callback, **options)
    return found


@pytest.mark.parametrize("policy", ["swap-pad-zero-eot", "zero-pad:0.7", "ren:1.25", "none"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionControlNetPipeline, guess mode"])
def test_a_step_without_a_new_context_compares_nothing(tokenizers, looks, policy, name):
    """Guess mode makes a new view of the context at every step: it is the same place, unwritten."""
    family = sd_families(tokenizers)[name]()
    memkern.patch(family.pipe, policy)
    found = per_step(family, looks)
    assert found[0] > 0
    assert found == found[:1] * 5


def test_a_context_whose_writes_are_not_counted_is_compared_at_every_step(tokenizers, looks):
    family = sd_families(tokenizers)["StableDiffusionPipeline"]()
    memkern.patch(family.pipe)
    with torch.inference_mode():
        found = per_step(family, looks)
    assert [after - before for before, after in itertools.pairwise(found)] == [1] * 4


def test_a_compiled_unet_is_looked_at_as_well(tokenizers):
    pipe = tiny_pipeline(tokenizers["sd1"])
    memkern.patch(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    raw = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))

    def callback(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.cat([raw, raw])}

    options = {"num_inference_steps": 2, "output_type": "latent"}
    pipe("a cat", **options)
    with pytest.raises(memkern.UnmitigatedError, match="2 of 2 rows that the UNet reads"):
        pipe("a cat", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"], **options)


def test_the_operator_that_looks(sd1):
    """Opaque to a graph, transparent to gradients."""
    memkern.patch(sd1, "none")
    sample, context = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 77, 32)
    begins, ends = torch.ops.memkern.unet_begins.default, torch.ops.memkern.unet_ends.default
    torch.library.opcheck(begins, (sample, context, torch.tensor(5), 1.0, -1))
    torch.library.opcheck(ends, (sample, -1))
    out = ends(begins(sample, context, torch.tensor(5), 1.0, -1), -1)
    (grad,) = torch.autograd.grad(out.square().sum(), sample)
    torch.testing.assert_close(grad, 2 * sample)


@pytest.mark.parametrize("way", ["torch.compile", "in place", "in a function"])
def test_one_graph_and_no_break(tokenizers, way):
    """At the embeds stage, whatever is compiled; unedited rows are noticed in each way."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    pipe = tiny_pipeline(tokenizers["sd1"])
    memkern.patch(pipe)
    options = {"backend": backend, "fullgraph": True}
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = pipe.unet
    if way == "torch.compile":
        call = torch.compile(pipe.unet, **options)
    elif way == "in place":
        pipe.unet.compile(**options)
    else:
        call = torch.compile(
            lambda sample, time, context: pipe.unet(sample, time, encoder_hidden_states=context), **options
        )
    with torch.no_grad():
        for prompt in ("a cat", "a photograph of a dog"):
            cond, uncond = pipe.encode_prompt(prompt, "cpu", 1, True)
            call(sample, torch.tensor(5), torch.cat([uncond, cond]))
        assert len(graphs) == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        with pytest.raises(memkern.UnmitigatedError, match="2 of 2 rows that the UNet reads"):
            call(sample, torch.tensor(5), torch.randn(2, 77, 32))

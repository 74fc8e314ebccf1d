"""Graphs of compiled UNets: one, whole, and not traced again for another prompt, policy or adapter."""

from __future__ import annotations

import pytest
import torch
from companions import ip_adapter, lora
from field import image

import memkern
from memkern.testing import tiny_pipeline

PROMPTS = [
    "a",
    "a cat",
    "a photograph of a cat",
    "a photograph of a cat on a mat in a garden",
    "a photograph of an old cat that sleeps on a red mat in the garden of a small house by the sea",
    "a " + "very " * 100 + "old cat",
]
POLICIES = ["zero-pad:0.7", "swap-pad-zero-eot", "ren:1.25"]
CROSS_ATTENTION = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]


def compile_all(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)


def compile_in_place(pipe):
    pipe.unet.compile(backend="aot_eager", fullgraph=True)


def compile_blocks(pipe):
    pipe.unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True)


WAYS = {"torch.compile": (compile_all, 1), "in place": (compile_in_place, 1), "repeated blocks": (compile_blocks, 2)}


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(
    ("way", "order"),
    [
        *((way, "patched first") for way in WAYS),
        *(pytest.param(way, "compiled first", marks=[pytest.mark.slow] * (way != "torch.compile")) for way in WAYS),
    ],
)
def test_d18_g29_prompts_policies_and_adapters_share_one_graph(tokenizers, way, order):
    compiles, most = WAYS[way]
    pipe, plain = tiny_pipeline(tokenizers["sd1"]), tiny_pipeline(tokenizers["sd1"])
    for one in (pipe, plain):
        lora(one, "style", 1, CROSS_ATTENTION)
        lora(one, "other", 2, CROSS_ATTENTION)
        one.unet.set_adapter("style")
    for act in (compiles, memkern.patch) if order == "compiled first" else (memkern.patch, compiles):
        act(pipe)
    memkern.patch(plain)
    images = []
    for policy in POLICIES:
        for adapter in ("style", "other"):
            for one in (pipe, plain):
                getattr(one.unet, "_orig_mod", one.unet).set_adapter(adapter)
            for prompt in PROMPTS:
                with memkern.using(pipe, policy), memkern.using(plain, policy):
                    made, expected = image(pipe, prompt), image(plain, prompt)
                torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
                images.append(made)
    assert len({image.flatten()[0].item() for image in images}) == len(images)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= most
    assert not torch._dynamo.utils.counters["graph_break"]
    assert memkern.status(pipe).counts.protected == len(images)


def test_the_operator_of_a_layer(sd1):
    """A graph runs with the dtype that it was traced with, autocast's too."""
    memkern.patch(sd1)
    image(sd1)
    attn = sd1.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    x, context = torch.randn(2, 16, 32), torch.randn(2, 77, 32)
    rest = [], [], None, attn.processor.number
    operator = torch.ops.memkern.cross_attention.default
    with torch.no_grad(), memkern.using(sd1, "none"):
        torch.library.opcheck(operator, (x, context, *rest, None), test_utils=("test_schema", "test_faketensor"))
        assert operator(x, context, *rest, torch.bfloat16).dtype == torch.bfloat16
        torch.testing.assert_close(operator(x, context, *rest, None), attn(x, encoder_hidden_states=context))


def test_a_graph_whose_layer_is_gone(sd1):
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"a layer that is gone|layer that is gone"):
        torch.ops.memkern.cross_attention(
            torch.randn(2, 16, 32), torch.randn(2, 77, 32), [], [], None, torch.tensor(-1), None
        )


def test_gradients_through_a_compiled_unet(tokenizers):
    """A graph for training, in which gradients are wanted, has the layers' own processors."""
    pipe, plain = tiny_pipeline(tokenizers["sd1"]), tiny_pipeline(tokenizers["sd1"])
    memkern.patch(pipe, "none")
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)
    grads = []
    for one in (pipe, plain):
        context = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        one.unet(sample, torch.tensor(5), encoder_hidden_states=context).sample.square().sum().backward()
        grads.append(context.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_captured_streams_are_left_alone(sd1, monkeypatch):
    """A graph of a stream would replay the keys of the prompt it was captured with."""
    from memkern.pipelines.unet import keeping, site

    expected = image(sd1)
    for place in (keeping, site):
        monkeypatch.setattr(place, "is_captured", lambda x: True)
    memkern.patch(sd1, "none")
    assert torch.equal(image(sd1), expected)
    assert "a stream is being captured" in str(memkern.status(sd1))
    memkern.patch(sd1, "zero-pad:0.7", stage="kv")
    with pytest.raises(memkern.UnmitigatedError, match="a stream is being captured"):
        image(sd1)


@pytest.mark.parametrize(
    "way", [*(pytest.param(way, marks=pytest.mark.slow) for way in ("torch.compile", "in place")), "repeated blocks"]
)
def test_a_lora_is_scaled_in_a_graph(tokenizers, way):
    """`cross_attention_kwargs={"scale": …}`: diffusers scales layers in Python, which a graph puts off to its end."""
    pipe, plain = tiny_pipeline(tokenizers["sd1"]), tiny_pipeline(tokenizers["sd1"])
    for one in (pipe, plain):
        lora(one)
        memkern.patch(one)
    WAYS[way][0](pipe)
    images = []
    for scale in (0.3, 1.0, 0.9):
        made, expected = (image(one, cross_attention_kwargs={"scale": scale}) for one in (pipe, plain))
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
        images.append(made)
    assert (images[0] - images[1]).abs().max() > 1e-2


def test_what_is_set_on_a_processor_is_set_on_the_one_that_computes(tokenizers):
    pipe, plain = tiny_pipeline(tokenizers["sd1"]), tiny_pipeline(tokenizers["sd1"])
    for one in (pipe, plain):
        options = ip_adapter(one)
    memkern.patch(pipe, "none")
    for one in (pipe, plain):
        for processor in one.unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [0.1]
    torch.testing.assert_close(image(pipe, **options), image(plain, **options), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_patched", [False, True])
def test_processors_moved_to_another_compiled_unet(tokenizers, is_patched):
    pipe, other, plain = (tiny_pipeline(tokenizers["sd1"], seed=seed) for seed in (0, 1, 1))
    memkern.patch(pipe, "none")
    if is_patched:
        memkern.patch(other, "none")
    other.unet.set_attn_processor(pipe.unet.attn_processors)
    compile_all(other)
    torch.testing.assert_close(image(other), image(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["strict export", "export", "trace"])
def test_programs_for_elsewhere(sd1, how):
    """An exported UNet has nothing of memkern; edits of keys and values are refused."""

    class Step(torch.nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet = unet

        def forward(self, sample, context):
            return self.unet(sample, 5, encoder_hidden_states=context, return_dict=False)[0]

    def program():
        if how == "trace":
            return torch.jit.trace(step, arguments, check_trace=False)
        return torch.export.export(step, arguments, strict=how == "strict export").module()

    step, arguments = Step(sd1.unet), (torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32))
    with torch.no_grad():
        expected = step(*arguments)
        memkern.patch(sd1)
        made = program()
        torch.testing.assert_close(made(*arguments), expected, rtol=1e-4, atol=1e-4)
        memkern.patch(sd1, stage="kv")
        with pytest.raises(Exception, match="not part of an exported program"):
            program()

"""The first self-attention: once for rows that are still equal, and only there."""

from __future__ import annotations

import pytest
import torch
from families import sd_families, sdxl_families
from field import image

import memkern
from memkern.pipelines.unet.branches import SelfAttentionProcessor, equal_rows
from memkern.testing import tiny_pipeline

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def seen(unet):
    """The number of rows in the projection of the first self-attention's queries, call by call."""
    rows = []
    linear = unet.get_submodule(FIRST).to_q

    class Counted(torch.nn.Linear):
        def forward(self, x):
            rows.append(len(x))
            return super().forward(x)

    linear.__class__ = Counted
    return rows


def told(pipe):
    return memkern.status(pipe).shared.get(FIRST)


def call(unet, sample):
    context = torch.randn(len(sample), 77, 32, generator=torch.Generator().manual_seed(0)).to(sample)
    with torch.no_grad():
        return unet(sample, torch.tensor(5), encoder_hidden_states=context).sample


@pytest.mark.parametrize("images", [1, 3])
def test_the_branches_of_guidance_are_computed_once(sd1, images):
    expected = image(sd1, num_images_per_prompt=images)
    rows = seen(sd1.unet)
    memkern.patch(sd1, "none")
    made = image(sd1, num_images_per_prompt=images)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert set(rows) == {images}
    assert told(sd1) == f"{images} of {2 * images} rows, the others are equal"


@pytest.mark.parametrize("which", [[0, 0], [0, 1], [0, 1, 0, 1], [0, 1, 1, 2, 0], [0]], ids=str)
def test_any_groups_of_equal_rows(sd1, which):
    drawn = torch.randn(max(which) + 1, 4, 8, 8)
    sample = drawn[which]
    expected = call(sd1.unet, sample)
    rows = seen(sd1.unet)
    memkern.patch(sd1, "none")
    torch.testing.assert_close(call(sd1.unet, sample), expected, rtol=1e-4, atol=1e-4)
    assert rows == [len(drawn)]


def test_rows_by_value():
    x = torch.tensor([[1.0, 2], [3, 4], [1, 2], [float("nan"), 0], [float("nan"), 0]])
    assert equal_rows(x) == ([0, 1, 3, 4], [0, 1, 0, 2, 3])
    assert equal_rows(x[:0]) == ([], [])


def test_timesteps_of_their_own_differ(sd1):
    """Rows of one sample at two noise levels are two rows."""
    rows = seen(sd1.unet)
    memkern.patch(sd1, "none")
    with torch.no_grad():
        sd1.unet(torch.ones(2, 4, 8, 8), torch.tensor([5, 500]), encoder_hidden_states=torch.ones(2, 77, 32))
    assert rows == [2]


@pytest.mark.parametrize("accelerate", ["attention", False])
def test_it_can_be_left_out(sd1, accelerate):
    expected = image(sd1)
    rows = seen(sd1.unet)
    memkern.patch(sd1, "none", accelerate=accelerate)
    assert torch.allclose(image(sd1), expected, rtol=1e-4, atol=1e-4)
    assert set(rows) == {2}
    assert told(sd1) is None
    assert bool(memkern.status(sd1).layers) == bool(accelerate)


def test_unknown_ways_to_accelerate_are_refused(sd1):
    with pytest.raises(ValueError, match="accelerate: expected True, False or 'attention', got 'all'"):
        memkern.patch(sd1, accelerate="all")


class Doubles:
    """A foreign processor."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return 2 * hidden_states


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["processor", "hook", "hook on a projection", "forward"])
def test_layers_of_others_are_left_alone(sd1, what, when):
    def touch():
        attn = sd1.unet.get_submodule(FIRST)
        if what == "processor":
            attn.set_processor(Doubles())
        elif what == "forward":
            attn.forward = lambda x, *rest, **named: 2 * x
        else:
            part = attn if what == "hook" else attn.to_v
            part.register_forward_hook(lambda module, args, out: (lengths.append(len(out)), 2 * out)[1])

    lengths = []
    if when == "before":
        touch()
    memkern.patch(sd1, "none")
    if when == "after":
        touch()
    made = image(sd1)
    assert told(sd1) is None
    assert set(lengths) <= {2}
    memkern.unpatch(sd1)
    torch.testing.assert_close(made, image(sd1), rtol=1e-4, atol=1e-4)


def test_the_layer_gets_its_processor_back(sd1):
    before = sd1.unet.get_submodule(FIRST).processor
    memkern.patch(sd1)
    assert issubclass(type(sd1.unet.get_submodule(FIRST).processor), SelfAttentionProcessor)
    memkern.unpatch(sd1)
    assert sd1.unet.get_submodule(FIRST).processor is before


def test_gradients_go_through_every_row(sd1):
    rows = seen(sd1.unet)
    memkern.patch(sd1, "none")
    sample = torch.ones(2, 4, 8, 8, requires_grad=True)
    sd1.unet(sample, torch.tensor(5), encoder_hidden_states=torch.ones(2, 77, 32)).sample.sum().backward()
    assert rows == [2]
    torch.testing.assert_close(sample.grad[0], sample.grad[1], rtol=1e-3, atol=1e-5)


def test_conditions_added_before_it(sdxl):
    """SDXL's branches differ in their pooled prompts from the first resnet on."""
    memkern.patch(sdxl, "none")
    image(sdxl)
    assert not memkern.status(sdxl).shared


@pytest.fixture
def sdxl(tokenizers):
    return sdxl_families(tokenizers)["StableDiffusionXLPipeline"]().pipe


@pytest.fixture
def _afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_afresh")
def test_a_compiled_unet_computes_them_once_too(tokenizers):
    pipe, plain = tiny_pipeline(tokenizers["sd1"]), tiny_pipeline(tokenizers["sd1"])
    memkern.patch(pipe, "zero-pad:0.7")
    memkern.patch(plain, "zero-pad:0.7", accelerate=False)
    pipe.unet.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(image(pipe), image(plain), rtol=1e-4, atol=1e-4)
    assert told(pipe) == "1 of 2 rows, the others are equal"


@pytest.mark.usefixtures("_afresh")
@pytest.mark.parametrize("when", ["before", "after"])
def test_blocks_that_are_compiled_keep_one_graph(sd1, when):
    """Their graph is shared with blocks that see no equal rows."""
    expected = image(sd1)
    former = sd1.unet.get_submodule(FIRST).processor
    if when == "before":
        memkern.patch(sd1, "none")
    sd1.unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    if when == "after":
        memkern.patch(sd1, "none")
    torch.testing.assert_close(image(sd1), expected, rtol=1e-4, atol=1e-4)
    assert told(sd1) is None
    assert sd1.unet.get_submodule(FIRST).processor is former


def test_two_patches_of_one_unet(sd1):
    """Processors that one puts in place are the other's too, and stay until both are gone."""
    other = type(sd1)(**sd1.components, requires_safety_checker=False)
    former = sd1.unet.get_submodule(FIRST).processor
    memkern.patch(sd1)
    memkern.patch(other)
    memkern.unpatch(sd1)
    image(other)
    assert told(other) == "1 of 2 rows, the others are equal"
    memkern.unpatch(other)
    assert sd1.unet.get_submodule(FIRST).processor is former


def test_a_controlnets_branches(tokenizers):
    family = sd_families(tokenizers)["StableDiffusionControlNetPipeline"]()
    before = family.pipe.controlnet.get_submodule(FIRST).processor
    memkern.patch(family.pipe)
    family()
    assert set(memkern.status(family.pipe).shared) == {FIRST, f"controlnet:{FIRST}"}
    memkern.unpatch(family.pipe)
    assert family.pipe.controlnet.get_submodule(FIRST).processor is before


def test_autocast_is_what_it_was(sd1):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memkern.patch(sd1, "none", accelerate="attention")
        expected = image(sd1)
        memkern.patch(sd1, "none")
        made = image(sd1)
    torch.testing.assert_close(made, expected, rtol=0.1, atol=0.1)
    assert told(sd1) == "1 of 2 rows, the others are equal"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_that_of_diffusers(tokenizers, dtype):
    """The error against float64, with the rest of the UNet in the same dtype."""
    pipe = tiny_pipeline(tokenizers["sd1"])
    sample = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)
    exact = call(pipe.unet.double(), sample.double())
    pipe.unet.to(dtype)
    rows = seen(pipe.unet)
    theirs = (call(pipe.unet, sample.to(dtype)) - exact).square().mean() ** 0.5
    memkern.patch(pipe, "none")
    ours = (call(pipe.unet, sample.to(dtype)) - exact).square().mean() ** 0.5
    assert rows == [2, 1]
    assert ours <= 1.1 * theirs

"""A patched UNet is the same function: on the second sight of a context, and whatever changes after it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from companions import GROUP_OFFLOAD_ON_CPU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

import memkern
from memkern.ops import backends, cpu
from memkern.pipelines.unet.layers import cross_attention_layers
from memkern.pipelines.unet.processor import CrossAttentionProcessor
from memkern.testing import SiteHolder, tiny_pipeline

pytestmark = pytest.mark.skipif(bool(backends.installed("cpp")), reason="needs the compiled CPU library")


@pytest.fixture
def unet(tokenizers):
    """A UNet whose layers are small enough that every path is open, with biases everywhere."""
    torch.manual_seed(0)
    unet = tiny_pipeline(tokenizers["sd1"]).unet
    for _, attn in cross_attention_layers(unet):
        attn.to_q.bias = torch.nn.Parameter(torch.randn(attn.to_q.out_features) / 4)
        attn.to_v.bias = torch.nn.Parameter(torch.randn(attn.to_v.out_features) / 4)
    return unet.requires_grad_(False)


@pytest.fixture
def context():
    """Contexts of a prompt whose pads are zero, and of a negative one."""
    torch.manual_seed(1)
    context = torch.randn(2, 77, 32)
    context[1, 20:] = 0
    return context


class Run:
    """A UNet with and without the processors, on the same inputs."""

    def __init__(self, unet):
        self.unet, self.plain = unet, copy.deepcopy(unet)
        self.holder = SiteHolder(unet)
        torch.manual_seed(2)
        self.sample = torch.randn(2, 4, 16, 16)

    def __call__(self, context, **options):
        return self.unet(self.sample, 7, context, **options).sample

    def expected(self, context, **options):
        """The same by the layers' own processors, with the weights there are now."""
        self.plain.load_state_dict(self.unet.state_dict())
        return self.plain(self.sample, 7, context, **options).sample

    @property
    def paths(self):
        return {choice.path for choice in self.holder.session.layers.values()}


@pytest.fixture
def run(unet):
    return Run(unet)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def force(monkeypatch, path):
    """Make one path the cheapest."""
    monkeypatch.setattr("memkern.pipelines.attention.choose.seconds", lambda name, *_: 0.0 if name == path else 1.0)


@torch.no_grad()
@pytest.mark.parametrize("path", ["absorbed", "projected", "former"])
def test_every_path_is_the_same_function(run, context, monkeypatch, path):
    force(monkeypatch, path)
    expected = run.expected(context)
    assert torch.equal(run(context), expected), "the first sight is the layer's own processor, bit for bit"
    assert not run.holder.session.layers
    same(run(context), expected)
    assert run.paths == {path}
    assert torch.equal(run(context), run(context))


@torch.no_grad()
@pytest.mark.parametrize("path", ["absorbed", "projected"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(run, context, dtype, path, monkeypatch):
    force(monkeypatch, path)
    exact = run.expected(context)
    run.unet.to(dtype)
    plain, half, run.sample = copy.deepcopy(run.unet), context.to(dtype), run.sample.to(dtype)
    theirs = (plain(run.sample, 7, half).sample.float() - exact).abs().max()
    run(half)
    ours = (run(half).float() - exact).abs().max()
    assert run.paths == {path}
    assert ours <= 1.5 * theirs


@torch.no_grad()
@pytest.mark.parametrize("path", ["absorbed", "projected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [320, 640, 1280])
@pytest.mark.parametrize("reordered", [True, False])
def test_error_of_a_layer_of_sd15(width, dtype, path, reordered, monkeypatch):
    """The error is at most 1.5 times that of the layer's own processor, against float64; weights reordered or not."""
    force(monkeypatch, path)
    if not reordered:
        monkeypatch.setattr(cpu, "_serves", lambda dtype: False)
    torch.manual_seed(0)
    exact = Attention(width, 768, heads=8, dim_head=width // 8, processor=AttnProcessor2_0()).double()
    x, context = torch.randn(2, 192, width).double(), torch.randn(2, 77, 768).double()
    context[1, 12:] = 0
    layer = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(layer.state_dict())
    x, context = x.to(dtype), context.to(dtype)
    expected = exact(x.double(), encoder_hidden_states=context.double())
    theirs = (layer(x, encoder_hidden_states=context) - expected).abs().max()
    net = torch.nn.ModuleDict({"attn2": layer})
    holder = SiteHolder(net)
    assert holder.site.is_placed
    layer(x, encoder_hidden_states=context)
    assert (layer(x, encoder_hidden_states=context) - expected).abs().max() <= 1.5 * theirs


@torch.no_grad()
@pytest.mark.parametrize("path", ["absorbed", "projected"])
@pytest.mark.parametrize("change", ["mul_", "data.mul_", "exchanged", "dtype and back", "loaded"])
@pytest.mark.parametrize("weight", ["to_q", "to_k", "to_v", "to_out.0"])
def test_changed_weights_are_noticed(run, context, monkeypatch, path, change, weight):
    force(monkeypatch, path)
    run(context), run(context)
    module = next(iter(cross_attention_layers(run.unet)))[1].get_submodule(weight)
    if change == "mul_":
        module.weight.mul_(3)
    elif change == "data.mul_":
        module.weight.data.mul_(3)
    elif change == "exchanged":
        module.weight = torch.nn.Parameter(module.weight * 3, requires_grad=False)
    elif change == "loaded":
        module.load_state_dict({name: value * 3 for name, value in module.state_dict().items()})
    else:
        run.unet.to(torch.float64).to(torch.float32)
    before = run.plain(run.sample, 7, context).sample
    after = run.expected(context)
    assert change == "dtype and back" or not torch.allclose(before, after, atol=1e-4)
    same(run(context), after)


@torch.no_grad()
def test_a_context_written_to_or_replaced_is_another_context(run, context):
    run(context), run(context)
    context.mul_(0.5)
    assert torch.equal(run(context), run.expected(context))
    same(run(context), run.expected(context))
    other = torch.randn_like(context)
    assert torch.equal(run(other), run.expected(other))
    same(run(other), run.expected(other))
    same(run(context), run.expected(context))
    assert len(run.holder.contexts) == 2


@torch.no_grad()
def test_memory_is_given_back_with_the_context(run, context, monkeypatch):
    force(monkeypatch, "absorbed")
    context = context.clone()
    run(context), run(context)
    kept = next(iter(run.holder.contexts._contexts.values()))
    parts = [weakref.ref(prepared.attend) for prepared in kept._prepared.values()]
    assert len(run.holder.contexts) == 1
    assert all(part() is not None for part in parts)
    del kept, context
    gc.collect()
    assert len(run.holder.contexts) == 0
    assert all(part() is None for part in parts)


def test_with_gradients_the_layers_own_processors_run(run, context):
    context.requires_grad_()
    for _ in range(3):
        out = run(context)
    (ours,) = torch.autograd.grad(out.square().sum(), context)
    (theirs,) = torch.autograd.grad(run.expected(context).square().sum(), context)
    assert torch.equal(ours, theirs)
    assert not run.holder.session.layers


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_inference_mode(run, context, made):
    """A context made in it counts no changes and is compared, so that a write to it is noticed."""
    with torch.inference_mode():
        context = context.clone() if made == "inside" else context
        for _ in range(3):
            out = run(context)
        assert run.paths & {"projected", "absorbed"}
        same(out, run.expected(context))
        context[0, 3] = 5
        for _ in range(3):
            same(run(context), run.expected(context))


def test_weights_made_in_inference_mode(unet, context):
    with torch.inference_mode():
        run = Run(copy.deepcopy(unet))
        assert next(run.unet.parameters()).is_inference()
        for _ in range(3):
            same(run(context), run.expected(context))
        assert run.paths & {"projected", "absorbed"}
        run.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(2)
        for _ in range(2):
            same(run(context), run.expected(context))


@torch.no_grad()
def test_a_mask_or_other_layers_hooks_leave_the_layer_alone(run, context):
    mask = torch.ones(2, 77)
    mask[1, 30:] = 0
    for _ in range(3):
        out = run(context, encoder_attention_mask=mask)
    assert torch.equal(out, run.expected(context, encoder_attention_mask=mask))
    _, attn = next(iter(cross_attention_layers(run.unet)))
    handle = attn.to_k.register_forward_hook(lambda module, args, output: output * 2)
    run(context), run(context)
    changed = run(context)
    handle.remove()
    assert not torch.allclose(changed, run.expected(context), atol=1e-4)
    same(run(context), run.expected(context))


@torch.no_grad()
def test_lora_between_calls_and_during_one(run, context):
    peft = pytest.importorskip("peft")
    run(context), run(context)
    config = peft.LoraConfig(r=2, target_modules=["attn2.to_q", "attn2.to_k"], init_lora_weights=False)
    run.unet.add_adapter(config)
    with_lora = copy.deepcopy(run.unet)
    same(run(context), with_lora(run.sample, 7, context).sample)
    run.unet.fuse_lora()
    same(run(context), with_lora(run.sample, 7, context).sample)
    run.unet.unfuse_lora()
    run.unet.unload_lora()
    same(run(context), run.expected(context))


@torch.no_grad()
def test_processors_are_put_back_and_copies_are_plain(unet):
    formers = {name: attn.processor for name, attn in cross_attention_layers(unet)}
    holder = SiteHolder(unet)
    assert holder.site.processors.count == len(formers) > 0
    assert all(isinstance(attn.processor, CrossAttentionProcessor) for _, attn in cross_attention_layers(unet))
    for copied in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert {type(attn.processor).__name__ for _, attn in cross_attention_layers(copied)} == {"AttnProcessor2_0"}
    holder.site.release(holder)
    assert {name: attn.processor for name, attn in cross_attention_layers(unet)} == formers
    type(CrossAttentionProcessor())()


@pytest.mark.parametrize("policy", ["swap-pad-zero-eot", "zero-pad:0.7", "pad-from-eot", "none"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_the_image_is_that_of_the_unaccelerated_pipeline(tokenizers, policy, guidance):
    images = []
    for accelerate in (False, True, True):
        pipe = tiny_pipeline(tokenizers["sd1"])
        patch = memkern.patch(pipe, policy, accelerate=accelerate)
        images.append(
            pipe(
                ["a cat", "a photograph of a red house"],
                num_inference_steps=20,
                guidance_scale=guidance,
                output_type="np",
                generator=torch.Generator().manual_seed(0),
            ).images
        )
        assert bool(memkern.status(pipe).layers) == accelerate
        assert not patch.last.kept
    assert abs(images[1] - images[0]).max() <= 1e-3
    assert (images[1] == images[2]).all()


def test_one_step_never_pays(tokenizers):
    pipe = tiny_pipeline(tokenizers["sd1"])
    patch = memkern.patch(pipe)
    pipe("a cat", num_inference_steps=1, output_type="latent")
    assert not patch.status().layers


def test_status_shows_the_choice_and_its_inputs(sd1):
    memkern.patch(sd1, "zero-pad:0.7")
    sd1("a cat", num_inference_steps=3, output_type="latent")
    shown = str(memkern.status(sd1))
    count = len(cross_attention_layers(sd1.unet))
    assert f"UNet2DConditionModel: {count} cross-attention layers, computed by memkern where faster" in shown
    assert "attn2: " in shown
    assert "keys 77/" in shown
    assert "estimates in ms: former" in shown


@torch.no_grad()
@pytest.mark.parametrize("form", ["model", "sequential", *(["group"] if GROUP_OFFLOAD_ON_CPU else [])])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_offload_in_three_forms(unet, context, monkeypatch, form, before):
    """Weights that a hook moves in and out are not read: their modules are called."""
    from accelerate import cpu_offload, cpu_offload_with_hook
    from diffusers.hooks import apply_group_offloading

    force(monkeypatch, "absorbed")
    cpu = torch.device("cpu")
    offload = {
        "model": lambda model: cpu_offload_with_hook(model, cpu),
        "sequential": lambda model: cpu_offload(model, cpu),
        "group": lambda model: apply_group_offloading(model, cpu, cpu, offload_type="leaf_level"),
    }[form]
    torch.manual_seed(2)
    sample = torch.randn(2, 4, 16, 16)
    expected = copy.deepcopy(unet)(sample, 7, context).sample
    if before:
        offload(unet)
    holder = SiteHolder(unet)
    if not before:
        unet(sample, 7, context), unet(sample, 7, context)
        offload(unet)
    for _ in range(3):
        same(unet(sample, 7, context).sample, expected)
    reasons = {reason for choice in holder.session.layers.values() for reason in choice.reasons}
    assert bool(reasons) == (form != "model")


def test_an_update_forgets_what_was_done_before(sd1):
    patch = memkern.patch(sd1, "zero-pad:0.7")
    sd1("a cat", num_inference_steps=3, output_type="latent")
    assert memkern.status(sd1).layers
    patch.update("swap-pad")
    assert not memkern.status(sd1).layers
    patch.update(accelerate=False)
    sd1("a cat", num_inference_steps=3, output_type="latent")
    assert not memkern.status(sd1).layers
    assert not any(isinstance(attn.processor, CrossAttentionProcessor) for _, attn in cross_attention_layers(sd1.unet))
    patch.update(accelerate=True)
    sd1("a cat", num_inference_steps=3, output_type="latent")
    assert memkern.status(sd1).layers


class Doubling(torch.nn.Linear):
    """A user's own layer, which computes with more than tensors."""

    def __init__(self, linear, holder):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.holder = linear.weight, holder

    def forward(self, rows):
        return super().forward(rows) * self.holder["factor"]


@torch.no_grad()
def test_what_a_layer_computes_with_besides_its_weights(run, context):
    """The layer's scale, and whatever an unknown class reads."""
    for _ in range(3):
        run(context)
    for unet in (run.unet, run.plain):
        for _, attn in cross_attention_layers(unet):
            attn.scale *= 3
    same(run(context), run.expected(context))
    holder = {"factor": 1.0}
    for unet in (run.unet, run.plain):
        for _, attn in cross_attention_layers(unet):
            attn.to_k = Doubling(attn.to_k, holder)
    for _ in range(3):
        same(run(context), run.expected(context))
    holder["factor"] = 3.0
    same(run(context), run.expected(context))


@pytest.mark.parametrize("edit", ["one value", "half a row"])
def test_g23_a_sparse_edit_of_weights_between_prompts(tokenizers, edit):
    """A write through `.data` counts no version: a new prompt is computed with the change, whatever it is."""
    pipe, plain = (tiny_pipeline(tokenizers["sd1"]) for _ in range(2))
    memkern.patch(pipe, "none")
    options = {"num_inference_steps": 3, "output_type": "latent"}

    def image(one):
        return one("a cat", generator=torch.Generator().manual_seed(0), **options).images

    before = image(pipe)
    for one in (pipe, plain):
        for _, attn in cross_attention_layers(one.unet):
            values = attn.to_k.weight.data.view(-1)[1 : 2 if edit == "one value" else 9]
            values += 100
    made = image(pipe)
    torch.testing.assert_close(made, image(plain), rtol=1e-4, atol=1e-4)
    assert not torch.equal(made, before)

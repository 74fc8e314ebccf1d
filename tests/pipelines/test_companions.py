"""Changes that people make to pipelines, by the ids of the cases where others broke."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from companions import COMPANIONS, ip_adapter, lora, slicing, textual_inversion
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from families import Family, sd_families

import memkern
from memkern import Edit, Policy
from memkern.pipelines.unet.layers import cross_attention_layers
from memkern.pipelines.unet.processor import CrossAttentionProcessor
from memkern.policy import exclude
from memkern.testing import tiny_pipeline


@pytest.fixture
def plain(tokenizers):
    """A pipeline that is never patched."""
    return Family("plain", tiny_pipeline(tokenizers["sd1"]))


@pytest.fixture
def ours(tokenizers):
    return Family("ours", tiny_pipeline(tokenizers["sd1"]))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def differs(one, other):
    return (one - other).abs().max() > 1e-4


def processors(pipe):
    return {name: type(processor) for name, processor in pipe.unet.attn_processors.items()}


# The policies whose result a plain pipeline with an edited context has as well.
def edited_by_hand(family, policy, **options):
    """The image of an unpatched pipeline that is given what the patched one encodes."""
    with memkern.patched(family.pipe, policy, accelerate=False):
        cond, uncond = family.pipe.encode_prompt("a cat", "cpu", 1, True)
    return family(None, prompt_embeds=cond, negative_prompt_embeds=uncond, **options)


@pytest.mark.filterwarnings("ignore:.*processors of the UNet were replaced:UserWarning")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", COMPANIONS)
def test_companions_in_both_orders(ours, plain, name, order):
    """With edits off the image is the unpatched one with that companion; with edits on, that of an edited context."""
    options = COMPANIONS[name](plain.pipe)
    expected = plain(steps=3, **options)
    by_hand = edited_by_hand(plain, "zero-pad:0.7", steps=3, **options)
    assert differs(expected, by_hand)
    if order == "before":
        COMPANIONS[name](ours.pipe)
        memkern.patch(ours.pipe, "none")
    else:
        memkern.patch(ours.pipe, "none")
        COMPANIONS[name](ours.pipe)
    close(ours(steps=3, **options), expected)
    memkern.status(ours.pipe)
    memkern.patch(ours.pipe, "zero-pad:0.7")
    close(ours(steps=3, **options), by_hand)
    memkern.unpatch(ours.pipe)
    assert not any(
        isinstance(processor, CrossAttentionProcessor) for processor in ours.pipe.unet.attn_processors.values()
    )
    close(ours(steps=3, **options), expected)


@pytest.mark.filterwarnings("ignore:.*processors of the UNet were replaced:UserWarning")
def test_a1_image_tokens_of_an_ip_adapter_are_left_alone(ours):
    options = ip_adapter(ours.pipe)
    seen = []
    ours.pipe.unet.encoder_hid_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    ours(**options)
    memkern.patch(ours.pipe, "zero-eot-pad")
    ours(**options)
    half = len(seen) // 2
    for before, after in zip(seen[:half], seen[half:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a2_slicing_replaces_processors_and_is_told_once(ours):
    memkern.patch(ours.pipe)
    edited = ours()
    slicing(ours.pipe)
    assert "note        processors of the UNet were replaced since" in str(memkern.status(ours.pipe))
    with pytest.warns(UserWarning, match="processors of the UNet were replaced since it was patched"):
        close(ours(), edited)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(ours(), edited)
    memkern.unpatch(ours.pipe)
    assert {type(processor).__name__ for processor in ours.pipe.unet.attn_processors.values()} == {
        "SlicedAttnProcessor"
    }


def test_a2_at_the_kv_stage_it_is_refused_until_patched_again(ours):
    memkern.patch(ours.pipe, "ren:1.25")
    edited = ours()
    slicing(ours.pipe)
    with pytest.raises(memkern.UnmitigatedError, match=r"attn2 and 3 more: its processor was replaced by SlicedAttn"):
        ours()
    memkern.patch(ours.pipe, "ren:1.25")
    close(ours(), edited)


@pytest.mark.filterwarnings("ignore:.*processors of the UNet were replaced:UserWarning")
@pytest.mark.parametrize("order", ["before", "after"])
def test_an_ip_adapter_is_scaled(ours, plain, order):
    options = ip_adapter(plain.pipe)
    if order == "before":
        ip_adapter(ours.pipe)
    memkern.patch(ours.pipe, "none")
    if order == "after":
        ip_adapter(ours.pipe)
    made = []
    for scale in (1.0, 0.3, 0.0):
        for family in (ours, plain):
            family.pipe.set_ip_adapter_scale(scale)
        made.append(ours(steps=3, **options))
        close(made[-1], plain(steps=3, **options))
    assert differs(made[0], made[1])


@pytest.mark.filterwarnings("ignore:.*processors of the UNet were replaced:UserWarning")
@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_a3_an_ip_adapter_loaded_and_unloaded(ours, first):
    before, start = processors(ours.pipe), ours()
    if first == "patch":
        memkern.patch(ours.pipe)
    options = ip_adapter(ours.pipe)
    if first == "adapter":
        memkern.patch(ours.pipe)
    ours(**options)
    ours.pipe.unload_ip_adapter()
    ours()
    memkern.unpatch(ours.pipe)
    assert processors(ours.pipe) == before
    assert torch.equal(ours(), start)


def test_a4_pipelines_that_share_a_unet(ours):
    """A pipeline that is not patched raises; once patched, each has its own policy at its own stage."""
    memkern.patch(ours.pipe, "ren:1.25")
    edited = ours()
    other = StableDiffusionImg2ImgPipeline.from_pipe(ours.pipe)
    with pytest.raises(memkern.UnmitigatedError, match="by another pipeline that shares it"):
        other("a cat", image=torch.rand(1, 3, 16, 16), num_inference_steps=2)
    for policy in ("ren:1.25", "zero-eot"):
        memkern.patch(other, policy)
        other("a cat", image=torch.rand(1, 3, 16, 16), num_inference_steps=2)
        assert torch.equal(ours(), edited)
    memkern.unpatch(other)
    assert torch.equal(ours(), edited)
    memkern.unpatch(ours.pipe)
    memkern.patch(other, "ren:1.25")


def test_a5_default_processors_can_be_set_after_unpatch(ours):
    memkern.patch(ours.pipe)
    memkern.unpatch(ours.pipe)
    ours.pipe.unet.set_default_attn_processor()


class ModuleProcessor(torch.nn.Module):
    """A foreign processor that is a module and takes an argument of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = AttnProcessor2_0(), []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, note=None):
        self.seen.append(note)
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def test_a6_a17_processors_that_are_modules_stay_and_get_their_arguments(ours):
    layer = cross_attention_layers(ours.pipe.unet)[0][1]
    foreign = ModuleProcessor()
    layer.set_processor(foreign)
    memkern.patch(ours.pipe)
    ours(cross_attention_kwargs={"note": 7})
    assert layer.processor is foreign
    assert set(foreign.seen) == {7}
    memkern.unpatch(ours.pipe)
    assert layer.processor is foreign


@pytest.mark.parametrize("order", ["before", "after"])
def test_a7_lora_scaled_and_unloaded(ours, plain, order):
    if order == "before":
        lora(ours.pipe)
    memkern.patch(ours.pipe, "none")
    if order == "after":
        lora(ours.pipe)
    lora(plain.pipe)
    for weight in (1.0, 0.0, 0.5):
        for family in (ours, plain):
            family.pipe.unet.set_adapters(["style"], [weight])
        close(ours(steps=3), plain(steps=3))
    for family in (ours, plain):
        family.pipe.unet.fuse_lora()
    close(ours(steps=3), plain(steps=3))
    for family in (ours, plain):
        family.pipe.unet.unfuse_lora()
        family.pipe.unet.unload_lora()
    close(ours(steps=3), plain(steps=3))


@pytest.mark.parametrize("stage", ["embeds", "kv"])
def test_a8_lora_on_to_k_is_not_bypassed(ours, stage):
    memkern.patch(ours.pipe, "zero-pad:0.7", stage=stage)
    before = ours(steps=3)
    lora(ours.pipe, targets=["to_k"])
    assert differs(ours(steps=3), before)


def test_a9_attn_processors_with_lora_on_half_the_layers(ours):
    half = [name for index, (name, _) in enumerate(cross_attention_layers(ours.pipe.unet)) if index % 2]
    lora(ours.pipe, targets=[f"{name}.to_k" for name in half])
    memkern.patch(ours.pipe)
    assert list(ours.pipe.unet.attn_processors)
    ours()


def test_a11_an_exception_in_a_pag_pipeline(tokenizers):
    family = sd_families(tokenizers)["StableDiffusionPAGPipeline"]()

    def fail(pipe, step, timestep, tensors):
        raise KeyError(step)

    before = family()
    cross = {name: attn.processor for name, attn in cross_attention_layers(family.pipe.unet)}
    with pytest.raises(KeyError), memkern.patched(family.pipe, "ren:1.25"):
        family(callback_on_step_end=fail)
    assert {name: attn.processor for name, attn in cross_attention_layers(family.pipe.unet)} == cross
    assert torch.equal(family(), before)


@pytest.mark.parametrize(
    ("name", "count"),
    [("StableDiffusionPipeline", 4), ("AnimateDiffPipeline", 4), ("StableDiffusionInstructPix2PixPipeline", 4)],
)
def test_a14_every_cross_attention_layer_is_found(tokenizers, name, count):
    unet = sd_families(tokenizers)[name]().pipe.unet
    wanted = [key for key in unet.attn_processors if ".attn2" in key and "motion" not in key]
    assert [f"{layer}.processor" for layer, _ in cross_attention_layers(unet)] == wanted
    assert len(wanted) == count


def test_a15_without_a_context_nothing_happens():
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    x = torch.randn(1, 9, 16)
    expected = layer(x)
    layer.set_processor(CrossAttentionProcessor())
    assert torch.equal(layer(x), expected)


def test_a18_fifty_prompts_later(ours, plain):
    memkern.patch(ours.pipe, "zero-pad:0.7")
    memkern.patch(plain.pipe, "zero-pad:0.7")
    for index in range(50):
        ours(f"a cat number {index}", steps=2)
    assert torch.equal(ours("a dog", steps=3), plain("a dog", steps=3))


@torch.no_grad()
def test_b1_b2_excluding_is_an_encoder_attention_mask(ours, plain):
    """Rows with masks of their own, and the same as leaving the tokens out of the context."""
    prompts = ["a cat", "a photograph of an astronaut riding a horse"]
    memkern.patch(ours.pipe, Policy([Edit("pad", exclude(), branch="both")]))
    cond, uncond = ours.pipe.encode_prompt(prompts, "cpu", 1, True)
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = torch.cat([uncond, cond])
    edited = ours.pipe.unet(noise, 5, context).sample
    ids = plain.pipe.tokenizer(["", "", *prompts], padding="max_length", max_length=77, return_tensors="pt")
    kept = ids.attention_mask
    masked = plain.pipe.unet(noise, 5, context, encoder_attention_mask=kept).sample
    torch.testing.assert_close(edited, masked, rtol=1e-4, atol=1e-4)
    for row in range(4):
        dropped = plain.pipe.unet(noise[row : row + 1], 5, context[row : row + 1, : int(kept[row].sum())]).sample
        torch.testing.assert_close(edited[row : row + 1], dropped, rtol=1e-4, atol=1e-4)


def test_c9_a_textual_inversion_of_several_vectors(ours):
    textual_inversion(ours.pipe, 4)
    memkern.patch(ours.pipe)
    ours("<thing> beside <thing>")
    cond = memkern.status(ours.pipe).prompts[0]
    assert cond.roles[memkern.Role.PROMPT] == 9
    assert cond.edited == {"EOT zeroed": 1}


def test_c13_each_image_of_each_prompt(ours):
    """Rows p, p, q, q: with the same noise both images of a prompt are alike, and those of another are not."""
    memkern.patch(ours.pipe, "ren:1.25")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    both = ours.pipe(
        ["a cat", "a long prompt about a dog on a mat"], latents=noise.repeat(4, 1, 1, 1), num_inference_steps=2,
        num_images_per_prompt=2, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(both[0], both[1])
    torch.testing.assert_close(both[2], both[3])
    alone = ours.pipe("a cat", latents=noise, num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(both[0], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["before", "after"])
def test_d1_d2_d3_one_graph_for_all_steps_and_prompts(ours, plain, order):
    """Compiled whole, before or after patching; a policy that changes later needs no other graph."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    if order == "before":
        ours.pipe.unet = torch.compile(ours.pipe.unet, backend=backend, fullgraph=True)
        memkern.patch(ours.pipe)
    else:
        memkern.patch(ours.pipe)
        ours.pipe.unet = torch.compile(ours.pipe.unet, backend=backend, fullgraph=True)
    memkern.patch(plain.pipe, accelerate=False)
    for prompt in ("a cat", "a photograph of a dog"):
        close(ours(prompt, steps=4), plain(prompt, steps=4))
    for family in (ours, plain):
        memkern.patch(family.pipe, "zero-pad:0.7", accelerate=family is ours)
    close(ours(steps=4), plain(steps=4))
    assert len(graphs) == 1


def test_d9_the_attention_function_of_torch_is_the_same(ours):
    function = torch.nn.functional.scaled_dot_product_attention
    memkern.patch(ours.pipe, "ren:1.25")
    ours()
    assert torch.nn.functional.scaled_dot_product_attention is function


@pytest.mark.skipif(not hasattr(UNet2DConditionModel, "set_attention_backend"), reason="diffusers is older than that")
def test_an_attention_backend_chosen_after_patching(ours, plain):
    expected = edited_by_hand(plain, "zero-pad:0.7", steps=3)
    memkern.patch(ours.pipe, "zero-pad:0.7")
    ours.pipe.unet.set_attention_backend("native")
    close(ours(steps=3), expected)


def test_copies_and_saved_models_have_nothing_of_memkern(ours, plain, tmp_path):
    expected = plain()
    memkern.patch(ours.pipe, "ren:1.25")
    copied = copy.deepcopy(ours.pipe.unet)
    assert not copied._forward_pre_hooks or all("memkern" not in str(h) for h in copied._forward_pre_hooks.values())
    ours.pipe.save_pretrained(tmp_path)
    assert not any("memkern" in path.read_text(errors="ignore") for path in tmp_path.rglob("*.json"))
    loaded = type(ours.pipe).from_pretrained(tmp_path, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(Family("loaded", loaded)(), expected)
    plain.pipe.unet = copied
    assert torch.equal(plain(), expected)


def test_threads_with_a_pipeline_each(tokenizers):
    policies = ["swap-pad-zero-eot", "zero-pad:0.7", "ren:1.25", "none"]
    families = [Family(policy, tiny_pipeline(tokenizers["sd1"])) for policy in policies]
    for family in families:
        memkern.patch(family.pipe, family.name)
    expected = [family(steps=3) for family in families]
    found = [None] * len(families)

    def work(index):
        for _ in range(3):
            found[index] = families[index](steps=3)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(families))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for made, wanted in zip(found, expected, strict=True):
        assert torch.equal(made, wanted)

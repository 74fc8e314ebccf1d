"""The kv stage: every preset there gives the image of the embeds stage; what only it can do equals code by hand."""

from __future__ import annotations

import math

import pytest
import torch
from by_hand import PRESETS
from diffusers.models.attention_processor import AttnProcessor2_0
from kv_by_hand import guard, install, ren, roles_of, zero_pads

import memkern
from memkern import Edit, Policy
from memkern.pipelines.unet.layers import cross_attention_layers
from memkern.policy import attenuate, exclude, logit_bias, logit_scale, replace, strength, zero
from memkern.testing import tiny_pipeline

PROMPTS = ["a cat", "a photograph of an astronaut riding a horse on the moon"]


def images(pipe, prompts=PROMPTS, steps=3, **options):
    """Latents after a few steps, from the same noise."""
    generator = torch.Generator().manual_seed(0)
    options = {"guidance_scale": 7.5, "output_type": "latent", **options}
    return pipe(prompts, num_inference_steps=steps, generator=generator, **options).images


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def different(actual, expected):
    assert (actual - expected).abs().max() > 1e-3


@pytest.fixture
def plain(tokenizers):
    """The same pipeline, never patched."""
    return tiny_pipeline(tokenizers["sd1"])


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("policy", PRESETS)
def test_both_stages_give_the_same_image(sd1, policy, accelerate):
    found = []
    for stage in ("embeds", "kv"):
        patch = memkern.patch(sd1, policy, stage=stage, accelerate=accelerate)
        assert patch.stage == stage
        found.append(images(sd1, num_images_per_prompt=2))
    same(*found)
    memkern.patch(sd1, policy, stage="kv", accelerate=accelerate)
    assert torch.equal(images(sd1, num_images_per_prompt=2), found[1])


@pytest.mark.parametrize("accelerate", [True, False])
def test_without_guidance(sd1, accelerate):
    found = []
    for stage in ("embeds", "kv"):
        memkern.patch(sd1, "zero-pad:0.7", stage=stage, accelerate=accelerate)
        found.append(images(sd1, guidance_scale=1.0))
    same(*found)


@pytest.mark.parametrize("prompts", [["a cat"], PROMPTS], ids=["one", "ragged"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("factor", [0.0, 1.0, 1.25])
def test_ren(sd1, plain, prompts, number, factor):
    expected = images(
        install(plain, ren(roles_of(plain, prompts), number, factor)), prompts, num_images_per_prompt=number
    )
    memkern.patch(sd1, f"ren:{factor}")
    same(images(sd1, prompts, num_images_per_prompt=number), expected)


@pytest.mark.parametrize("prompts", [["a cat"], PROMPTS], ids=["one", "ragged"])
@pytest.mark.parametrize(("factor", "threshold"), [(0.2, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_guard(sd1, plain, prompts, factor, threshold):
    unedited = images(plain, prompts)
    expected = images(install(plain, guard(roles_of(plain, prompts), factor, threshold)), prompts)
    memkern.patch(sd1, f"guard:{factor},{threshold}")
    same(images(sd1, prompts), expected)
    if factor != 1:
        different(expected, unedited)


def test_attenuation_of_every_role(sd1, plain):
    """SOT's key, which also fills up the number of keys to a multiple, counts once among them."""
    expected = images(install(plain, guard(roles_of(plain, PROMPTS), 0.2, 0.5, first=0)))
    edits = [Edit(role, attenuate(0.2, 0.5), layers=("down", "mid")) for role in ("sot", "prompt", "eot", "pad")]
    memkern.patch(sd1, Policy(edits))
    same(images(sd1), expected)


LAYERS = {
    "down": lambda layer, step: layer.startswith("down_blocks"),
    "mid": lambda layer, step: layer.startswith("mid_block"),
    "up": lambda layer, step: layer.startswith("up_blocks"),
    "8x8": lambda layer, step: not layer.startswith("mid_block"),
    "4": lambda layer, step: layer.startswith("mid_block"),
    "mid_block.attentions.0.transformer_blocks.0.attn2": lambda layer, step: layer.startswith("mid_block"),
    "down_blocks.0.attentions.0.transformer_blocks.0": lambda layer, step: layer.startswith("down_blocks.0"),
}


@pytest.mark.parametrize("layers", LAYERS)
def test_windows_of_layers(sd1, plain, layers):
    unedited = images(plain)
    expected = images(install(plain, zero_pads(roles_of(plain, PROMPTS), LAYERS[layers])))
    memkern.patch(sd1, Policy((Edit("pad", zero(), layers=(layers,)),)))
    same(images(sd1), expected)
    different(expected, unedited)


@pytest.mark.parametrize(("steps", "edited"), [((0, 0.5), {0, 1}), ((0.5, 1), {2, 3}), ((0.25, 0.75), {1, 2})])
def test_windows_of_steps(sd1, plain, steps, edited):
    expected = images(install(plain, zero_pads(roles_of(plain, PROMPTS), lambda layer, step: step in edited)), steps=4)
    memkern.patch(sd1, Policy((Edit("pad", zero(), steps=steps),)))
    same(images(sd1, steps=4), expected)


def test_windows_of_both(sd1, plain):
    where = lambda layer, step: step == 0 and layer.startswith("down")  # noqa: E731
    expected = images(install(plain, zero_pads(roles_of(plain, PROMPTS), where)), steps=4)
    memkern.patch(sd1, Policy((Edit("pad", zero(), steps=(0, 0.25), layers="down"),)))
    same(images(sd1, steps=4), expected)


def test_zeroing_is_not_excluding(sd1):
    """A zeroed key keeps its place in the softmax; an excluded one has none: -inf is what a bias makes of it."""
    found = {}
    for name, action in (("zero", zero()), ("exclude", exclude()), ("bias", logit_bias(-1e4))):
        memkern.patch(sd1, Policy((Edit("pad", action),)), stage="kv")
        found[name] = images(sd1)
    different(found["zero"], found["exclude"])
    same(found["bias"], found["exclude"])


def test_many_equal_keys_are_one_with_the_log_of_their_number(sd1):
    """Replacing the pads of "a cat" by EOT is leaving EOT alone, with the log of how many there are on its logit."""
    equal = 77 - roles_of(sd1, ["a cat"])[0]
    policy = Policy((Edit("pad", exclude()), Edit("eot", logit_bias(math.log(equal)))))
    with memkern.patched(sd1, policy):
        expected = images(sd1, ["a cat"])
    with memkern.patched(sd1, "pad-from-eot", stage="kv"):
        same(images(sd1, ["a cat"]), expected)


@pytest.mark.parametrize("action", [strength(0), logit_scale(1), logit_bias(0)], ids=str)
def test_nothing_of_an_edit_is_the_same_image_bit_for_bit(sd1, plain, action):
    memkern.patch(sd1, Policy((Edit("pad", action),)), stage="kv", accelerate=False)
    assert torch.equal(images(sd1), images(plain))


def test_all_of_a_strength_is_zeroing(sd1):
    found = []
    for action in (strength(1), zero()):
        memkern.patch(sd1, Policy((Edit("pad", action),)), stage="kv")
        found.append(images(sd1))
    assert torch.equal(*found)


@pytest.mark.parametrize("stage", ["embeds", "kv"])
def test_the_bank_of_reembedded_pads(sd1, stage):
    """Pads that take the row of their re-embedding, on both branches, are swapped pads."""
    memkern.patch(sd1, "swap-pad")
    expected = images(sd1, num_images_per_prompt=2)
    both = Policy((Edit("pad", replace("pad-reembedded"), branch="both"),))
    memkern.patch(sd1, both, stage=stage)
    same(images(sd1, num_images_per_prompt=2), expected)


@pytest.mark.parametrize("order", ["first", "last", "even", "random"])
def test_fractions_leave_the_global_generator_alone(sd1, order):
    memkern.patch(sd1, Policy((Edit("pad", exclude(), fraction=0.5, order=order, seed=3),)))
    state = torch.random.get_rng_state()
    first = images(sd1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(images(sd1), first)


class Direct:
    """Calls of a patched pipeline's UNet with rows in any order, and the rows' parts of what comes out."""

    def __init__(self, pipe, **options):
        self.cond, self.uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["", "bad"], **options)
        self.pipe = pipe
        self.noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        pipe.scheduler.set_timesteps(4)

    def __call__(self, *rows):
        context = torch.stack(rows)
        return self.pipe.unet(
            self.noise.expand(len(rows), -1, -1, -1), self.pipe.scheduler.timesteps[0], context
        ).sample


@torch.no_grad()
@pytest.mark.parametrize("policy", ["ren:1.25", Policy((Edit("pad", exclude()),))], ids=str)
def test_rows_are_recognised_in_any_order(sd1, policy):
    memkern.patch(sd1, policy)
    call = Direct(sd1)
    u0, u1, c0, c1 = *call.uncond, *call.cond
    usual = dict(zip(("u0", "u1", "c0", "c1"), call(u0, u1, c0, c1), strict=True))
    for order in ("c0 c1 u0 u1", "u0 c0", "c0", "u0 c0 c0", "c0 u0 u0", "u1 c1 c0 u0"):
        rows = {"u0": u0, "u1": u1, "c0": c0, "c1": c1}
        made = call(*(rows[name] for name in order.split()))
        for name, row in zip(order.split(), made, strict=True):
            same(row, usual[name])


@torch.no_grad()
def test_a_negative_prompt_that_is_the_prompt(sd1):
    """Equal rows: one of them is uncond, as often as cond."""
    memkern.patch(sd1, Policy((Edit("pad", exclude()),)))
    sd1.encode_prompt(["a cat"], "cpu", 1, True, negative_prompt=["a cat"])
    call = Direct.__new__(Direct)
    call.pipe, call.noise = sd1, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sd1.scheduler.set_timesteps(4)
    cond, uncond = sd1.encode_prompt(["a cat"], "cpu", 1, True, negative_prompt=["a cat"])
    first, second = call(uncond[0], cond[0])
    different(first, second)


@torch.no_grad()
@pytest.mark.parametrize(("on_unknown", "raised"), [("raise", True), ("warn", False), ("pass", False)])
def test_rows_that_were_not_encoded(sd1, plain, on_unknown, raised):
    memkern.patch(sd1, "ren:1.25", on_unknown=on_unknown)
    call = Direct(sd1)
    strange = torch.randn(77, 32, generator=torch.Generator().manual_seed(1))
    if raised:
        with pytest.raises(memkern.UnmitigatedError, match="1 of 2 rows that the UNet reads"):
            call(call.uncond[0], strange)
        return
    if on_unknown == "warn":
        with pytest.warns(memkern.UnmitigatedWarning, match="1 of 2 rows"):
            made = call(call.uncond[0], strange)
    else:
        made = call(call.uncond[0], strange)
    call.pipe = plain
    plain.scheduler.set_timesteps(4)
    same(made[1], call(call.uncond[0], strange)[1])


@pytest.mark.parametrize("policy", ["ren:1.25", "guard:0.2,0.5", "zero-pad:0.7", "swap-pad-zero-eot"])
def test_embeddings_that_were_encoded_before(sd1, policy):
    memkern.patch(sd1, policy, stage="kv")
    expected = images(sd1, num_images_per_prompt=2)
    cond, uncond = sd1.encode_prompt(PROMPTS, "cpu", 1, True)
    given = images(sd1, None, prompt_embeds=cond, negative_prompt_embeds=uncond, num_images_per_prompt=2)
    assert torch.equal(given, expected)
    again = images(sd1, None, prompt_embeds=cond.clone(), negative_prompt_embeds=uncond, num_images_per_prompt=2)
    assert torch.equal(again, expected)
    with pytest.raises(memkern.UnmitigatedError, match="prompt_embeds carries no token ids"):
        images(sd1, None, prompt_embeds=cond + 1, negative_prompt_embeds=uncond)


def test_embeddings_of_the_other_stage_are_not_taken(sd1):
    memkern.patch(sd1, "zero-pad:0.7", stage="kv")
    cond, uncond = sd1.encode_prompt(PROMPTS, "cpu", 1, True)
    memkern.patch(sd1, "zero-pad:0.7", stage="embeds")
    with pytest.raises(memkern.UnmitigatedError, match="for the kv stage"):
        images(sd1, None, prompt_embeds=cond, negative_prompt_embeds=uncond)


@pytest.mark.parametrize("mode", ["inference_mode", "autocast", "grad"])
def test_where_nothing_may_be_kept(sd1, plain, mode):
    """Edited all the same; in inference mode a change of the context is not counted."""
    expected = images(install(plain, ren(roles_of(plain, PROMPTS), 1, 1.25)))
    memkern.patch(sd1, "ren:1.25")
    if mode == "inference_mode":
        with torch.inference_mode():
            same(images(sd1), expected)
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            edited = images(sd1).float()
        assert (edited - expected).abs().max() < 0.2 * expected.abs().max()
    else:
        call = Direct(sd1)
        leaf = call.cond.detach().requires_grad_()
        call(call.uncond[0].detach(), leaf[0]).sum().backward()
        assert leaf.grad[0, 0].abs().sum() > 0
        assert leaf.grad[0, roles_of(sd1, PROMPTS)[0] + 1 :].abs().sum() == 0


def test_a_bias_of_to_k_and_to_v_stays_with_a_zeroed_key(sd1):
    """The edit of the embedding is the definition: there a zeroed row has K = b_k and V = b_v."""
    torch.manual_seed(0)
    for _, attn in cross_attention_layers(sd1.unet):
        attn.to_k.bias = torch.nn.Parameter(torch.randn(attn.to_k.out_features))
        attn.to_v.bias = torch.nn.Parameter(torch.randn(attn.to_v.out_features))
    found = []
    for stage in ("embeds", "kv"):
        memkern.patch(sd1, "zero-eot-pad", stage=stage)
        found.append(images(sd1))
    same(*found)


def test_a_processor_put_in_since_is_reported(sd1):
    memkern.patch(sd1, "ren:1.25")
    layer = cross_attention_layers(sd1.unet)[0][1]
    layer.set_processor(AttnProcessor2_0())
    with pytest.raises(memkern.UnmitigatedError, match="its processor was replaced by AttnProcessor2_0"):
        images(sd1)
    memkern.patch(sd1, "ren:1.25")
    images(sd1)


def test_everything_is_put_back(sd1, plain):
    before = images(sd1)
    processors = [attn.processor for _, attn in cross_attention_layers(sd1.unet)]
    memkern.patch(sd1, "ren:1.25")
    different(images(sd1), before)
    memkern.unpatch(sd1)
    assert [attn.processor for _, attn in cross_attention_layers(sd1.unet)] == processors
    assert not sd1.unet._forward_pre_hooks
    assert torch.equal(images(sd1), before)


def test_from_stage_to_stage(sd1):
    patch = memkern.patch(sd1, "zero-pad:0.7")
    expected = images(sd1)
    patch.update("ren:1.25")
    assert patch.stage == "kv"
    different(images(sd1), expected)
    patch.update("zero-pad:0.7")
    assert patch.stage == "embeds"
    assert torch.equal(images(sd1), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "ren:1.25", "stage": "embeds"}, r"needs the kv stage.*logit_scale\(1.25\) on SOT"),
        ({"policy": "zero-eot", "stage": "unet"}, "stage: expected 'auto', 'embeds' or 'kv'"),
        ({"policy": Policy((Edit("pad", zero(), layers=("left",)),))}, "'left' is no cross-attention layer.*down, mid"),
    ],
)
def test_refusals(sd1, options, message):
    with pytest.raises(ValueError, match=message):
        memkern.patch(sd1, **options)
    assert memkern.status(sd1).patched is False


def test_a_processor_that_computes_more_is_refused(sd1):
    class Other(AttnProcessor2_0):
        pass

    cross_attention_layers(sd1.unet)[0][1].set_processor(Other())
    with pytest.raises(ValueError, match=r"down_blocks.*attn2: it has a Other, which may compute more"):
        memkern.patch(sd1, "ren:1.25")
    memkern.patch(sd1, "zero-pad:0.7")


def test_status_tells_of_the_edits(sd1):
    memkern.patch(sd1, "ren:1.25")
    images(sd1)
    shown = str(memkern.status(sd1))
    count = len(cross_attention_layers(sd1.unet))
    assert f"{count} cross-attention layers, edits of keys and values; computed by memkern where faster" in shown
    assert "cond: SOT 1 PROMPT 2 EOT 1 PAD 73; 73 PAD excluded, 1 SOT scaled" in shown
    assert "uncond: SOT 1 PROMPT 0 EOT 1 PAD 75; 73 PAD excluded" in shown


def test_attenuate_reads_well():
    assert str(Edit("eot", attenuate(0.2, 1.5))) == "attenuate(0.2, 1.5) EOT on cond"

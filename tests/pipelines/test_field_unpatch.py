"""Parts that diffusers puts into and takes out of a patched pipeline; its state after unpatch (G16, G17, G18, G22)."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from companions import fused_qkv, ip_adapter, slicing
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from field import (
    ON_UNKNOWN,
    STAGES,
    claims,
    counts,
    edited_image,
    edited_or_told,
    image,
    lines,
    outcome,
    ren_image,
    same,
)

import memkern
from memkern.testing import tiny_pipeline

POLICY = "zero-pad:1"
pytestmark = pytest.mark.filterwarnings("ignore:.*processors of the UNet were replaced:UserWarning")


@pytest.fixture
def plain(tokenizers):
    """The same pipeline, never patched."""
    return tiny_pipeline(tokenizers["sd1"])


def is_ours(thing):
    return type(thing).__module__.startswith("memkern")


def left_behind(pipe):
    """Everything of memkern's on a pipeline's parts."""
    found = [name for name, processor in pipe.unet.attn_processors.items() if is_ours(processor)]
    found += [name for name, value in vars(pipe).items() if is_ours(value)]
    for part in (pipe.unet, pipe.text_encoder):
        for name, module in part.named_modules():
            hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            found += [name for hook in hooks if is_ours(hook) or "memkern" in repr(hook)]
    return found if not is_ours(pipe) and "memkern" not in type(pipe).__module__ else [*found, type(pipe)]


@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
@pytest.mark.parametrize("stage", STAGES)
def test_g16_the_default_processors_of_a_patched_unet(sd1, plain, stage, on_unknown):
    """diffusers looks the class of each processor up in its lists; the loss is reported, and patching again works."""
    memkern.patch(sd1, POLICY, stage=stage, on_unknown=on_unknown)
    edited = edited_image(plain, POLICY)
    same(image(sd1), edited)
    sd1.unet.set_default_attn_processor()
    made, _ = outcome(lambda: image(sd1))
    if stage == "embeds":
        same(made, edited)
        assert counts(sd1) == (2, 0, 0, 0)
    elif on_unknown == "raise":
        assert made is None
        assert counts(sd1) == (1, 0, 0, 1)
    else:
        assert counts(sd1) in ((1, 0, 1, 0), (2, 0, 0, 0))
    memkern.patch(sd1, POLICY, stage=stage)
    same(image(sd1), edited)
    memkern.unpatch(sd1)
    same(image(sd1), image(plain))
    assert left_behind(sd1) == []


@pytest.mark.parametrize("on_unknown", ON_UNKNOWN)
def test_g16_the_loss_is_reported(sd1, plain, on_unknown):
    memkern.patch(sd1, POLICY, stage="kv", on_unknown=on_unknown)
    sd1.unet.set_default_attn_processor()
    edited_or_told(sd1, on_unknown, lambda: image(sd1), edited_image(plain, POLICY))


@pytest.mark.parametrize("stage", STAGES)
def test_g16_one_default_for_every_layer_and_back(sd1, plain, stage):
    """Slicing on and off: processors taken out stay out until it is patched again; their edits are never claimed."""
    memkern.patch(sd1, POLICY, stage=stage, on_unknown="pass")
    sd1.enable_attention_slicing(1)
    sd1.disable_attention_slicing()
    made = image(sd1)
    status = memkern.status(sd1)
    if counts(sd1) == (1, 0, 0, 0):
        same(made, edited_image(plain, POLICY))
        assert claims(status)
    else:
        assert stage == "kv"
        assert counts(sd1) == (0, 0, 1, 0)
        assert claims(status) == []
    memkern.patch(sd1, POLICY, stage=stage)
    same(image(sd1), edited_image(plain, POLICY))


class Slicing:
    on = staticmethod(slicing)

    @staticmethod
    def off(pipe):
        pipe.disable_attention_slicing()


class FusedQKV:
    on = staticmethod(fused_qkv)

    @staticmethod
    def off(pipe):
        pipe.unfuse_qkv_projections()


class IPAdapter:
    on = staticmethod(ip_adapter)

    @staticmethod
    def off(pipe):
        pipe.unload_ip_adapter()


TOOLS = [Slicing, FusedQKV, IPAdapter]
ORDERS = ["patch on unpatch off", "patch on off unpatch", "on patch off unpatch", "on patch unpatch off"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
@pytest.mark.parametrize("stage", STAGES)
def test_g17_whatever_the_order_the_pipeline_is_its_own_again(sd1, plain, stage, tool, order):
    """After unpatch, a processor of memkern that diffusers puts back acts as the one that it had replaced."""
    before, added = image(plain), False
    for act in order.split():
        if act == "patch":
            memkern.patch(sd1, POLICY, stage=stage, on_unknown="pass")
        elif act == "unpatch":
            memkern.unpatch(sd1)
            assert not memkern.status(sd1).patched
        else:
            getattr(tool, act)(sd1)
            added = act == "on"
        if not added:
            image(sd1)
    same(image(sd1), before)
    memkern.patch(sd1, POLICY, stage=stage)
    same(image(sd1), edited_image(plain, POLICY))
    memkern.unpatch(sd1)
    same(image(sd1), before)


@pytest.mark.parametrize("policy", [POLICY, "ren:1.25"])
@pytest.mark.parametrize("way", ["set_attn_processor", "attribute", "a copy of the UNet", "patched again"])
def test_g17_processors_that_were_kept_by_someone(sd1, plain, policy, way):
    """Attend-and-Excite and others keep the processors that they find, and put them back when they are done."""
    memkern.patch(sd1, policy, stage="kv")
    image(sd1)
    kept, copied = dict(sd1.unet.attn_processors), copy.deepcopy(sd1.unet)
    memkern.unpatch(sd1)
    if way == "set_attn_processor":
        sd1.unet.set_attn_processor(dict(kept))
    elif way == "attribute":
        for name, processor in kept.items():
            sd1.unet.get_submodule(name.removesuffix(".processor")).processor = processor
    elif way == "a copy of the UNet":
        sd1.unet = copied
    else:
        memkern.patch(sd1, "zero-eot", stage="kv")
        sd1.unet.set_attn_processor(dict(kept))
        memkern.unpatch(sd1)
    assert torch.equal(image(sd1), image(plain))
    memkern.patch(sd1, policy, stage="kv")
    expected = ren_image(plain.tokenizer) if policy == "ren:1.25" else edited_image(plain, policy)
    same(image(sd1), expected)
    memkern.unpatch(sd1)
    assert torch.equal(image(sd1), image(plain))


def test_g17_a_former_patchs_processors_do_not_pass_for_the_new_ones(sd1, plain):
    memkern.patch(sd1, "zero-eot", stage="kv")
    kept = dict(sd1.unet.attn_processors)
    memkern.unpatch(sd1)
    memkern.patch(sd1, POLICY, stage="kv")
    sd1.unet.set_attn_processor(kept)
    edited_or_told(sd1, "raise", lambda: image(sd1), edited_image(plain, POLICY))


@pytest.mark.parametrize("when", ["before patch", "after patch"])
@pytest.mark.parametrize("policy", [POLICY, "ren:1.25"])
def test_g18_projections_that_were_fused_once(sd1, plain, policy, when):
    """diffusers leaves `fused_projections` set on layers whose processors are plain again."""
    if when == "after patch":
        memkern.patch(sd1, policy, stage="kv")
    fused_qkv(sd1)
    sd1.unfuse_qkv_projections()
    cross = [module for name, module in sd1.unet.named_modules() if name.endswith("attn2")]
    assert all(attn.fused_projections for attn in cross)
    assert not memkern.support(sd1).kv_refusals
    memkern.patch(sd1, policy, stage="kv")
    expected = ren_image(plain.tokenizer) if policy == "ren:1.25" else edited_image(plain, policy)
    same(image(sd1), expected)
    assert counts(sd1) == (1, 0, 0, 0)
    assert " fused" not in str(memkern.status(sd1))
    memkern.unpatch(sd1)
    assert torch.equal(image(sd1), image(plain))


def test_g18_one_layer_that_is_fused_still(sd1):
    """Fused and unfused layers are distinguished: those that are fused after patching are reported."""
    fused_qkv(sd1)
    memkern.patch(sd1, POLICY, stage="kv")
    expected = image(sd1)
    sd1.unfuse_qkv_projections()
    memkern.patch(sd1, POLICY, stage="kv")
    torch.testing.assert_close(image(sd1), expected, rtol=1e-3, atol=1e-3)
    fused_qkv(sd1)
    _, said = outcome(lambda: image(sd1))
    assert said
    assert lines(memkern.status(sd1).reached)


class WithoutMemkern(pickle.Unpickler):
    """A process that has no memkern."""

    def find_class(self, module, name):
        if module.partition(".")[0] == "memkern":
            raise ModuleNotFoundError(f"No module named {module!r}")
        return super().find_class(module, name)


def pickled(thing):
    return WithoutMemkern(io.BytesIO(pickle.dumps(thing))).load()


def torch_saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    assert b"memkern" not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("load", [pickled, torch_saved])
@pytest.mark.parametrize("used", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("stage", STAGES)
def test_g22_pickled_parts_load_without_memkern(sd1, plain, stage, used, load):
    memkern.patch(sd1, POLICY, stage=stage)
    if used:
        image(sd1)
    assert b"memkern" not in pickle.dumps(sd1.text_encoder)
    assert b"memkern" not in pickle.dumps(sd1.unet)
    plain.text_encoder, plain.unet = load(sd1.text_encoder), load(sd1.unet)
    kinds = {type(processor) for processor in plain.unet.attn_processors.values()}
    assert kinds <= {AttnProcessor, AttnProcessor2_0}
    memkern.unpatch(sd1)
    assert torch.equal(image(plain), image(sd1))


@pytest.mark.parametrize("stage", STAGES)
def test_g22_a_part_pickled_inside_a_call(sd1, stage):
    """A checkpoint that a callback writes."""
    written = []

    def callback(pipe, step, timestep, tensors):
        written.extend((pickle.dumps(pipe.unet), pickle.dumps(pipe.text_encoder)))
        return {}

    memkern.patch(sd1, POLICY, stage=stage)
    image(sd1, callback_on_step_end=callback)
    assert written
    assert not any(b"memkern" in one for one in written)

"""patch, unpatch, patched: per instance, idempotent, reversible bit for bit, never silently unmitigated."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from unet_input import context_of

import memkern
from memkern.pipelines.family.encoders import clip_embeddings
from memkern.testing import tiny_pipeline


def image(pipe, prompt="a cat on a mat", **options):
    options = {"num_inference_steps": 2, "output_type": "np", "generator": torch.manual_seed(0)} | options
    return pipe(prompt, **options).images


def snapshot(pipe):
    """Every attribute, hook and processor of the pipeline's parts, by identity."""
    found = {("pipe", name): id(value) for name, value in vars(pipe).items()}
    for part in ("text_encoder", "unet", "vae"):
        for name, module in getattr(pipe, part).named_modules():
            for attribute, value in vars(module).items():
                if isinstance(value, dict):
                    found |= {(part, name, attribute, key): id(item) for key, item in value.items()}
                found[part, name, attribute] = id(value)
    found |= {("processor", name): id(processor) for name, processor in pipe.unet.attn_processors.items()}
    return found


def test_unpatch_restores_every_object_and_image(pipe):
    before, objects, class_dict = image(pipe), snapshot(pipe), dict(vars(StableDiffusionPipeline))
    keys = list(pipe.text_encoder.state_dict())
    memkern.patch(pipe)
    assert list(pipe.text_encoder.state_dict()) == keys
    assert not np.array_equal(image(pipe), before)
    memkern.unpatch(pipe)
    assert np.array_equal(image(pipe), before)
    # What a call of the pipeline itself leaves behind (its guidance scale and the like) is not memkern's.
    after = snapshot(pipe)
    assert {key: after[key] for key in objects if not key[1].startswith("_")} == {
        key: objects[key] for key in objects if not key[1].startswith("_")
    }
    assert "encode_prompt" not in vars(pipe)
    assert dict(vars(StableDiffusionPipeline)) == class_dict


def test_patching_alone_adds_hooks_and_no_attribute(pipe):
    before = snapshot(pipe)
    memkern.patch(pipe)
    added = set(snapshot(pipe)) - set(before)
    assert {key[0] for key in added} == {"text_encoder", "unet"}
    assert {key[2] for key in added} == {"_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"}
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert isinstance(pipe, StableDiffusionPipeline)
    memkern.unpatch(pipe)
    assert snapshot(pipe) == before


def test_a18_twice_and_none_at_all(pipe):
    before = snapshot(pipe)
    memkern.unpatch(pipe)
    first = memkern.patch(pipe)
    once = snapshot(pipe)
    second = memkern.patch(pipe, "zero-pad:0.4")
    assert second is first
    assert snapshot(pipe) == once
    assert str(first.policy) == "zero-pad:0.4"
    memkern.unpatch(pipe)
    memkern.unpatch(pipe)
    first.remove()
    assert snapshot(pipe) == before
    with pytest.raises(RuntimeError, match="update: this patch was removed"):
        first.update("none")


def test_a21_other_pipelines_are_left_alone(tokenizers):
    patched, other = (tiny_pipeline(tokenizers["sd1"]) for _ in range(2))
    before = image(other)
    memkern.patch(patched)
    assert np.array_equal(image(other), before)
    assert not memkern.status(other).patched


def test_update_is_live_and_checked_first(sd1):
    patch = memkern.patch(sd1, "swap-pad")
    swapped = context_of(sd1, "a cat")
    patch.update("zero-pad:0.7")
    zeroed = context_of(sd1, "a cat")
    assert not torch.equal(swapped, zeroed)
    for wrong in (
        {"policy": "nonsense"},
        {"policy": "ren:1.25", "stage": "embeds"},
        {"backend": "metal"},
        {"on_unknown": "shrug"},
    ):
        with pytest.raises((ValueError, NotImplementedError)):
            patch.update(**wrong)
        assert torch.equal(context_of(sd1, "a cat"), zeroed)
    patch.update(backend="torch")
    assert torch.equal(context_of(sd1, "a cat"), zeroed)


def test_patched_restores_in_any_case(sd1):
    before = snapshot(sd1)
    with pytest.raises(KeyError), memkern.patched(sd1):
        raise KeyError
    assert snapshot(sd1) == before
    memkern.patch(sd1, "zero-eot", on_unknown="warn")
    with memkern.patched(sd1, "swap-pad") as patch:
        assert str(patch.policy) == "swap-pad"
    assert str(patch.policy) == "zero-eot"
    assert patch.on_unknown == "warn"


def test_a11_an_exception_in_the_middle_of_a_call(sd1):
    def fail(pipe, step, timestep, tensors):
        raise KeyError(step)

    tokenizer = sd1.tokenizer
    memkern.patch(sd1)
    before = context_of(sd1, "a cat")
    with pytest.raises(KeyError):
        image(sd1, callback_on_step_end=fail)
    with pytest.raises(TypeError):
        sd1(["a cat"], negative_prompt=3)
    assert sd1.tokenizer is tokenizer
    assert torch.equal(context_of(sd1, "a cat"), before)


def test_half_way_failure_leaves_the_pipeline_as_it_was(sd1, monkeypatch):
    before = snapshot(sd1)

    def fail(self, name, value):
        if name == "__class__":
            raise OSError("injected")
        object.__setattr__(self, name, value)

    with monkeypatch.context() as broken:
        broken.setattr(StableDiffusionPipeline, "__setattr__", fail)
        with pytest.raises(OSError, match="injected"):
            memkern.patch(sd1)
    assert snapshot(sd1) == before


def test_many_prompts_leave_nothing_behind(sd1):
    """The last of many prompts is that of a fresh pipeline; nothing that was encoded stays alive."""
    memkern.patch(sd1)
    first = weakref.ref(context_of(sd1, "prompt 0"))
    for index in range(20):
        last = context_of(sd1, f"prompt {index}")
    fresh = tiny_pipeline(sd1.tokenizer)
    memkern.patch(fresh)
    assert torch.equal(context_of(fresh, "prompt 19"), last)
    gc.collect()
    assert first() is None


CLONES = pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["deepcopy", "pickle"]
)


@CLONES
@pytest.mark.parametrize("policy", ["zero-pad:0.7", "ren:1.25"])
def test_copies_make_the_same_images(sd1, clone, policy):
    """The kv stage too: processors that edit keys and values are put into the copy's own UNet."""
    memkern.patch(sd1, policy)
    expected = image(sd1)
    other = clone(sd1)
    assert np.array_equal(image(other), expected)
    memkern.unpatch(sd1)
    assert np.array_equal(image(other), expected)
    memkern.unpatch(other)
    assert np.array_equal(image(other), image(sd1))


@CLONES
def test_copies_are_patched_by_themselves(sd1, clone):
    memkern.patch(sd1, "zero-pad:0.7")
    context = context_of(sd1, "a cat")
    other = clone(sd1)
    memkern.unpatch(sd1)
    assert torch.equal(context_of(other, "a cat"), context)
    memkern.unpatch(other)
    assert torch.equal(context_of(other, "a cat"), context_of(sd1, "a cat"))


def test_nothing_of_memkern_is_saved(sd1, tmp_path):
    memkern.patch(sd1)
    sd1.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"memkern" not in file.read_bytes()
    again = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    memkern.unpatch(sd1)
    assert torch.equal(context_of(again, "a cat"), context_of(sd1, "a cat"))


def test_an_own_encode_prompt_is_kept_and_restored(sd1):
    original, calls = sd1.encode_prompt, []

    def own(
        prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt=None,
        prompt_embeds=None, negative_prompt_embeds=None, **options,
    ):  # fmt: skip
        calls.append(prompt)
        return original(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, **options,
        )  # fmt: skip

    sd1.encode_prompt = own
    plain = context_of(sd1, "a cat")
    with memkern.patched(sd1, "zero-eot"):
        assert not torch.equal(context_of(sd1, "a cat"), plain)
    assert calls == ["a cat", "a cat"]
    assert sd1.encode_prompt is own


def test_a_wrapper_put_over_ours_is_reported(sd1):
    patch = memkern.patch(sd1)
    ours = sd1.encode_prompt

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    sd1.encode_prompt = theirs
    assert "encode_prompt was wrapped or replaced since, by <function" in str(memkern.status(sd1))
    with pytest.raises(RuntimeError, match="was put in place of memkern's pipe.encode_prompt; undo that first"):
        memkern.unpatch(sd1)
    sd1.encode_prompt = ours
    patch.remove()
    assert not memkern.status(sd1).patched


def test_an_exchanged_text_encoder_is_told_and_patched_again(sd1):
    memkern.patch(sd1)
    before = context_of(sd1, "a cat")
    former = sd1.text_encoder
    sd1.text_encoder = copy.deepcopy(former)
    clip_embeddings(sd1.text_encoder)._forward_pre_hooks.clear()
    with pytest.raises(memkern.UnmitigatedError, match="called the text encoders 0 times .* exchanged, patch again"):
        context_of(sd1, "a cat")
    memkern.patch(sd1)
    assert torch.equal(context_of(sd1, "a cat"), before)
    assert not clip_embeddings(former)._forward_pre_hooks
    memkern.unpatch(sd1)
    assert not clip_embeddings(sd1.text_encoder)._forward_pre_hooks


def test_a4_a_pipeline_that_shares_the_encoder_is_reported(sd1):
    memkern.patch(sd1)
    other = StableDiffusionImg2ImgPipeline.from_pipe(sd1)
    arguments = ("a cat", torch.device("cpu"), 1, True)
    with pytest.raises(
        memkern.UnmitigatedError, match="called outside its encode_prompt: by another pipeline that shares it"
    ):
        other.encode_prompt(*arguments)
    memkern.patch(other)
    cond, uncond = other.encode_prompt(*arguments)
    expected = sd1.encode_prompt(*arguments)
    assert torch.equal(cond, expected[0])
    assert torch.equal(uncond, expected[1])
    memkern.unpatch(sd1)
    assert memkern.status(other).patched
    memkern.unpatch(other)
    assert not clip_embeddings(other.text_encoder)._forward_pre_hooks


@pytest.mark.parametrize("first", ["patch", "compile"])
def test_d2_a_compiled_text_encoder_in_both_orders(sd1, first):
    """Every prompt gets its own roles: none is baked into a graph."""
    compiled = tiny_pipeline(sd1.tokenizer)
    if first == "patch":
        memkern.patch(compiled)
    compiled.text_encoder = torch.compile(compiled.text_encoder, backend="eager")
    memkern.patch(compiled)
    memkern.patch(sd1)
    for prompt in ("a cat", "a photograph of a cat", ""):
        torch.testing.assert_close(context_of(compiled, prompt), context_of(sd1, prompt))
    memkern.unpatch(compiled)
    memkern.unpatch(sd1)
    torch.testing.assert_close(context_of(compiled, "a cat"), context_of(sd1, "a cat"))


@torch.inference_mode()
def test_inference_mode_and_half_precision(sd1):
    memkern.patch(sd1)
    context = context_of(sd1, "a cat")
    cond, uncond = sd1.encode_prompt("a cat", torch.device("cpu"), 1, True)
    assert torch.equal(context_of(sd1, prompt_embeds=cond, negative_prompt_embeds=uncond), context)
    sd1.text_encoder.to(torch.bfloat16)
    cond, _ = sd1.encode_prompt("a cat", torch.device("cpu"), 1, True)
    assert cond.dtype == torch.bfloat16
    assert (cond[:, 3] == 0).all()
    assert (cond[:, 4:] != 0).any(-1).all()


def test_e1_sequential_offload_in_both_orders(sd1):
    expected = {}
    for policy in ("swap-pad-zero-eot", "zero-pad:0.7"):
        with memkern.patched(sd1, policy):
            expected[policy] = context_of(sd1, "a cat")
    from accelerate import cpu_offload

    first = copy.deepcopy(sd1)
    cpu_offload(first.text_encoder, torch.device("cpu"))
    second = copy.deepcopy(sd1)
    memkern.patch(second)
    cpu_offload(second.text_encoder, torch.device("cpu"))
    for policy, context in expected.items():
        for pipe in (first, second):
            assert clip_embeddings(pipe.text_encoder).token_embedding.weight.device.type == "meta"
            memkern.patch(pipe, policy)
            for _ in range(2):
                cond, uncond = pipe.encode_prompt("a cat", torch.device("cpu"), 1, True)
                assert torch.equal(torch.cat([uncond, cond]), context)

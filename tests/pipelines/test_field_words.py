"""Statements of status, policies and the log are true (G28, G31)."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import re

import pytest
import torch
from field import OTHER, PROMPT, STAGES, counts, image, told
from presets import numbered

import memkern
from memkern import PRESETS, Edit, Policy
from memkern.policy import attenuate, exclude, logit_bias, logit_scale, replace, strength, zero
from memkern.testing import tiny_pipeline

POLICY = "zero-pad:0.7"
FASTER = "computed by memkern where faster"


def tells_why(status, why):
    """True if a line says that layers are not accelerated, and why."""
    return any("accelerat" in line and re.search(why, line) for line in str(status).splitlines())


def in_inference_mode(pipe):
    with torch.inference_mode():
        image(pipe)


def under_autocast(pipe):
    with torch.autocast("cpu", torch.bfloat16):
        image(pipe)


def compiled(pipe):
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    image(pipe)


def compiled_in_place(pipe):
    torch._dynamo.reset()
    pipe.unet.compile(backend="eager")
    image(pipe)


def exchanged(pipe):
    pipe.unet = copy.deepcopy(tiny_pipeline(pipe.tokenizer).unet)
    image(pipe)


def with_gradients(pipe):
    """Call it as for tuning embeddings by the image: the pipeline's own call keeps no gradients."""
    with torch.enable_grad():
        type(pipe).__mro__[1].__call__.__wrapped__(pipe, PROMPT, num_inference_steps=2, output_type="latent")


ACCELERATED = [in_inference_mode, under_autocast, compiled, compiled_in_place]

NOWHERE = {
    "gradients": (with_gradients, "gradients"),
    "an exchanged UNet": (exchanged, "exchanged"),
}


@pytest.mark.parametrize("call", ACCELERATED)
def test_g28_what_is_accelerated_is_said_so(sd1, call):
    memkern.patch(sd1, POLICY)
    call(sd1)
    status = memkern.status(sd1)
    assert FASTER in str(status)
    unet = getattr(sd1.unet, "_orig_mod", sd1.unet)
    assert set(status.layers) == {name for name, _ in unet.named_modules() if name.endswith("attn2")}
    assert not tells_why(status, "inference|autocast|compile")
    assert counts(sd1) == (1, 0, 0, 0)


@pytest.mark.filterwarnings("ignore:.*exchanged since it was patched:UserWarning")
@pytest.mark.parametrize("name", NOWHERE)
def test_g28_status_says_that_nothing_is_accelerated_and_why(sd1, name):
    call, why = NOWHERE[name]
    memkern.patch(sd1, POLICY)
    call(sd1)
    status = memkern.status(sd1)
    assert tells_why(status, why), str(status)
    assert FASTER not in str(status)
    assert counts(sd1) == (1, 0, 0, 0)


@pytest.mark.parametrize("name", ["gradients"])
def test_g28_the_last_call_is_what_counts(sd1, name):
    call, why = NOWHERE[name]
    memkern.patch(sd1, POLICY)
    call(sd1)
    image(sd1)
    assert not tells_why(memkern.status(sd1), why)
    call(sd1)
    assert tells_why(memkern.status(sd1), why)


def test_g28_layers_that_are_computed_by_memkern_say_so(sd1):
    memkern.patch(sd1, POLICY)
    image(sd1)
    status = memkern.status(sd1)
    assert set(status.layers) == {name for name, _ in sd1.unet.named_modules() if name.endswith("attn2")}
    assert not any(tells_why(status, why) for _, why in NOWHERE.values())
    assert status.kept > 0


VARIANTS = [
    Edit("pad", zero()),
    Edit("pad", zero(), layers=("down",)),
    Edit("pad", zero(), layers=("down", "mid")),
    Edit("pad", zero(), layers=("8x8",)),
    Edit("pad", zero(), steps=(0, 0.5)),
    Edit("pad", zero(), steps=(0.5, 1)),
    Edit("pad", zero(), steps=(0, 0.5), layers=("down",)),
    Edit("pad", zero(), fraction=0.5),
    Edit("pad", zero(), fraction=0.5, order="last"),
    Edit("pad", zero(), fraction=0.5, order="even"),
    Edit("pad", zero(), fraction=0.5, order="random"),
    Edit("pad", zero(), fraction=0.5, order="random", seed=3),
    Edit("pad", zero(), fraction=1 / 3),
    Edit("pad", zero(), fraction=0.333333),
    Edit("pad", zero(), branch="uncond", roles_of="cond"),
    Edit("pad", zero(), steps=(0, 1 / 3)),
    Edit("pad", zero(), branch="both"),
    Edit("pad", zero(), branch="uncond"),
    Edit("eot", zero()),
    Edit("pad", exclude()),
    Edit("pad", strength(0.5)),
    Edit("pad", logit_scale(0.5)),
    Edit("pad", logit_bias(0.5)),
    Edit("pad", logit_bias(0.5001)),
    Edit("pad", attenuate(0.2, 0.5)),
    Edit("pad", replace("eot")),
    Edit("pad", replace("pad-reembedded")),
]


CUSTOM = [Policy((edit,)) for edit in VARIANTS] + [Policy(VARIANTS[4:6], reembed_pads="!", name="mine")]


def test_g31_policies_that_differ_print_differently():
    policies = [Policy((edit,)) for edit in VARIANTS]
    for pair in itertools.permutations(VARIANTS, 2):
        with contextlib.suppress(ValueError):  # one that makes the other void
            policies.append(Policy(pair))
    policies += [Policy((VARIANTS[0],), reembed_pads=token) for token in "!?"]
    shown = [str(policy) for policy in policies]
    alike = [(one, other) for one, other in itertools.pairwise(sorted(shown)) if one == other]
    assert alike == []


def test_g31_what_is_printed():
    edit = Edit("pad", zero(), fraction=0.5, layers=("down", "8x8"), steps=(0.25, 0.75), order="random", seed=3)
    shown = str(Policy((edit,)))
    for part in ("down", "8x8", "0.25", "0.75", "random", "3"):
        assert part in shown


def test_g31_status_prints_the_windows(sd1):
    policy = Policy((Edit("pad", zero(), steps=(0, 0.5), layers=("down",)),))
    memkern.patch(sd1, policy)
    assert str(policy) in str(memkern.status(sd1))
    assert "down" in str(memkern.status(sd1).policy)


@pytest.mark.parametrize(
    "policy", [*(numbered(preset) for preset in PRESETS.values()), "zero-pad:0.4", *CUSTOM], ids=str
)
def test_g31_policies_go_through_json(policy):
    policy = Policy.of(policy)
    text = policy.to_json()
    json.loads(text)
    again = Policy.from_json(text)
    assert again == policy
    assert str(again) == str(policy)


@pytest.mark.parametrize("stage", STAGES)
def test_g31_a_record_per_call(sd1, stage, caplog):
    """The log and the callback say the same, once per prompt call."""
    records = []
    memkern.patch(sd1, POLICY, stage=stage, report=records.append)
    with caplog.at_level(logging.INFO, "memkern"):
        image(sd1)
        image(sd1, OTHER, num_images_per_prompt=2)
        with memkern.using(sd1, "none"):
            image(sd1)
    assert [str(record.policy) for record in records] == [POLICY, POLICY, "none"]
    assert [(record.protected, record.exempt, record.unedited, record.refused) for record in records] == [
        (1, 0, 0, 0),
        (2, 0, 0, 0),
        (0, 1, 0, 0),
    ]
    assert [record.rows for record in records] == [
        {"cond": 1, "uncond": 1},
        {"cond": 2, "uncond": 2},
        {"cond": 1, "uncond": 1},
    ]
    assert all(record.stage == stage for record in records[:2])
    assert 0 < records[0].kept == records[1].kept, "images of one prompt read the same keys"
    assert records[-1].kept == memkern.status(sd1).kept
    assert any("zeroed" in str(row) for row in records[0].edits)
    told_of = [one for one in caplog.records if one.name.partition(".")[0] == "memkern" and one.levelno == logging.INFO]
    assert len(told_of) == 3
    assert POLICY in told_of[0].getMessage()
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.parametrize("on_unknown", ["raise", "warn", "pass"])
@pytest.mark.parametrize("stage", STAGES)
def test_g31_a_record_of_what_goes_unedited(sd1, stage, on_unknown, caplog):
    plain = tiny_pipeline(sd1.tokenizer)
    cond, uncond = (part.detach() for part in plain.encode_prompt(PROMPT, torch.device("cpu"), 1, True))
    records = []
    memkern.patch(sd1, POLICY, stage=stage, on_unknown=on_unknown, report=records.append)
    with caplog.at_level(logging.INFO, "memkern"):
        told(on_unknown, lambda: image(sd1, None, prompt_embeds=cond, negative_prompt_embeds=uncond))
    (record,) = records
    assert (record.protected, record.exempt) == (0, 0)
    assert (record.unedited, record.refused) == ((0, 1) if on_unknown == "raise" else (1, 0))
    assert any("prompt_embeds" in reason for reason in record.reasons)
    warned = [one for one in caplog.records if one.levelno == logging.WARNING and one.name.startswith("memkern")]
    assert bool(warned) == (on_unknown != "raise")


def test_a_report_is_taken_out_by_none_and_hides_no_refusal(sd1):
    records = []
    patch = memkern.patch(sd1, POLICY, report=records.append)
    image(sd1)
    memkern.patch(sd1, POLICY)
    image(sd1)
    assert len(records) == 1

    def fail(record):
        raise ZeroDivisionError

    patch.update(report=fail)
    assert image(sd1) is not None
    raw = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(memkern.UnmitigatedError):
        image(sd1, None, prompt_embeds=raw)


def test_unpatched_inside_a_probe(sd1):
    memkern.patch(sd1)
    with memkern.probe(sd1) as probe:
        memkern.unpatch(sd1)
        image(sd1)
    assert all(row is None for record in probe.records for row in record.rows)
    assert not sd1.unet._forward_pre_hooks

"""Policies: the presets' string forms, composition, and what is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from memkern import PRESETS, Edit, Policy, Role, apply_policy
from memkern.actions import Bank, attenuate, exclude, keep, logit_bias, logit_scale, replace, strength, zero
from memkern.presets import Parameter, Preset

STRING_FORMS = {
    "swap-pad-zero-eot": Policy((Edit("eot", zero()),), reembed_pads="!"),
    "swap-pad": Policy(reembed_pads="!"),
    "zero-pad:0.7": Policy((Edit("pad", zero(), fraction=0.7),)),
    "zero-eot": Policy((Edit("eot", zero()),)),
    "zero-pad:1": Policy((Edit("pad", zero()),)),
    "zero-pad-last:0.9": Policy((Edit("pad", zero(), fraction=0.9, order="last"),)),
    "zero-eot-pad": Policy((Edit("eot", zero()), Edit("pad", zero()))),
    "zero-prompt": Policy((Edit("prompt", zero()),)),
    "prompt-from-eot": Policy((Edit("prompt", replace("eot")),)),
    "pad-from-eot": Policy((Edit("pad", replace("eot")),)),
    "prompt-pad-from-eot": Policy((Edit("prompt", replace("eot")), Edit("pad", replace("eot")))),
    "prompt-eot-from-pad": Policy((Edit("prompt", replace("pad-mean")), Edit("eot", replace("pad-mean")))),
    "ren:1.25": Policy((Edit("sot", logit_scale(1.25)), Edit("pad", exclude(), branch="both", roles_of="cond"))),
    "guard:0.2,1.5": Policy(
        [Edit(role, attenuate(0.2, 1.5), layers=("down", "mid")) for role in ("prompt", "eot", "pad")]
    ),
    "none": Policy(),
}


@pytest.mark.parametrize("text", STRING_FORMS)
def test_presets(text):
    policy = Policy.parse(text)
    assert policy == STRING_FORMS[text]
    assert str(policy) == text
    assert Policy.parse(str(policy)) == policy
    assert hash(policy) == hash(STRING_FORMS[text])


def test_every_preset_has_its_string_form():
    assert {text.partition(":")[0] for text in STRING_FORMS} == set(PRESETS)


def test_parameters():
    assert Policy.parse("zero-pad") == Policy.parse("zero-pad:0.7")
    assert Policy.parse("zero-pad:0.4").edits[0].fraction == 0.4
    assert Policy.parse("ren") == Policy.parse("ren:1.25")
    assert Policy.parse("ren:1.25,0") == Policy.parse("ren")
    assert [str(Policy.parse(text)) for text in ("ren:2,0", "ren:2,1")] == ["ren:2", "ren:2,1"]
    assert str(Policy.parse("zero-pad:0.123456789")) == "zero-pad:0.123456789"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero-pads", "unknown preset 'zero-pads'; the presets are "),
        ("", "unknown preset ''; the presets are "),
        ("zero-pad:1.2", r"policy zero-pad:r: r must be in \[0, 1\], got 1.2"),
        ("zero-pad:-0.1", r"policy zero-pad:r: r must be in \[0, 1\], got -0.1"),
        ("zero-pad:nan", r"policy zero-pad:r: r must be in \[0, 1\], got nan"),
        ("zero-pad:half", "policy zero-pad:r: r must be a number, got 'half'"),
        ("ren:-1", r"policy ren:c\[,eot\]: c must be finite and at least 0, got -1"),
        ("guard", "policy guard:alpha,tau: alpha has no default; give it"),
        ("guard:0.2", "policy guard:alpha,tau: tau has no default; give it"),
        ("guard:0.2,x", "policy guard:alpha,tau: tau must be a number, got 'x'"),
        ("guard:0.2,1,3", "policy guard:alpha,tau: takes 2 numbers, got 'guard:0.2,1,3'"),
        ("guard:-0.2,1", "policy guard:alpha,tau: alpha must be finite and at least 0, got -0.2"),
        ("ren:inf", r"policy ren:c\[,eot\]: c must be finite and at least 0, got inf"),
        ("ren:1,0.5", r"policy ren:c\[,eot\]: eot must be 0 or 1, got 0.5"),
        ("ren:1,0,1", r"policy ren:c\[,eot\]: takes 2 numbers, got 'ren:1,0,1'"),
        ("zero-eot:0.5", "preset 'zero-eot' takes no parameter, got 'zero-eot:0.5'"),
    ],
)
def test_parsing_errors(text, message):
    with pytest.raises(ValueError, match=message):
        Policy.parse(text)


def test_an_unknown_preset_is_told_of_all():
    usages = ", ".join(preset.usage for preset in PRESETS.values())
    assert "guard:alpha,tau" in usages
    with pytest.raises(ValueError, match=f"the presets are {re.escape(usages)}$"):
        Policy.parse("blur")
    with pytest.raises(ValueError, match=r"; did you mean 'zero-pad'\?$"):
        Policy.parse("zero-pads:0.7")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Edit("title", zero()),
            ValueError,
            "role: 'title' is not a token role; use one of sot, prompt, eot, pad",
        ),
        (lambda: Edit("pad", zero), TypeError, r"action: expected an Action such as policy.zero\(\)"),
        (
            lambda: Edit("pad", zero(), branch="left"),
            ValueError,
            "branch: expected one of cond, uncond, both, got 'left'",
        ),
        (
            lambda: Edit("pad", zero(), layers=()),
            ValueError,
            r"layers: expected names, blocks or resolutions, got \(\)",
        ),
        (lambda: Edit("pad", zero(), fraction=1.5), ValueError, r"fraction: expected a number in \[0, 1\], got 1.5"),
        (lambda: Edit("pad", zero(), order="odd"), ValueError, "order: expected one of first, last, even, random"),
        (lambda: Edit("pad", zero(), steps=(0.5, 0.5)), ValueError, r"steps: expected from < to, got \(0.5, 0.5\)"),
        (lambda: Edit("pad", zero(), steps=0.5), ValueError, r"steps: expected from and to, .* got 0.5"),
        (lambda: Edit("pad", zero(), layers=3), ValueError, "layers: expected names, blocks or resolutions, got 3"),
        (lambda: Edit("pad", zero(), seed=0.5), ValueError, r"seed: expected a whole number in .*, got 0.5"),
        (lambda: Edit("pad", zero(), seed=2**64), ValueError, r"seed: expected a whole number in .*, got 184467"),
        (lambda: Edit("eot", replace("eot")), ValueError, "action: EOT cannot be replaced by itself"),
        (lambda: replace("pad"), ValueError, "replace: PAD has many rows; use 'sot', 'eot', or a bank"),
        (lambda: strength(1.1), ValueError, r"strength: expected a number in \[0, 1\], got 1.1"),
        (lambda: logit_scale(float("inf")), ValueError, "logit_scale: expected a finite number, got inf"),
        (lambda: logit_bias("much"), ValueError, "logit_bias: expected a finite number, got 'much'"),
        (lambda: Policy("zero-pad"), TypeError, "edits: expected a sequence of Edit, got 'zero-pad'; see Policy.parse"),
        (lambda: Policy([zero()]), TypeError, "edits: expected Edit, got Action"),
        (lambda: Policy(reembed_pads=0), TypeError, "reembed_pads: expected a token such as '!', got 0"),
        (
            lambda: Policy([Edit("pad", zero(), fraction=0.5), Edit("pad", replace("eot"))]),
            ValueError,
            r"'replace\(eot\) PAD on cond' leaves nothing of 'zero first 0.5 of PAD on cond'",
        ),
        (lambda: Policy(name=3), TypeError, "name: expected text such as 'zero-pad:0.7', got 3"),
        (lambda: Policy.of(3), TypeError, "policy: expected a Policy or a preset's name, got int"),
    ],
)
def test_composition_is_validated_when_it_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_composition():
    policy = Policy([Edit("pad", zero()), Edit(Role.PAD, keep(), fraction=0.25, order="last")], reembed_pads="!")
    assert str(policy) == "pads as '!' + zero PAD on cond + keep last 0.25 of PAD on cond"
    assert policy.touches("uncond")
    assert not policy.edits_on("uncond")
    assert Edit("eot", replace("pad-mean")).action.source is Bank.PAD_MEAN
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.reembed_pads = None


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (
            Policy.parse("ren:1.25"),
            r"logit_scale\(1.25\) on SOT acts on logits; exclude on PAD acts on logits",
        ),
        (Policy([Edit("eot", logit_bias(1))]), r"logit_bias\(1\) on EOT acts on logits"),
        (Policy([Edit("eot", zero(), layers=("mid",))]), "the edit of EOT has a window of layers"),
        (Policy([Edit("eot", zero(), steps=(0, 0.5))]), "the edit of EOT has a window of steps"),
        (Policy.parse("guard:0.2,1.5"), r"attenuate\(0.2, 1.5\) on PROMPT acts on logits; .* has a window of layers"),
    ],
)
def test_what_the_embeds_stage_cannot_do(policy, reason):
    assert re.search(reason, "; ".join(policy.kv_reasons()))
    with pytest.raises(ValueError, match=f"cannot be applied to embeddings: .*{reason}"):
        apply_policy(torch.zeros(1, 77, 8), torch.full((1, 77), 49407), policy)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            Edit("pad", zero(), fraction=0.7, layers=("down", "64x64"), steps=(0, 0.4)),
            "zero first 0.7 of PAD on cond in layers down, 64x64 in steps 0 to 0.4",
        ),
        (Edit("pad", zero(), fraction=0.5, order="random", seed=3), "zero random 0.5 (seed 3) of PAD on cond"),
        (Edit("pad", zero(), fraction=0.1 + 0.2), "zero first 0.30000000000000004 of PAD on cond"),
        (Edit("pad", zero(), order="last"), "zero last 1 of PAD on cond"),
        (Edit("pad", exclude(), branch="both", roles_of="cond"), "exclude PAD on both by the roles of cond"),
        (Edit("pad", zero(), layers=("a, b", "mid")), "zero PAD on cond in layers 'a, b', mid"),
        (Edit("eot", logit_scale(1.25000001)), "logit_scale(1.25000001) EOT on cond"),
        (Edit("eot", logit_scale(1)), "logit_scale(1) EOT on cond"),
        (Edit("eot", logit_bias(-0.0)), "logit_bias(0) EOT on cond"),
    ],
)
def test_an_edit_says_all_that_it_is(edit, text):
    assert str(edit) == text


def test_numbers_of_a_preset_are_not_rounded():
    one, other = 0.12345678901234, 0.12345678901235
    assert str(Policy.parse(f"zero-pad:{one}")) == f"zero-pad:{one}" != str(Policy.parse(f"zero-pad:{other}"))


def test_a_name_that_is_not_what_it_names():
    zeroed = (Edit("eot", zero()),)
    assert str(Policy(zeroed, name="zero-eot")) == "zero-eot"
    assert str(Policy(zeroed, name="zero-pad:0.7")) == "zero-pad:0.7 (zero EOT on cond)"
    assert str(Policy(zeroed, reembed_pads="!", name="zero-eot")) == "zero-eot (pads as '!' + zero EOT on cond)"
    assert str(Policy(zeroed, name="mine")) == "mine (zero EOT on cond)"
    assert Policy(zeroed, name="mine") == Policy.parse("zero-eot")


def test_a_preset_that_is_added_is_parsed(monkeypatch):
    soft = Preset("soft", "", "", lambda s: Policy([Edit("pad", strength(s))]), (Parameter("s", 0.5),))
    monkeypatch.setitem(PRESETS, "soft", soft)
    assert str(Policy.parse("soft")) == "soft:0.5"
    monkeypatch.delitem(PRESETS, "soft")
    assert str(soft.policy()) == "soft:0.5 (strength(0.5) PAD on cond)"

"""Policies as JSON: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from presets import numbered

from memkern import PRESETS, Edit, Policy
from memkern.actions import attenuate, exclude, logit_scale, replace, strength, zero

DOCUMENT = """{
  "memkern_policy": 1,
  "reembed_pads": "!",
  "edits": [
    {
      "role": "pad",
      "action": {
        "kind": "strength",
        "value": 0.5
      },
      "fraction": 0.7,
      "layers": [
        "down",
        "64x64"
      ]
    },
    {
      "role": "eot",
      "action": {
        "kind": "replace",
        "source": "pad-mean"
      }
    }
  ]
}"""


def test_what_is_written():
    edits = [Edit("pad", strength(0.5), fraction=0.7, layers=("down", "64x64")), Edit("eot", replace("pad-mean"))]
    policy = Policy(edits, reembed_pads="!")
    assert policy.to_json() == DOCUMENT
    assert Policy.from_json(DOCUMENT) == policy


@pytest.mark.parametrize("policy", [numbered(preset) for preset in PRESETS.values()], ids=str)
def test_presets_keep_their_names(policy):
    read = Policy.from_json(policy.to_json())
    assert (read, read.name, str(read)) == (policy, policy.name, str(policy))


def test_every_field_of_an_edit():
    edit = Edit("pad", exclude(), "uncond", 0.3, "random", 2**64 - 1, "cond", ("mid", "a, b"), (0.1, 0.4))
    policy = Policy((edit, Edit("sot", attenuate(0.1, -2))), "é", "mine")
    read = Policy.from_json(policy.to_json())
    assert (read, read.name, read.edits[0].layers, read.edits[0].steps) == (policy, "mine", edit.layers, edit.steps)


def test_fields_with_their_default_may_be_written():
    text = json.dumps(
        {
            "memkern_policy": 1,
            "name": None,
            "reembed_pads": None,
            "edits": [
                {
                    "role": "PAD",
                    "action": {"kind": "zero", "value": None, "source": None, "threshold": None},
                    "branch": "cond",
                    "fraction": 1,
                    "order": "first",
                    "seed": 0,
                    "roles_of": "own",
                    "layers": None,
                    "steps": None,
                }
            ],
        }
    )
    assert Policy.from_json(text) == Policy([Edit("pad", zero())])


def test_the_example_of_the_site():
    page = (Path(__file__).parents[1] / "docs/how-to/policies.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    edits = [Edit("pad", exclude(), layers=("mid", "up"), steps=(0, 0.4)), Edit("sot", logit_scale(1.25))]
    assert Policy.from_json(example) == Policy(edits)


def document(**changed):
    return json.dumps({"memkern_policy": 1, "edits": []} | changed)


def of_edit(**changed):
    return document(
        edits=[{"role": "eot", "action": {"kind": "zero"}}, {"role": "pad", "action": {"kind": "zero"}} | changed]
    )


def of_action(**changed):
    return of_edit(action=changed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero-pad:0.7", "policy: expected JSON, got 'zero-pad:0.7': Expecting value"),
        ("", "policy: expected JSON, got ''"),
        ("[" * 100_000, "policy: expected JSON"),
        (None, "policy: expected text, the JSON of an object, got NoneType"),
        ("[]", r"policy: expected a JSON object, got \[\]"),
        ("3", "policy: expected a JSON object, got 3"),
        ('{"edits": []}', "policy: memkern_policy: expected version 1, got None"),
        (document(memkern_policy=2), "policy: memkern_policy: expected version 1, got 2"),
        (document(memkern_policy=True), "policy: memkern_policy: expected version 1, got True"),
        (document(memkern_policy="1"), "policy: memkern_policy: expected version 1, got '1'"),
        ('{"memkern_policy": 1}', "policy: edits: missing"),
        ('{"memkern_policy": 1, "edits": [], "edits": []}', "^policy: edits: expected once, got it twice"),
        (document(edit=[]), r"policy: edit: unknown field, got \[\]; the fields are memkern_policy, edits,"),
        (document(edits={}), "policy: edits: expected a list, got {}"),
        (document(edits="zero"), "policy: edits: expected a list, got 'zero'"),
        (document(edits=[3]), r"policy: edits\[0\]: expected an object with role, action, .*, got 3"),
        (document(name=3), "policy: name: expected text such as .*, got 3"),
        (document(reembed_pads=0), "policy: reembed_pads: expected a token such as '!', got 0"),
        (document(edits=[{"action": {"kind": "zero"}}]), r"policy: edits\[0\]: role: missing"),
        (document(edits=[{"role": "pad"}]), r"policy: edits\[0\]: action: missing"),
        (of_edit(colour="red"), r"edits\[1\]: colour: unknown field, got 'red'; the fields are role, action, "),
        (of_edit(role="title"), r"edits\[1\]: role: 'title' is not a token role; use one of sot, prompt"),
        (of_edit(role=3), r"edits\[1\]: role: 3 is not a token role"),
        (of_edit(branch="left"), r"edits\[1\]: branch: expected one of cond, uncond, both, got 'left'"),
        (of_edit(branch=[]), r"edits\[1\]: branch: expected one of cond, uncond, both, got \[\]"),
        (of_edit(fraction="0.5"), r"edits\[1\]: fraction: expected a number in \[0, 1\], got '0.5'"),
        (of_edit(fraction=True), r"edits\[1\]: fraction: expected a number in \[0, 1\], got True"),
        (of_edit(fraction=float("nan")), "policy: expected JSON, which has no NaN"),
        (of_edit(order="odd"), r"edits\[1\]: order: expected one of first, last, even, random, got 'odd'"),
        (of_edit(seed="3"), r"edits\[1\]: seed: expected a whole number in .*, got '3'"),
        (of_edit(roles_of="both"), r"edits\[1\]: roles_of: expected one of own, cond, got 'both'"),
        (of_edit(layers="mid"), r"edits\[1\]: layers: expected a list, got 'mid'"),
        (of_edit(layers={"mid": 1}), r"edits\[1\]: layers: expected a list, got {'mid': 1}"),
        (of_edit(layers=[3]), r"edits\[1\]: layers: expected names, blocks or resolutions, got \[3\]"),
        (of_edit(steps=0.4), r"edits\[1\]: steps: expected a list, got 0.4"),
        (of_edit(steps=[0, 0.4, 1]), r"edits\[1\]: steps: expected from and to, .* got \[0, 0.4, 1\]"),
        (of_edit(steps=[0.4, 0]), r"edits\[1\]: steps: expected from < to, got \(0.4, 0\)"),
        (of_edit(action="zero"), r"edits\[1\]: action: expected an object with kind, value, .*, got 'zero'"),
        (of_action(), r"edits\[1\]: action: kind: missing"),
        (of_action(kind="halve"), r"edits\[1\]: action: kind: expected one of keep, zero, .*, got 'halve'"),
        (of_action(kind="zero", value=1), r"edits\[1\]: action: value: zero takes none, got 1"),
        (of_action(kind="strength"), r"edits\[1\]: action: value: expected a number in \[0, 1\], got None"),
        (of_action(kind="strength", value=2), r"edits\[1\]: action: value: expected a number in \[0, 1\], got 2"),
        (of_action(kind="logit_bias", value=10**400), r"edits\[1\]: action: value: .* a float can hold"),
        (of_action(kind="attenuate", value=1, threshold="x"), r"action: threshold: expected a finite number"),
        (of_action(kind="replace", source="pad"), r"edits\[1\]: action: source: PAD has many rows; use 'sot'"),
        (of_action(kind="replace"), r"edits\[1\]: action: source: expected 'sot', 'eot', .*, got None"),
        (of_action(kind="replace", source=0), r"edits\[1\]: action: source: expected 'sot', 'eot', .*, got 0"),
        (document(edits=[{"role": "pad", "action": {"kind": "zero"}}] * 2), "policy: edits: 'zero PAD on cond' leaves"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        Policy.from_json(text)

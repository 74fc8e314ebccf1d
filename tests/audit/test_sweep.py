"""`memkern sweep`: the grid, the front, and a winner that `patch` takes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

import memkern
from memkern import Policy, audit, demo
from memkern.audit.front import Candidate, Limits, best, fronted, ordered
from memkern.audit.grid import grid
from memkern.audit.judges import ByAttributes
from memkern.audit.methods import method
from memkern.audit.summary import Summary
from memkern.cli import main


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (
            ["zero-pad:{0.3..1.0:0.1}"],
            [f"zero-pad:{r}" for r in ("0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1")],
        ),
        (["guard:{0.2,0.5},{1..2}"], ["guard:0.2,1", "guard:0.2,2", "guard:0.5,1", "guard:0.5,2"]),
        (["swap-pad", "zero-pad:{0.7}", "zero-pad:0.7"], ["swap-pad", "zero-pad:0.7"]),
        (["zero-pad:{0.1..0.4:0.2}"], ["zero-pad:0.1", "zero-pad:0.3"]),
    ],
)
def test_grids_of_numbers(patterns, names):
    assert [str(policy) for policy in grid(patterns)] == names


def test_grids_of_layers_and_steps():
    found = grid(["zero-eot", "swap-pad"], ["all", "down+mid"], ["0-1", "0.2-0.5"])
    places = [(policy.reembed_pads, [(edit.layers, edit.steps) for edit in policy.edits]) for policy in found]
    assert places == [
        (None, [(None, None)]),
        (None, [(None, (0.2, 0.5))]),
        (None, [(("down", "mid"), None)]),
        (None, [(("down", "mid"), (0.2, 0.5))]),
        ("!", []),
    ], "re-embedded pads are the same everywhere: one policy"


def test_grids_of_presets_in_layers_of_their_own():
    found = grid(
        ["zero-pad:0.9@down+mid & zero-pad:{0.4,0.6}@up & swap-pad", "zero-eot@mid"], ["all", "down"], ["0-1", "0-0.5"]
    )
    made = [
        (policy.reembed_pads, [(edit.fraction, edit.layers, edit.steps) for edit in policy.edits]) for policy in found
    ]
    parts = None, (0, 0.5)
    assert made == [
        *(("!", [(0.9, ("down", "mid"), part), (up, ("up",), part)]) for up in (0.4, 0.6) for part in parts),
        *((None, [(1, ("mid",), part)]) for part in parts),
    ], "a pattern that names its layers is in no others"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"patterns": ["zero-pad:{0.3..}"]},
            "expected a range such as {0.3..1.0:0.1} or a list such as {0.2,0.5}, got",
        ),
        ({"patterns": ["zero-pad:{1..0:0.1}"]}, "expected a range"),
        ({"patterns": ["zero-pad:{0..1:0}"]}, "expected a range"),
        ({"patterns": ["zero-pad:{0.2,}"]}, "expected a range"),
        ({"patterns": ["zero-pad:{0..2}"]}, "r must be in [0, 1], got 2"),
        ({"patterns": ["zero-pads"]}, "unknown preset 'zero-pads'"),
        ({"patterns": ["zero-pad:0.9@down &"]}, "both sides of each '&', got 'zero-pad:0.9@down &'"),
        ({"patterns": ["zero-pad:0.9@"]}, "layers: expected blocks or layers such as down+mid, got ''"),
        ({"patterns": ["zero-eot & zero-eot"]}, "give each position one edit"),
        ({"patterns": ["swap-pad-zero-eot"], "steps": ["0.5-0.2"]}, "expected a part of the schedule such as 0-0.5"),
        ({"patterns": ["swap-pad-zero-eot"], "steps": ["half"]}, "expected a part of the schedule such as 0-0.5"),
    ],
)
def test_grids_that_cannot_be(options, message):
    with pytest.raises(ValueError) as raised:
        grid(**options)
    assert message in str(raised.value)


def candidate(name, copies, loss):
    summary = Summary(copies, copies, copies, copies, 4)
    return Candidate(
        method(name), Policy.parse(name), summary, copies, {"colour": 1 - loss}, {"colour": (loss, loss, loss)}, 8
    )


def test_the_front_is_what_no_other_beats():
    given = [
        candidate("zero-pad:0.1", 0.9, 0.0),
        candidate("zero-pad:0.2", 0.5, 0.1),
        candidate("zero-pad:0.3", 0.5, 0.2),
        candidate("zero-pad:0.4", 0.0, 0.3),
        candidate("zero-pad:0.5", 0.02, 0.25),
        candidate("zero-pad:0.6", 0.6, 0.3),
    ]
    found = ordered(fronted(given), Limits())
    assert {one.method.name for one in found if one.front} == {f"zero-pad:0.{n}" for n in (1, 2, 4, 5)}
    assert [one.method.name for one in found] == [f"zero-pad:0.{n}" for n in (5, 4, 2, 3, 6, 1)], "the best first"
    assert best(found, Limits()).method.name == "zero-pad:0.5", "few enough copies, and the least loss of those"
    assert best(found[2:3], Limits(0.0)).method.name == found[2].method.name, "none has that few: the fewest"
    equal = fronted([candidate("zero-pad:0.1", 0.5, 0.1), candidate("zero-pad:0.2", 0.5, 0.1)])
    assert all(one.front for one in equal)


def test_the_embedded_models_judge_is_the_demos():
    """The same shares as `memkern demo` for the same images."""
    images, scene = demo.memorized(), demo.scenes()[0]
    judge = ByAttributes()
    prompts = audit.listed.listed(audit.Model(), None, None, None)
    assert judge(prompts[0], [(images[0][1], images[0][1]), (images[1][1], images[0][1])]) == {
        "copies": [1.0, 0.0],
        "similarity": pytest.approx([1.0, demo.correlation(images[1][1], images[0][1])]),
    }
    assert judge(prompts[16], [(images[0][1], images[0][1])]) == {
        name: [float(value)] for name, value in demo.judge(images[0][1], scene).items()
    }


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("swept")
    prompts = out / "prompts.csv"
    entries = json.loads((demo.embedded.MODEL / "memorized.json").read_text())[:3]
    rows = [(entry["caption"], demo.embedded.MODEL / entry["image"]) for entry in entries]
    rows += [(caption, "") for caption in demo.ordinary()[:3]]
    prompts.write_text("prompt,image\n" + "".join(f'"{text}",{image}\n' for text, image in rows))
    options = {"prompts": prompts, "policies": ["zero-pad:{0.2..1.0:0.1}"], "inference_steps": 6, "seeds": [0]}
    return out, options, audit.sweep(out=out / "out", check_seeds=[7], quiet=True, **options)


def test_what_is_written(swept):
    """Any prompts: pixels tell copies, and the likeness to unpatched images fidelity."""
    out, _, found = swept
    with (out / "out" / "sweep.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["policy"] for row in rows] == [one.method.name for one in found.candidates]
    assert {"copies", "copies_low", "copies_high", "pixels_to_unmitigated", "pixels_to_unmitigated_loss"} <= set(
        rows[0]
    )
    assert len(rows) == 6, "three of the nine were left behind"
    document = json.loads((out / "out" / "sweep.json").read_text())
    assert document["best"] == found.best.method.name
    assert document["checked"]["images"] == 6
    assert (out / "out" / "front.png").stat().st_size > 1000
    assert f"| {found.best.method.name} | yes |" in (out / "out" / "sweep.md").read_text()


def test_the_winner_is_a_policy_that_patch_takes(swept):
    out, _, found = swept
    policy = Policy.from_json((out / "out" / "best.json").read_text())
    assert policy == found.best.policy
    pipe = demo.load()
    assert memkern.patch(pipe, policy).status().policy == policy


def test_it_goes_on_and_the_grid_grows(swept):
    """Nothing is made again, and an added policy is made alone."""
    out, options, found = swept
    held = {path: path.stat().st_mtime_ns for path in out.rglob("*.png") if path.parent.name != "out"}
    again = audit.sweep(out=out / "out", check_seeds=[7], quiet=True, **options)
    assert [one.copies for one in again.candidates] == [one.copies for one in found.candidates]
    audit.sweep(out=out / "out", quiet=True, **{**options, "policies": [*options["policies"], "swap-pad"]})
    now = {path: path.stat().st_mtime_ns for path in out.rglob("*.png") if path.parent.name != "out"}
    assert held.items() <= now.items()
    assert {path.parent.name for path in now.keys() - held.keys()} <= {"swap-pad", *(p.parent.name for p in held)}
    assert any(path.parent.name == "swap-pad" for path in now)


def test_losses_are_those_of_the_images(swept):
    """The mean likeness to unpatched images of ordinary prompts, by numpy."""
    out, _, found = swept
    one = found.candidates[0]
    likeness = []
    for place in (3, 4, 5):
        own, plain = (
            np.asarray(Image.open(out / "out" / "images" / folder / f"{place:04d}_0.png"), float).ravel()
            for folder in (one.method.folder, "none")
        )
        likeness.append(np.corrcoef(own, plain)[0, 1])
    assert one.fidelity["pixels_to_unmitigated"] == pytest.approx(np.mean(likeness))
    assert one.loss["pixels_to_unmitigated"][0] == pytest.approx(1 - np.mean(likeness))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--policy none", "policies: expected at least one that edits something, got none"),
        ("--limit 3", "prompts: a sweep needs memorized and ordinary ones, got 3 and 0"),
        ("--max-copies 3", "max_copies: expected a share in [0, 1], got 3.0"),
        ("--steps 3", "steps: expected a part of the schedule such as 0-0.5, got '3'"),
        ("--inference-steps 0", "inference_steps: expected at least 1, got 0"),
        ("--policy zero-pad:{0..inf:1}", "policy: expected a range such as {0.3..1.0:0.1}"),
        ("--policy zero-pad:{nan..1:1}", "policy: expected a range such as {0.3..1.0:0.1}"),
        ("--policy zero-pad:{0..1:nan}", "policy: expected a range such as {0.3..1.0:0.1}"),
        ("--policy zero-pad:{0..1:1e-9}", "policy: expected at most 10,000 values of a range"),
        (
            "--policy guard:{0..1:0.005},{1..2:0.01}",
            "policies: expected at most 10,000 in a grid, 'guard:{0..1:0.005},{1..2:0.01}' makes more",
        ),
        ("--policy &", "policy: expected a preset, or presets on both sides of each '&', got '&'"),
        ("--policy zero-pad:0.9&", "on both sides of each '&', got 'zero-pad:0.9&'"),
        ("--policy=", "policy: expected a preset, or presets on both sides of each '&', got ''"),
        ("--policy wen:3", "policy: a sweep has presets alone; 'wen:3' can be measured by an audit"),
        ("--threshold nan", "threshold: expected a similarity in [-1, 1], got nan"),
        ("--threshold 2", "threshold: expected a similarity in [-1, 1], got 2.0"),
        ("--seeds 0,1 --check-seeds 1,2", "check_seeds: expected seeds that the sweep does not use, got 1"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
    assert main(["sweep", *arguments.split(), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_the_embedded_model_has_a_policy_that_costs_little(tmp_path):
    """On seeds that the sweep did not see, the best policy has at most 3 % copies and costs no attribute more than 3
    points, which is less than the default does.
    """
    seeds = (*range(100, 108), *range(200, 208))
    found = audit.sweep(out=tmp_path, check_seeds=seeds, quiet=True)
    assert found.checked.copies.mean <= 0.03
    assert found.checked.worst <= 0.03
    default = demo.measure(demo.load(), ["none", "swap-pad-zero-eot"], demo.memorized(), demo.scenes(), seeds)
    plain, edited = (one.shares for one in default)
    assert found.checked.worst < max(plain[name].mean - edited[name].mean for name in found.checked.loss)

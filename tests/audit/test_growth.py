"""A folder that grows: only what is missing is made, and the result is that of a folder made at once."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time

import pytest
from test_audit import ONE_THREAD

from memkern import Edit, Policy, Role, audit
from memkern.actions import zero
from memkern.cli import main

SAME = ("results.csv", "grid.png", "manifest.json", "summary.json", "summary.md", "summary.tex")
WHOLE = {"policies": ["zero-pad:1", "random-numbers:1"], "seeds": [0, 1], "limit": 3, "steps": 2}


def run(out, **options):
    return audit.run(out=out, quiet=True, **{**WHOLE, **options})


def contents(out):
    """Everything but times: images and tables, byte for byte."""
    found = {name: (out / name).read_bytes() for name in SAME}
    return found | {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("images/*/*.png")}


def stamps(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("images/*/*.png")}


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    out = tmp_path_factory.mktemp("at_once")
    run(out)
    return out


@pytest.mark.parametrize(
    "steps",
    [
        [{"policies": ["zero-pad:1"]}, {}],
        [{"seeds": [0]}, {}],
        [{"limit": 1}, {}],
        [{"policies": [], "seeds": [1], "limit": 2}, {"policies": ["random-numbers:1"], "seeds": [1]}, {}],
    ],
    ids=["a policy", "a seed", "prompts", "all three"],
)
def test_g34_grown_equals_one_made_at_once(at_once, tmp_path, steps):
    held = {}
    for options in steps:
        run(tmp_path, **options)
        now = stamps(tmp_path)
        assert held.items() <= now.items(), "none was made again"
        held = now
    assert contents(tmp_path) == contents(at_once)


def test_killed_resumed_and_grown(at_once, tmp_path):
    """A process is killed in mid-run; the folder then grows by a policy and a seed."""
    arguments = "-m memkern audit --policy zero-pad:1 --seeds 0 --limit 3 --steps 2".split()
    process = subprocess.Popen(
        [sys.executable, *arguments, "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD,
    )  # fmt: skip
    while process.poll() is None and len(list(tmp_path.rglob("*_*.png"))) < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "results.csv").exists()
    run(tmp_path, policies=["zero-pad:1"], seeds=[0])
    run(tmp_path)
    assert contents(tmp_path) == contents(at_once)


def test_what_is_not_asked_for_again_stays(at_once, tmp_path):
    """Only the new policy is named: the table has all."""
    run(tmp_path, policies=["zero-pad:1"], seeds=[0])
    run(tmp_path, policies=["random-numbers:1"], seeds=[1], limit=1)
    assert contents(tmp_path) == contents(at_once)


def test_other_settings_are_refused_by_name(at_once):
    before = contents(at_once)
    with pytest.raises(ValueError, match=r"other steps, scheduler, batch; .*steps was 2, is 3; scheduler was None"):
        run(at_once, steps=3, scheduler="DDIM", batch=2)
    assert contents(at_once) == before


def test_prompts_are_added_at_the_end(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    given = {"prompts": prompts, "policies": [], "seeds": [0], "limit": None, "steps": 1}
    run(tmp_path / "out", **given)
    prompts.write_text("a red circle\na blue square\n")
    run(tmp_path / "out", **given)
    prompts.write_text("a green star\na red circle\na blue square\n")
    with pytest.raises(ValueError, match="holds 'a red circle' as 0000, but the requested one is 'a green star'; add"):
        run(tmp_path / "out", **given)


def test_policies_as_objects_and_files(tmp_path):
    """A `Policy`, a preset's own, and a JSON file of the first: two methods, kept by what they do."""
    mine = Policy((Edit(Role.EOT, zero(), steps=(0, 0.5)),), name="mine")
    (tmp_path / "mine.json").write_text(mine.to_json())
    out = tmp_path / "out"
    options = {"seeds": [0], "limit": 1, "steps": 2}
    run(out, policies=[mine, Policy.parse("zero-pad:1")], **options)
    made = stamps(out)
    assert len(made) == 3
    assert (
        main(["audit", "--policy", str(tmp_path / "mine.json"), "--limit", "1", "--steps", "2", "--out", str(out)]) == 0
    )
    run(out, policies=[mine], **options)
    assert stamps(out) == made
    with (out / "results.csv").open(newline="") as lines:
        assert [row["method"] for row in csv.DictReader(lines)] == ["none", str(mine), "zero-pad:1"]
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert Policy.from_json(json.dumps(settings["policies"][str(mine)])) == mine


def test_names_that_read_alike_have_folders_of_their_own():
    names = ["a b", "a_b", "a:b", "é", "x" * 300]
    folders = {audit.methods.Method(name).folder for name in names}
    assert len(folders) == len(names)
    assert all(len(folder) <= 100 for folder in folders)
    assert audit.methods.Method("zero-pad:0.7").folder == "zero-pad_0.7"

"""`memkern audit`: nothing lost and nothing made twice, the same table however it was made, and clear refusals."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from diffusers.pipelines.ddpm import DDPMPipeline
from PIL import Image

from memkern import audit, demo
from memkern.audit import images
from memkern.audit.methods import method
from memkern.cli import main

SETTINGS = {"policies": ["none", "zero-pad:0.7", "random-numbers:2"], "seeds": [0, 1], "limit": 2, "steps": 2}

METHODS = "--policy none --policy zero-pad:0.7 --policy random-numbers:2".split()
COMMAND = ["-m", "memkern", "audit", *METHODS, *"--seeds 0,1 --limit 2 --steps 2".split()]
# Two processes, by the variables that `accelerate launch` sets as well where there are GPUs.
TWO = "-m torch.distributed.run --nproc-per-node 2".split()
# As in this process: another number of threads rounds differently.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(out, **options):
    return audit.run(out=out, quiet=True, **{**SETTINGS, **options})


def table(out):
    """The rows of the results."""
    with (out / "results.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.png"))}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    run(out)
    return out


def test_what_is_written(unbroken):
    assert {path.name for path in unbroken.iterdir()} == {
        "images", "results.csv", "times.csv", "report.html", "grid.png", "manifest.json",
        "summary.json", "summary.md", "summary.tex",
    }  # fmt: skip
    rows = table(unbroken)
    assert [(row["prompt_id"], row["method"], row["seed"]) for row in rows] == [
        (prompt, name, seed) for prompt in ("0000", "0001") for name in SETTINGS["policies"] for seed in "01"
    ]
    assert all((unbroken / row["image"]).is_file() for row in rows)
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert manifest["settings"]["steps"] == 2
    assert manifest["versions"]["torch"] == torch.__version__
    page = (unbroken / "report.html").read_text()
    assert 'src="http' not in page
    assert page.count("data:image/png;base64,") == 1, "the grid; both prompts are memorized ones, so there is no chart"
    assert "No chart of memorization against fidelity" in page


def test_killed_and_run_again_equals_an_unbroken_run(unbroken, tmp_path):
    """The remains of a broken run: some images, one cut off, one without its record, a partial file."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results.csv").unlink()
    (tmp_path / "report.html").unlink()
    made = sorted((tmp_path / "images").rglob("*.png"))
    kept = {path: path.stat().st_mtime_ns for path in made[3:]}
    made[0].unlink()
    made[1].write_bytes(made[1].read_bytes()[:200])
    made[2].with_suffix(".json").unlink()
    (made[0].parent / ".x.partial").write_bytes(b"half")
    run(tmp_path)
    assert files(tmp_path) == files(unbroken)
    assert table(tmp_path) == table(unbroken)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "none was made again"


def test_a_killed_process_leaves_whole_images_only(unbroken, tmp_path):
    process = subprocess.Popen(
        [sys.executable, *COMMAND, "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD,
    )  # fmt: skip
    while process.poll() is None and len(list(tmp_path.rglob("*.png"))) < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    left = [path for path in (tmp_path / "images").rglob("*.png") if not path.name.startswith(".")]
    assert all(images.is_done(path) for path in left)
    run(tmp_path)
    assert {k: v for k, v in files(tmp_path).items() if "partial" not in k} == files(unbroken)
    assert table(tmp_path) == table(unbroken)


def test_two_processes_give_the_same_table(unbroken, tmp_path):
    done = subprocess.run(
        [sys.executable, *TWO, *COMMAND, "--out", str(tmp_path)],
        capture_output=True, text=True, check=False, env=ONE_THREAD, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "6/6" in done.stderr, "half of the twelve images are the first process's"
    assert files(tmp_path) == files(unbroken)
    assert table(tmp_path) == table(unbroken)


def test_the_numbers_are_those_of_a_few_lines(unbroken):
    """Similarities from the images by numpy alone, and the page's mean of them."""
    means = {}
    training = [np.asarray(image, float) for _, image in demo.memorized()]
    for row in table(unbroken):
        image, plain = (
            np.asarray(Image.open(unbroken / "images" / folder / f"{row['prompt_id']}_{row['seed']}.png"), float)
            for folder in (method(row["method"]).folder, "none")
        )
        for other, column in (
            (plain, "pixels_to_unmitigated"),
            (training[int(row["prompt_id"])], "pixels_to_reference"),
        ):
            expected = np.corrcoef(image.ravel(), other.ravel())[0, 1]
            assert float(row[column]) == pytest.approx(expected, abs=1e-5)
        means.setdefault(row["method"], []).append(float(row["pixels_to_unmitigated"]))
    page = (unbroken / "report.html").read_text()
    for values in means.values():
        assert f"{np.mean(values):.3f} (" in page


def test_unmitigated_is_unpatched(unbroken):
    """The images under "none" are those of a pipeline that memkern never touched."""
    pipe = demo.load()
    pipe.set_progress_bar_config(disable=True)
    caption = demo.memorized()[0][0]
    generator = torch.Generator("cpu").manual_seed(1)
    expected = pipe(caption, generator=generator, num_inference_steps=2, guidance_scale=7.5).images[0]
    found = Image.open(unbroken / "images" / "none" / "0000_1.png")
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("name", ["random-tokens:3", "random-numbers", "late-guidance:0.5", "wen:1"])
def test_alternatives_do_something(name, tmp_path):
    run(tmp_path, policies=[name], seeds=[0], limit=1, steps=3)
    by_method = {row["method"]: row for row in table(tmp_path)}
    assert float(by_method[name]["pixels_to_unmitigated"]) < 0.999
    assert (by_method[name]["text"] != by_method["none"]["prompt"]) == name.startswith("random")


@pytest.mark.parametrize(
    ("text", "name", "options", "expected"),
    [
        ("a cat\n\na dog\n", "x.txt", {}, [("a cat", None), ("a dog", None)]),
        ("Caption,image\na cat,1.png\n", "x.csv", {}, [("a cat", "1.png")]),
        ('{"text": "a cat", "url": "2.jpg"}\n"a dog"\n', "x.jsonl", {}, [("a cat", None), ("a dog", None)]),
        ("prompt,mine\na cat,3.png\n", "x.csv", {"references": "mine"}, [("a cat", "3.png")]),
        ("a\nb\nc\n", "x.txt", {"limit": 2}, [("a", None), ("b", None)]),
    ],
)
def test_prompts(tmp_path, text, name, options, expected):
    (tmp_path / name).write_text(text)
    found = audit.read_prompts(tmp_path / name, **options)
    assert [(p.text, None if p.reference is None else p.reference.name) for p in found] == expected
    assert [p.id for p in found] == [f"{i:04d}" for i in range(len(found))]


def test_references_in_a_folder_and_one_that_is_no_image(tmp_path, capsys):
    folder = tmp_path / "references"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "0000.png")
    (folder / "1.jpg").write_text("not an image")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    audit.run(out=tmp_path / "out", prompts=tmp_path / "prompts.txt", references=str(folder), policies=[], steps=1)
    assert "1 references are no images and were skipped: " in capsys.readouterr().out
    assert [bool(row["pixels_to_reference"]) for row in table(tmp_path / "out")] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nowhere.txt"], "prompts: there is no file nowhere.txt"),
        (["--prompts", "{here}/x.pdf"], "prompts: expected a .txt, .csv, .tsv or .jsonl file, got x.pdf"),
        (["--prompts", "{here}/empty.txt"], "empty.txt has none"),
        (["--prompts", "{here}/x.csv"], "has no column prompt or caption or text; it has a, b"),
        (["--prompts", "{here}/y.csv", "--references", "nope"], "'nope' is neither a folder nor a column of"),
        (["--prompts", "{here}/bad.jsonl"], "bad.jsonl, line 1 is not JSON"),
        (["--policy", "zero-everything"], "unknown preset 'zero-everything'"),
        (["--policy", "random-tokens:many"], "random-tokens:many: expected a number after the colon, got 'many'"),
        (["--sscd", "{here}/x.pdf"], "x.pdf is no TorchScript model"),
        (["--sscd", "{here}/none.pt"], "sscd: there is no file"),
        (["--model", "some/model", "--limit", "1"], "prompts: a file of prompts is needed"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
    for name, text in (
        ("x.pdf", "pdf"),
        ("empty.txt", "\n"),
        ("x.csv", "a,b\n1,2\n"),
        ("y.csv", "prompt\na\n"),
        ("bad.jsonl", "{"),
    ):
        (tmp_path / name).write_text(text)
    given = [argument.format(here=tmp_path) for argument in arguments]
    assert main(["audit", *given, "--steps", "1", "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "images").exists()


def test_another_audit_in_the_folder(unbroken):
    with pytest.raises(ValueError, match="holds an audit with other steps, guidance; take another folder"):
        run(unbroken, steps=3, guidance=1.5)


def test_a_full_disk_keeps_what_was_made(tmp_path, monkeypatch):
    saved = Image.Image.save
    count = iter(range(100))

    def full(self, path, *args, **options):
        if next(count) == 2:
            raise OSError(28, "No space left on device")
        return saved(self, path, *args, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left on device; finished images stay, run again to continue"):
        run(tmp_path)
    assert len(files(tmp_path)) == 2
    assert not list(tmp_path.rglob("*.partial"))


def test_a_model_that_cannot_be_patched(tmp_path, capsys):
    pipe = demo.load()
    DDPMPipeline(pipe.unet, pipe.scheduler).save_pretrained(tmp_path / "ddpm")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    given = [
        "--model",
        str(tmp_path / "ddpm"),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["audit", *given]) == 1
    assert "model: DDPMPipeline cannot be patched: it has no text_encoder" in capsys.readouterr().err


def test_a_killed_worker_of_two(unbroken, tmp_path):
    """One of two processes dies; what both made stays, and the next run ends with the same table."""
    launcher = subprocess.Popen(
        [sys.executable, *TWO, *COMMAND, "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD,
    )  # fmt: skip
    while launcher.poll() is None and len(list(tmp_path.rglob("*_*.png"))) < 2:
        time.sleep(0.05)
    workers = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
    for worker in workers[:1]:
        worker.kill()
    launcher.wait(timeout=120)
    run(tmp_path)
    assert {k: v for k, v in files(tmp_path).items() if "partial" not in k} == files(unbroken)
    assert table(tmp_path) == table(unbroken)

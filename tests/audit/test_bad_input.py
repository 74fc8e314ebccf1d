"""Bad input to `memkern audit`: every message names the file, the line, what came, and what is right."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from memkern import audit
from memkern.audit.images import Job
from memkern.audit.methods import Method
from memkern.audit.prompts import Prompt
from memkern.audit.results import write_csv
from memkern.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("column", ["prompt", "caption", "text", "Caption", " prompt"])
@pytest.mark.parametrize(("separator", "suffix"), [(",", "csv"), ("\t", "csv"), ("\t", "tsv"), (";", "csv")])
def test_g34_layouts_of_the_published_prompt_sets(tmp_path, separator, suffix, column, end, mark):
    path = tmp_path / f"prompts.{suffix}"
    lines = [["id", column, "url"], ["7", '"a cat, a dog; a\tbird"', "u"], ["8", "Ann Graham Lotz", ""]]
    path.write_bytes(mark + "".join(separator.join(line) + end for line in lines).encode())
    assert [prompt.text for prompt in audit.read_prompts(path)] == ["a cat, a dog; a\tbird", "Ann Graham Lotz"]


@pytest.mark.parametrize("name", ["x.csv", "x.txt", "x.jsonl"])
def test_g34_a_mark_before_the_first_line(tmp_path, name):
    text = {"x.csv": "prompt\na cat\n", "x.txt": "a cat\n", "x.jsonl": '{"prompt": "a cat"}\n'}[name]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [prompt.text for prompt in audit.read_prompts(tmp_path / name)] == ["a cat"]


def test_a_csv_of_one_column_and_text_over_lines(tmp_path):
    (tmp_path / "x.csv").write_text('caption\n"a cat\nand a dog"\n\na bird\n')
    assert [prompt.text for prompt in audit.read_prompts(tmp_path / "x.csv")] == ["a cat\nand a dog", "a bird"]


def test_labels(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,memorized\na,1\nb,0\nc,\n")
    assert [prompt.label for prompt in audit.read_prompts(tmp_path / "x.csv")] == [True, False, None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.csv",
            "prompt\na\ncaf\xe9\n".encode("latin-1"),
            r"x\.csv, line 3 is not UTF-8: byte 0xe9; save the file as",
        ),
        ("x.txt", "a\nb\n".encode("utf-16"), r"x\.txt, line 1 is not UTF-8: byte 0xff"),
        ("x.csv", b"id,prompt\n1\n", r"x\.csv, line 2 has no column prompt or caption or text; it has id"),
        ("x.csv", b"prompt,n\na,1\nb,c,2\n", r"line 3 has 3 cells, the header 2: \['b', 'c', '2'\]; put text"),
        ("x.csv", b"prompt\n" + b"a" * 200_000, r"x\.csv, line 2 is not CSV: field larger"),
        ("x.csv", b"prompt,memorized\na,yes\n", r"line 2, memorized: expected 0 or 1, got 'yes'"),
        ("x.jsonl", b'"a"\n{"prompt": 5}\n', r"x\.jsonl, line 2, prompt: expected text, got 5"),
        ("x.jsonl", b'"a"\n\n{"prompt": null}\n', r"line 3, prompt: expected text, got None"),
        ("x.jsonl", b'"\\ud800"\n', r"line 1, prompt: expected text, got half of a surrogate pair"),
        ("x.jsonl", b'{"prompt": "a"\n', r"line 1 is not JSON"),
        ("x.csv", b"prompt\n", r"x\.csv has none; expected at least one"),
        ("x.csv", b"", r"x\.csv has none"),
        ("x.csv", b"prompt,prompt\na,b\n", r"x\.csv, line 1 has the column prompt more than once"),
        ("x.csv", b"Caption,n,caption\na,1,b\n", r"line 1 has the column caption more than once"),
        ("x.csv", b'prompt\na\n"b\nc\nd\n', r"x\.csv, line 3 is not CSV: a quote is not closed"),
    ],
)
def test_g34_prompts(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        audit.read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "steps: expected at least 1, got 0"),
        ("--limit 0", "limit: expected at least 1 prompt, got 0"),
        ("--limit -1", "limit: expected at least 1 prompt, got -1"),
        ("--batch 0", "batch: expected at least 1, got 0"),
        ("--seeds -1", "seeds: expected at least 0, got -1"),
        ("--seeds 9223372036854775808", "seeds: expected whole numbers below 2**63"),
        ("--guidance nan", "guidance: expected a finite number, got nan"),
        ("--protocol kim", "protocol: expected kim-no, got 'kim'"),
        ("--scheduler Dim", "scheduler: expected a scheduler of diffusers, such as DDIM or DDIMScheduler, got 'Dim'"),
        ("--dtype half", "dtype: expected float32, float16, bfloat16, got 'half'"),
        ("--device gpu", "device: expected a device such as cpu, cuda or cuda:1, got 'gpu'"),
        ("--device cuda:99", "device: cuda:99 is not here"),
        ("--generator-device gpu", "generator_device: expected a device such as cpu"),
        ("--policy mine.json", "policies: there is no file mine.json"),
        ("--policy {here}/bad.json", "bad.json: policy: "),
        ("--policy {here}/latin.json", "latin.json"),
        ("--policy zero-pad:2", "policy zero-pad:r: r must be in [0, 1], got 2"),
        ("--policy= --policy none", "unknown preset ''"),
        ("--model {here}/model.safetensors", "model: there is no file {here}/model.safetensors"),
        ("--model {here}/no.safetensors --prompts {here}/p.txt", "no.safetensors is no .safetensors file"),
        ("--model {here}/model.ckpt", "model.ckpt: a .ckpt file can run code; expected one of .safetensors"),
        ("--model {here}", "is no diffusers folder: it has no model_index.json"),
        ("--model /no/such --prompts {here}/p.txt", "model: /no/such: expected a diffusers folder, hub name or .safet"),
        ("--config {here}", "config: only a single .safetensors file needs one; the model is embedded"),
        ("--lora {here}/lora.safetensors", "lora: there is no file {here}/lora.safetensors"),
        ("--lora {here}/no.safetensors:much", "lora: there is no file {here}/no.safetensors:much"),
        ("--lora {here}/no.safetensors:nan", "lora: expected a finite weight after the colon"),
        ("--lora {here}/bad.json", "lora: expected a .safetensors file, got {here}/bad.json"),
        ("--sscd-size 288", "sscd_size: a size needs weights; give sscd as well"),
        ("--aesthetic {here}/bad.json", "aesthetic: the head needs a CLIP model's embedding; give clip as well"),
        ("--clip open_clip:ViT-L-14", "clip: expected open_clip:ARCHITECTURE/WEIGHTS"),
        ("--lpips {here}/alex.pth", "lpips: there is no file {here}/alex.pth"),
        ("--lpips {here}/bad.json", "lpips: {here}/bad.json has no tensors that can be read; expected a .safetensors"),
        ("--lpips {here}", "lpips: expected a file, {here} is a folder"),
        ("--sscd {here}", "sscd: expected a file, {here} is a folder"),
        ("--sscd {here}/bad.json", "bad.json is no TorchScript model; expected a file such as sscd_disc_mixup"),
        ("--prompts {here}", "prompts: expected a file, {here} is a folder"),
        ("--clip {here}", "clip: {here} is no CLIP model of transformers that can be loaded: "),
        ("--prompts {here}/p.txt --references {here}", "references: {here} has no image of these prompts; expected"),
        ("--threshold nan", "threshold: expected a similarity in [-1, 1], got nan"),
        ("--threshold 2", "threshold: expected a similarity in [-1, 1], got 2.0"),
        ("--policy late-guidance:2", "late-guidance:2: expected a part of the schedule in [0, 1]"),
        ("--policy zero-pad:nan", "policy zero-pad:r: "),
    ],
)
def test_g34_options(tmp_path, capsys, arguments, message):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "latin.json").write_bytes(b"\xe9")
    (tmp_path / "no.safetensors").write_text("none")
    (tmp_path / "p.txt").write_text("a cat\n")
    given = arguments.format(here=tmp_path).split()
    assert main(["audit", "--limit", "1", "--steps", "1", *given, "--out", str(tmp_path / "out")]) == 1
    assert message.format(here=tmp_path) in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, "steps: expected a whole number, got 2.5"),
        ({"steps": True}, "steps: expected a whole number, got True"),
        ({"seeds": ["0"]}, "seeds: expected a whole number, got '0'"),
        ({"seeds": []}, "seeds: expected at least one whole number, got none"),
        ({"guidance": "7"}, "guidance: expected a number, got '7'"),
        ({"policies": [3]}, "policies: expected names, Policy objects or JSON files, got 3"),
        ({"model": 3}, "model: expected 'embedded', a folder, hub name or file, or a diffusers pipeline, got 3"),
    ],
)
def test_g34_from_python(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        audit.run(out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-a", "@SUM(A1)", "\t=1", "\r=1", "＝1"])
def test_a_cell_that_a_spreadsheet_would_run_is_text(tmp_path, text):
    row = {"prompt_id": "0000", "prompt": text, "method": "none", "seed": 0, "image": "i.png", "pixels": -0.5}
    write_csv(tmp_path, [{**row, "text": text, "seconds": 1.0, "peak_mib": None}])
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as lines:
        (found,) = csv.DictReader(lines)
    expected = "'" + text.replace("\r", "\n")
    assert (found["prompt"], found["text"]) == (expected, expected)
    assert found["pixels"] == "-0.5", "numbers stay numbers"


def test_a_folder_that_was_begun_before_texts_were_recorded(tmp_path):
    """A record without "text", and a manifest without the settings that came later."""
    options = {"out": tmp_path, "policies": ["zero-pad:1"], "limit": 1, "steps": 1, "quiet": True}
    audit.run(**options)
    record = Job(Method("none"), Prompt("0000", ""), 0).path(tmp_path).with_suffix(".json")
    old = json.loads(record.read_text())
    del old["text"]
    record.write_text(json.dumps(old))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for name in ("config", "loras", "scheduler", "dtype", "device", "generator_device", "batch", "policies"):
        del manifest["settings"][name]
    manifest["settings"]["prompts"] = [entry[:2] for entry in manifest["settings"]["prompts"]]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    audit.run(**options)
    with (tmp_path / "results.csv").open(newline="") as lines:
        texts = {row["method"]: row["text"] for row in csv.DictReader(lines)}
    assert texts["none"] == ""
    assert texts["zero-pad:1"] != ""


def test_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="is no manifest of an audit"):
        audit.run(out=tmp_path, limit=1, steps=1, quiet=True)


def test_nothing_is_unpickled():
    """`torch.load` without `weights_only=True` runs what is in a file."""
    calls = [
        (path, line)
        for folder in ("memkern", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\btorch\.load\(|\bpickle\.load", line)
    ]
    assert calls, "the pattern finds them"
    assert [call for call in calls if "weights_only=True" not in call[1]] == []

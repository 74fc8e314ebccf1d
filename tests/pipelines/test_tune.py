"""`memkern tune`: a table filled beforehand, and what it refuses."""

from __future__ import annotations

import json

import pytest
from measuring import files

import memkern
from memkern.cli import main
from memkern.ops import backends
from memkern.testing import tiny_pipeline, train_tokenizer

pytestmark = pytest.mark.skipif(bool(backends.installed("cpp")), reason="needs the compiled CPU library")


def test_tune_fills_the_table_beforehand(tmp_path, timed, monkeypatch, capsys):
    """The table is filled for prompts of every length: no layer of an image is timed after it."""
    monkeypatch.setenv("MEMKERN_CHOICE", "measured")
    monkeypatch.setenv("MEMKERN_CACHE", str(tmp_path))
    tokenizer = train_tokenizer(["a cat"])
    tiny_pipeline(tokenizer).save_pretrained(tmp_path / "model")
    options = ["--size", "16x32", "--size", "16x16", "--images", "1", "--images", "2", "--dtype", "float32"]
    policies = ["--policy", "zero-pad:0.7", "--policy", "none"]
    assert main(["tune", "--model", str(tmp_path / "model"), *policies, *options]) == 0
    shown = capsys.readouterr().out
    (path,) = files(tmp_path)
    assert str(path) in shown
    assert "absorbed (N=64 C=16 H=8, keys 77/77; measured in ms: former 3.00, projected 2.00, absorbed 1.00)" in shown
    count = len(timed())
    assert count == len(json.loads(path.read_text())["times"])
    for policy in ("zero-pad:0.7", "none"):
        pipe = tiny_pipeline(tokenizer)
        memkern.patch(pipe, policy)
        for prompt in ("", "a cat", "a cat " * 9, ["a cat", "a cat"]):
            for size in ({"height": 16, "width": 16}, {"height": 32, "width": 16}):
                pipe(prompt, num_inference_steps=3, output_type="latent", **size)
                assert "measured in ms" in str(memkern.status(pipe))
    assert len(timed()) == count


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MEMKERN_CACHE", "off", "memkern tune: MEMKERN_CACHE: off keeps nothing; expected a folder"),
        ("MEMKERN_CHOICE", "estimated", "memkern tune: MEMKERN_CHOICE: estimated looks nothing up; expected measured"),
    ],
)
def test_tune_says_where_nothing_would_be_kept(tmp_path, monkeypatch, capsys, name, value, message):
    monkeypatch.setenv("MEMKERN_CHOICE", "measured")
    monkeypatch.setenv("MEMKERN_CACHE", str(tmp_path))
    monkeypatch.setenv(name, value)
    assert main(["tune"]) == 1
    assert message in capsys.readouterr().err


def test_tune_refuses_no_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEMKERN_CHOICE", "measured")
    monkeypatch.setenv("MEMKERN_CACHE", str(tmp_path))
    assert main(["tune", "--images", "0"]) == 1
    assert "memkern tune: images: expected 1 or more, got [0]" in capsys.readouterr().err


def test_tune_refuses_sizes(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--size", "large"])
    assert "expected a width and a height such as 512x768, got 'large'" in capsys.readouterr().err

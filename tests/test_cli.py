"""`memkern info` and `memkern demo`, as a user runs them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from memkern import PRESETS
from memkern.cli import main
from memkern.demo import clip_tokenizer, tiny_pipeline, train_tokenizer


def test_info_as_a_module():
    done = subprocess.run([sys.executable, "-m", "memkern", "info"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == [
        "memkern",
        "python",
        "torch",
        "diffusers",
        "transformers",
        "triton",
        "cuda",
        "build",
        "backend",
        "backend",
    ]


def test_demo(tmp_path, capsys):
    assert main(["demo", "--steps", "2", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"pictures: {tmp_path / 'grid.png'}" in shown
    table = (tmp_path / "roles.md").read_text()
    assert table in shown
    assert (
        "| two green triangles! | swap-pad-zero-eot | cond | 1 | 4 | 1 | 71 | 1 EOT zeroed, 71 PAD re-embedded |"
        in table
    )
    with Image.open(tmp_path / "grid.png") as grid:
        cells = [grid.crop((left, 45, left + 160, 205)) for left in (220, 392, 564)]
    assert len({cell.tobytes() for cell in cells}) == 3  # unpatched and two policies: three different pictures
    assert all(cell.getcolors(50) is None for cell in cells)  # more than 50 colours: something is drawn


def test_demo_with_a_model_of_the_users(tmp_path, capsys):
    tiny_pipeline(train_tokenizer(["a cat"])).save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--prompt", "a cat", "--prompt", "a|b", "--policy", "zero-pad:1"]
    assert main(["demo", *arguments, "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "| a\\|b | zero-pad:1 | cond |" in shown
    assert "random" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "zero-pads"], "unknown preset 'zero-pads'; the presets are swap-pad-zero-eot"),
        (["--policy", "ren:1.25"], "needs the attention stage"),
    ],
)
def test_demo_refuses_policies(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert message in capsys.readouterr().err


def test_demo_says_what_is_wrong_with_a_model(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 1
    assert "memkern demo:" in capsys.readouterr().err


def test_trained_tokenizer_has_clips_layout():
    tokenizer = train_tokenizer(["a red circle", "a red square"] * 3)
    size = len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("!") == 0
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (size - 2, size - 1, size - 1)
    assert tokenizer.tokenize("a red circle!") == ["a</w>", "red</w>", "circle</w>", "!</w>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a cat").input_ids)[0] == "<|startoftext|>"


def test_real_vocabulary_gives_clips_ids(tokenizers):
    """The ids that CLIP's tokenizer is known to give."""
    tokenizer = tokenizers["sd1"]
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (tokenizer.convert_tokens_to_ids("!"), tokenizer("!").input_ids[1]) == (0, 256)
    assert tokenizers["sd2"].pad_token_id == 0
    assert clip_tokenizer.__doc__


def test_readme_lists_every_preset():
    from test_package import ROOT

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for preset in PRESETS.values():
        assert f"| `{preset.usage}` | {preset.summary} | {preset.equation} |" in readme

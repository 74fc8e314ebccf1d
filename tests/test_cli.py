"""The commands of `memkern` as a user runs them; audits, benchmarks and the explorer have tests of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image
from transformers import T5Config, T5EncoderModel

from memkern import PRESETS, Policy, __version__, demo
from memkern.audit import split
from memkern.cli import main
from memkern.testing import tiny_pipeline, train_tokenizer


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
        *["backend"] * 4,
    ]


def test_info_for_programs(capsys):
    assert main(["info", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["versions"]["memkern"] == __version__
    assert shown["backends"]["torch"] == "available"


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"memkern {__version__}\n"


def test_presets_are_listed_with_their_equations(capsys):
    assert main(["presets"]) == 0
    shown = capsys.readouterr().out
    for preset in PRESETS.values():
        assert preset.usage in shown
        assert preset.summary in shown


def test_presets_for_programs(capsys, tmp_path):
    """Each is a document that `--policy` takes, but for those that need numbers."""
    assert main(["presets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [preset.usage for preset in PRESETS.values()]
    for row, (name, preset) in zip(rows, PRESETS.items(), strict=True):
        if any(one.default is None for one in preset.parameters):
            assert row["policy"] is None
        else:
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps(row["policy"]))
            assert main(["demo", "--policy", str(path), "--prompt", "a", "--steps", "1", "--out", str(tmp_path)]) == 0
            assert Policy.from_json(path.read_text()) == Policy.parse(name)


def test_support_says_what_would_be_patched(tmp_path):
    tiny_pipeline(train_tokenizer(["a cat"])).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "memkern", "support", "--model", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pipeline  StableDiffusionPipeline" in done.stdout
    assert "stages    embeds, kv" in done.stdout
    assert done.stderr == "", "notices of other libraries"


def test_support_says_why_a_model_is_refused(tmp_path, capsys):
    pipe = tiny_pipeline(train_tokenizer(["a cat"]))
    size = {"vocab_size": 1024, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    pipe.register_modules(text_encoder=T5EncoderModel(T5Config(**size)))
    pipe.save_pretrained(tmp_path)
    assert main(["support", "--model", str(tmp_path)]) == 1
    assert "cannot be patched: its text_encoder is a T5EncoderModel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "guess"),
    [
        (["exlpore"], "explore"),
        (["suport", "--model", "x"], "support"),
        (["demo", "--polciy", "none"], "--policy"),
        (["demo", "--policies", "none"], "--policy"),
        (["bench", "--comple"], "--compile"),
        (["presets", "--jsno"], "--json"),
        (["demo", "--policy", "zero-pda"], "'zero-pad'"),
        (["sweep", "--polic", "none"], "--policy"),
    ],
)
def test_misspelt_names_are_guessed(arguments, guess, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert f"did you mean {guess}" in capsys.readouterr().err


def test_names_that_are_like_no_other_are_not_guessed(capsys):
    with pytest.raises(SystemExit):
        main(["quux"])
    error = capsys.readouterr().err
    assert "invalid choice: 'quux'" in error
    assert "did you mean" not in error


def test_demo_of_the_embedded_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(demo.measure.__globals__, "STEPS", 4)
    numbers = tmp_path / "numbers.json"
    arguments = ["--policy", "swap-pad-zero-eot", "--seeds", "3"]
    assert main(["demo", *arguments, "--json", str(numbers), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for name in ("memorized.png", "ordinary.png", "roles.md"):
        assert str(tmp_path / name) in shown
    assert "| policy | copies % | correlation | colour % | background % | position % | s/image |" in shown
    assert set(json.loads(numbers.read_text())["policies"]) == {"none", "swap-pad-zero-eot"}
    caption = demo.memorized()[0][0]
    assert f"| {caption} | swap-pad-zero-eot | cond | 1 |" in (tmp_path / "roles.md").read_text()
    for name, columns, rows in (("memorized.png", 3, 16), ("ordinary.png", 2, 24)):
        with Image.open(tmp_path / name) as grid:
            assert grid.width == 220 + columns * (96 + 12)
            assert grid.height > rows * (96 + 12)


def test_demo_with_a_model_and_prompts_of_the_users(tmp_path, capsys):
    tiny_pipeline(train_tokenizer(["a cat"])).save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--prompt", "a cat", "--prompt", "a|b", "--prompt", ""]
    options = ["--policy", "zero-pad:1", "--steps", "1", "--seeds", "0", "--out", str(tmp_path / "out")]
    assert main(["demo", *arguments, *options]) == 0
    shown = capsys.readouterr().out
    assert f"images:          {tmp_path / 'out' / 'grid.png'}" in shown
    for name, branch in (("a cat", "cond"), ("a\\|b", "cond"), ("(empty)", "cond"), ("(negative)", "uncond")):
        assert f"| {name} | zero-pad:1 | {branch} |" in shown
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        cells = [grid.crop((left, grid.height - 172, left + 160, grid.height - 12)) for left in (220, 392)]
    assert cells[0].tobytes() != cells[1].tobytes()
    assert all(cell.getcolors(50) is None for cell in cells)  # more than 50 colours: something is drawn


def test_demo_of_the_embedded_model_with_own_prompts(tmp_path, capsys):
    assert main(["demo", "--prompt", "a red circle", "--steps", "1", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert (
        "| a red circle | swap-pad-zero-eot | cond | 1 | 3 | 1 | 72 | 1 EOT zeroed, 72 PAD re-embedded |"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "zero-pads"], "unknown preset 'zero-pads'; the presets are "),
        (["--policy", "guard"], "policy guard:alpha,tau: alpha has no default; give it"),
        (["--seeds", "many"], "expected whole numbers such as 0,1, got 'many'"),
    ],
)
def test_demo_refuses_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps", "--guidance"])
def test_demo_refuses_settings_that_its_captions_have_of_their_own(option, tmp_path, capsys):
    assert main(["demo", option, "4", "--out", str(tmp_path / "out")]) == 1
    assert f"{option}: only with --prompt, --model or --lora" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_demo_has_numbers_of_the_embedded_model_only(tmp_path, capsys):
    assert main(["demo", "--prompt", "a cat", "--json", str(tmp_path / "x.json"), "--out", str(tmp_path)]) == 1
    assert "--json: only the captions of the embedded model have numbers" in capsys.readouterr().err


def test_demo_says_what_is_wrong_with_a_model(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 1
    assert "memkern demo:" in capsys.readouterr().err


def test_trained_tokenizer_has_clips_layout():
    tokenizer = train_tokenizer(["a red circle", "a red square"] * 3)
    size = len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("!") == 0
    assert size == 1024
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1022, 1023, 1023)
    assert tokenizer.tokenize("a red circle!") == ["a</w>", "red</w>", "circle</w>", "!</w>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a cat").input_ids)[0] == "<|startoftext|>"


def test_real_vocabulary_gives_clips_ids(tokenizers):
    """The ids that CLIP's tokenizer is known to give."""
    tokenizer = tokenizers["sd1"]
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (tokenizer.convert_tokens_to_ids("!"), tokenizer("!").input_ids[1]) == (0, 256)
    assert tokenizers["sd2"].pad_token_id == 0


def test_page_of_presets_lists_every_one():
    from test_package import ROOT

    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    for preset in PRESETS.values():
        assert f"| `{preset.usage}` | {preset.summary} | {preset.equation} |" in page


def test_numbers_of_a_preset_stay_with_it():
    assert split("none,guard:0.2,1.5,zero-pad:0.7") == ["none", "guard:0.2,1.5", "zero-pad:0.7"]
    assert split("zero-pad:0.7, none") == ["zero-pad:0.7", "none"]
    assert split("guard:0.2,1e-1, guard:.2,-1E+2 ,none") == ["guard:0.2,1e-1", "guard:.2,-1E+2", "none"]


def test_output_that_nobody_reads_to_the_end():
    """`memkern presets | head -1` ends without a traceback."""
    command = [sys.executable, "-c", "import sys; from memkern.cli import main; sys.exit(main(['presets']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1

"""Any model: a folder, a single file, LoRAs, a pipeline that is loaded; and every part of a protocol."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from single_file import write_single_file

import memkern
from memkern import audit, demo
from memkern.audit import PROTOCOLS, Model, Protocol
from memkern.audit.models import opened
from memkern.cli import main

CAPTION = demo.memorized()[0][0]
ONE = {"policies": ["zero-pad:1"], "seeds": [0], "steps": 2, "quiet": True}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(CAPTION + "\n")
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The embedded model as one file."""
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    write_single_file(demo.load(), path)
    return path


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of the embedded model's UNet, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("lora")
    pipe = demo.load()
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_k", "to_v"]))
    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    (file,) = folder.glob("*.safetensors")
    return file


def images(out):
    return {path.parent.name: np.asarray(Image.open(path), int) for path in out.rglob("images/*/*.png")}


def settings(out):
    return json.loads((out / "manifest.json").read_text())["settings"]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The image that every way to load the embedded model has to give."""
    out = tmp_path_factory.mktemp("embedded")
    audit.run(out=out, limit=1, **ONE)
    return images(out)


def test_a_folder(embedded, prompts, tmp_path):
    audit.run(out=tmp_path / "out", model=demo.embedded.MODEL, prompts=prompts, **ONE)
    found = images(tmp_path / "out")
    # The files of the text encoder are in half precision, which transformers keeps.
    assert all(np.abs(found[name] - embedded[name]).max() <= 2 for name in embedded)


def test_g34_a_single_file(embedded, prompts, single, tmp_path, monkeypatch):
    """A file in A1111's layout, with the configuration in a folder: nothing is looked up."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = ["--model", single, "--config", demo.embedded.MODEL, "--prompts", prompts, "--policy", "zero-pad:1"]
    assert main(["audit", *map(str, given), "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    found = images(tmp_path / "out")
    assert all(np.array_equal(found[name], embedded[name]) for name in embedded)
    assert settings(tmp_path / "out")["config"] == str(demo.embedded.MODEL)


def test_a_single_file_that_is_no_checkpoint(lora, prompts, tmp_path):
    with pytest.raises(ValueError, match=r"has no UNet in A1111's layout .*; a LoRA goes with --lora"):
        audit.run(out=tmp_path / "out", model=str(lora), prompts=prompts, **ONE)


def test_loras_with_weights(embedded, lora, tmp_path):
    """Twice half a LoRA is the LoRA; weight 0 is none."""
    found = {}
    for name, given in (("one", [f"{lora}"]), ("halves", [f"{lora}:0.5", f"{lora}:0.5"]), ("none", [f"{lora}:0"])):
        audit.run(out=tmp_path / name, limit=1, loras=given, **ONE)
        found[name] = images(tmp_path / name)
        assert settings(tmp_path / name)["loras"] == given
    for method in ("none", "zero-pad_1"):
        assert np.abs(found["one"][method] - embedded[method]).max() > 5
        assert np.abs(found["one"][method] - found["halves"][method]).max() <= 1
        assert np.abs(found["none"][method] - embedded[method]).max() <= 1
    with pytest.raises(ValueError, match="other loras"):
        audit.run(out=tmp_path / "one", limit=1, loras=[f"{lora}:2"], **ONE)


def test_g34_a_loaded_pipeline(embedded, prompts, tmp_path):
    """It is audited as it is, and given back as it was."""
    pipe = demo.load()
    before = {name: getattr(pipe, name) for name in ("scheduler", "unet", "text_encoder", "tokenizer")}
    pipe.set_progress_bar_config(desc="mine")
    audit.run(out=tmp_path / "out", model=pipe, prompts=prompts, policies=[memkern.Policy.parse("zero-pad:1")], steps=2)
    found = images(tmp_path / "out")
    assert all(np.array_equal(found[name], embedded[name]) for name in embedded)
    assert all(getattr(pipe, name) is part for name, part in before.items())
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert not memkern.status(pipe).patched
    assert settings(tmp_path / "out")["model"].startswith("StableDiffusionPipeline from ")
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    with pytest.raises(ValueError, match="holds an audit with other model"):
        audit.run(out=tmp_path / "out", model=pipe, prompts=prompts, policies=[], steps=2, quiet=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype: the pipeline is torch.float32, not float16"),
        ({"loras": ["x.safetensors"]}, "lora: there is no file"),
        ({"config": "x"}, "config, loras: a loaded pipeline has its own"),
    ],
)
def test_a_loaded_pipeline_is_not_changed(prompts, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        audit.run(out=tmp_path / "out", model=demo.load(), prompts=prompts, **ONE, **options)


def test_a_pipeline_that_is_patched_already(prompts, tmp_path):
    pipe = demo.load()
    memkern.patch(pipe)
    with pytest.raises(ValueError, match=r"patched already, and an audit patches it itself; memkern.unpatch"):
        audit.run(out=tmp_path / "out", model=pipe, prompts=prompts, **ONE)


class Blackens(torch.nn.Module):
    """A safety checker that finds something in every image."""

    def forward(self, images, clip_input):
        raise AssertionError("an audit measures images, not black squares")


def test_the_safety_checker_is_off_meanwhile():
    pipe = demo.load()
    checker = Blackens()
    pipe.safety_checker = checker
    with opened(Model(pipe), Protocol()) as used:
        assert used is pipe
        assert pipe.safety_checker is None
    assert pipe.safety_checker is checker


def test_the_papers_protocol():
    made = PROTOCOLS["kim-no"]
    assert made.seeds == (0, 1, 10, 42, 100, 441, 515, 1000, 2025, 10000)
    assert (made.steps, made.guidance, made.scheduler, made.dtype) == (50, 7.5, "DDIMScheduler", "float32")
    assert made.generator_device == "pipeline"
    with opened(Model(), made) as pipe:
        assert type(pipe.scheduler) is DDIMScheduler
        assert pipe.unet.dtype is torch.float32


def test_every_part_of_a_protocol_is_an_option(tmp_path):
    """The image is that of a few lines with the same parts."""
    given = "--protocol kim-no --seeds 7 --steps 3 --guidance 2 --scheduler DPMSolverMultistep --dtype bfloat16"
    arguments = [*given.split(), "--generator-device", "cpu", "--device", "cpu", "--limit", "1", "--policy", "none"]
    assert main(["audit", *arguments, "--out", str(tmp_path)]) == 0
    pipe = demo.load().to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(7)
    expected = pipe(CAPTION, num_inference_steps=3, guidance_scale=2, generator=generator).images[0]
    assert np.array_equal(images(tmp_path)["none"], np.asarray(expected))
    found = settings(tmp_path)
    assert (found["seeds"], found["scheduler"], found["dtype"], found["device"]) == (
        [7], "DPMSolverMultistepScheduler", "bfloat16", "cpu",
    )  # fmt: skip


def test_batches(embedded, tmp_path):
    """A generator each: batches differ from single images by rounding alone, and cover an odd rest."""
    options = {"policies": ["zero-pad:1"], "seeds": [0, 1, 2], "limit": 1, "steps": 2, "quiet": True}
    audit.run(out=tmp_path / "one", **options)
    audit.run(out=tmp_path / "two", batch=2, **options)
    single, double = (
        {path.parent.name + path.name: np.asarray(Image.open(path), int) for path in (tmp_path / name).rglob("*_*.png")}
        for name in ("one", "two")
    )
    assert single.keys() == double.keys()
    assert all(np.abs(single[name] - double[name]).max() <= 1 for name in single)
    with (tmp_path / "two" / "results.csv").open(newline="") as lines:
        assert len(list(csv.DictReader(lines))) == 6

"""`memkern bench`: every number is there and follows from the rounds, and the user's pipeline is as it was.

No test asserts a time.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).with_name("pipelines")))

from families import sd_families, sdxl_families
from test_patching import image, snapshot

import memkern
from memkern.benchmark import Bench, run
from memkern.benchmark.calls import first_step
from memkern.benchmark.subject import Subject
from memkern.benchmark.turns import in_turn
from memkern.benchmark.twin import twin
from memkern.cli import main

POLICIES = ["swap-pad-zero-eot", "ren:1.25"]
FEW = {"rounds": 3, "quiet": True}


@pytest.fixture(params=["unpatched", "patched"])
def found(request, sd1):
    """A pipeline that was called before, and is patched or not."""
    if request.param == "patched":
        memkern.patch(sd1, "zero-pad:0.4")
    image(sd1)
    return sd1


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()


def tables(markdown):
    """The tables of a page, each as rows of cells; every row as long as its head."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", markdown, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])}, block
        assert all(re.fullmatch(r" (---|---:) ", cell) for cell in rows[1])
        found.append([[cell.strip() for cell in row] for row in (rows[0], *rows[2:])])
    return found


def check_times(times, unpatched):
    """Quartiles and ratios are those of the rounds."""
    assert all(value > 0 for value in times["rounds_ms"])
    quartiles = statistics.quantiles(times["rounds_ms"], n=4)
    assert list(times["ms"].values()) == pytest.approx(quartiles)
    if unpatched is None:
        assert times["ratio"] is None
    else:
        ratios = [own / other for own, other in zip(times["rounds_ms"], unpatched["rounds_ms"], strict=True)]
        assert list(times["ratio"].values()) == pytest.approx(statistics.quantiles(ratios, n=4))
        assert times["ratio"]["low"] <= times["ratio"]["median"] <= times["ratio"]["high"]


def check(document, policies, rounds=3):
    """A document of eager runs has every field."""
    assert set(document) == {"memkern_bench", "settings", "info", "measures", "runs", "notes"}
    unpatched, *runs = document["runs"]
    assert [one["policy"] for one in document["runs"]] == [None, *policies]
    for one in document["runs"]:
        assert one["compiled"] is False
        for name in ("step", "encode", "host"):
            assert len(one[name]["rounds_ms"]) == rounds
            check_times(one[name], None if one is unpatched else unpatched[name])
        assert one["peak_bytes"] > 0
    assert (unpatched["kept_bytes"], unpatched["layers"]) == (0, {})
    for one in runs:
        assert one["kept_bytes"] > 0
        assert one["layers"]
        assert all(layer["choice"] for layer in one["layers"].values())
        assert any(layer.get("path") in ("former", "projected", "absorbed") for layer in one["layers"].values())


def test_every_field_is_there_and_the_pipeline_is_as_it_was(found, tmp_path):
    before, states, status = snapshot(found), random_states(), memkern.status(found)
    result = memkern.bench(found, POLICIES, out=tmp_path, **FEW)
    assert snapshot(found) == before
    assert random_states() == states
    assert memkern.status(found) == status
    assert isinstance(result, Bench)
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document == json.loads(json.dumps(result.document()))
    check(document, POLICIES)
    settings = document["settings"]
    assert settings["latents"] == [2, 4, 8, 8]
    assert settings["context"] == [2, 77, 32]
    assert (settings["pipeline"], settings["dtype"], settings["rounds"]) == ("StableDiffusionPipeline", "float32", 3)
    assert settings["threads"] == torch.get_num_threads()
    assert settings["device"].startswith("cpu, ")
    assert {"memkern", "torch", "diffusers"} <= document["info"]["versions"].keys()
    for path in result.files:
        assert path.stat().st_size
    assert [path.name for path in result.files] == ["bench.md", "bench.json", "bench.png"]


def test_the_page_and_the_table_say_the_same(sd1, tmp_path):
    result = memkern.bench(sd1, POLICIES, out=tmp_path, **FEW)
    page = (tmp_path / "bench.md").read_text()
    first, settings, layers, installation = tables(page)
    assert tables(str(result))[0] == first
    assert [row[0] for row in first] == ["pipeline", "unpatched", *POLICIES]
    assert len(first[0]) == 9
    for row in first[2:]:
        assert re.fullmatch(r"\d+\.\d{3} \(\d+\.\d{3}–\d+\.\d{3}\)", row[2])
    assert {row[0] for row in settings} >= {"pipeline", "dtype", "device", "threads", "latents", "prompt", "rounds"}
    assert {row[0] for row in layers[1:]} == set(POLICIES)
    assert {row[0] for row in installation} >= {"memkern", "torch", "diffusers", "backend torch"}
    assert "![ratios](bench.png)" in page


def test_what_is_measured_is_what_the_pipeline_computes(sd1):
    """The step of an unpatched copy is the pipeline's own first step, on the same weights."""
    copied = twin(sd1)
    call = {"num_inference_steps": 2, "output_type": "latent"}
    own = first_step(copied, lambda: copied("a cat", generator=torch.manual_seed(0), **call))
    steps = []
    handle = sd1.unet.register_forward_hook(lambda module, args, output: steps.append(output[0]))
    sd1("a cat", generator=torch.manual_seed(0), **call)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(own.sent(copied.unet)[0], steps[0])
    weights = {id(part) for part in sd1.unet.parameters()}
    assert {id(part) for part in copied.unet.parameters()} == weights
    assert len(own.sample) == 2
    assert torch.equal(own.sample[0], own.sample[1])


def test_all_start_from_the_same_latents_and_a_users_generator_stays(sd1):
    generator = torch.Generator("cpu").manual_seed(3)
    before, given = generator.get_state(), {"prompt": "a cat", "generator": [generator], "output_type": "latent"}
    subjects = [Subject(sd1, None), Subject(sd1, memkern.Policy.parse("zero-pad:0.7"))]
    for subject in subjects:
        with torch.no_grad(), subject.asked(given):
            pass
    first, second = (subject.given for subject in subjects)
    assert torch.equal(first.sample, second.sample)
    assert not torch.equal(first.context, second.context)
    assert torch.equal(generator.get_state(), before)


def test_a_copy_of_a_patched_pipeline_has_nothing_of_memkern(sd1):
    before = image(twin(sd1))
    memkern.patch(sd1)
    copied = twin(sd1)
    assert not memkern.status(copied).patched
    hooks = [hook for part in copied.unet.modules() for hook in (*part._forward_pre_hooks, *part._forward_hooks)]
    assert hooks == []
    assert np.array_equal(image(copied), before)
    with memkern.probe(sd1):
        assert not any(part._forward_pre_hooks for part in twin(sd1).unet.modules())


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [Interrupted, RuntimeError])
@pytest.mark.parametrize("after", [0, 4, 20, 40, 60])
def test_an_interrupted_run_leaves_the_pipeline_as_it_was(found, tmp_path, monkeypatch, error, after):
    """Interrupted at the first call, in encode_prompt, in steps, in calls for the host's time."""
    before, states, status, rounds = snapshot(found), random_states(), memkern.status(found), []
    done = run.tqdm.update

    def update(bar, *args):
        rounds.append(None)
        if len(rounds) > after:
            raise error
        return done(bar, *args)

    monkeypatch.setattr(run.tqdm, "update", update)
    with pytest.raises(error):
        memkern.bench(found, POLICIES, rounds=4)
    assert snapshot(found) == before
    assert random_states() == states
    assert memkern.status(found) == status
    monkeypatch.undo()
    assert np.isfinite(image(found)).all()


FAMILIES = {
    "StableDiffusionInstructPix2PixPipeline": 3,
    "StableDiffusionControlNetPipeline": 2,
    "StableDiffusionPAGPipeline": 3,
    "StableDiffusionInpaintPipeline": 2,
    "AnimateDiffPipeline": 2,
    "StableDiffusionXLPipeline": 2,
    "StableDiffusionXLPipeline, Turbo": 1,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_pipelines_of_other_families(tokenizers, name):
    family = (sd_families(tokenizers) | sdxl_families(tokenizers))[name]()
    before = snapshot(family.pipe)
    result = memkern.bench(family.pipe, ["zero-pad:0.7"], inputs=family.options, **FEW)
    assert snapshot(family.pipe) == before
    assert result.settings["latents"][0] == FAMILIES[name]
    _, patched = result.runs
    assert patched.layers
    assert (patched.host is None) == ("ControlNet" in name)
    assert "–" in str(result)


def test_compiled_unets_are_measured_beside_eager_ones(sd1, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    before, limit = snapshot(sd1), torch._dynamo.config.recompile_limit
    result = memkern.bench(sd1, ["zero-pad:0.7"], compile=True, **FEW)
    assert [(one.policy, one.compiled) for one in result.runs] == [
        (None, False), ("zero-pad:0.7", False), (None, True), ("zero-pad:0.7", True),
    ]  # fmt: skip
    assert [one.encode is None for one in result.runs] == [False, False, True, True]
    assert result.runs[3].layers.keys() == result.runs[1].layers.keys()
    assert result.runs[3].step.unpatched == result.runs[2].step.rounds
    assert snapshot(sd1) == before
    assert torch._dynamo.config.recompile_limit == limit
    sd1.unet = torch.compile(sd1.unet)
    result = memkern.bench(sd1, ["zero-pad:0.7"], **FEW)
    assert [one.compiled for one in result.runs] == [False, False, True, True]
    assert "the pipeline's UNet is compiled" in str(result)


def test_a_batch_a_size_and_a_long_prompt(sd1):
    long = memkern.bench(sd1, "zero-pad:0.7", batch=2, size=(32, 16), prompt="cat " * 20, **FEW)
    assert long.settings["latents"] == [4, 4, 16, 8]
    short = memkern.bench(sd1, "zero-pad:0.7", prompt="cat", **FEW)
    assert {layer["keys"][0] for layer in short.runs[1].layers.values() if "keys" in layer} == {77}
    assert max(layer["keys"][1] for layer in short.runs[1].layers.values() if "keys" in layer) < 30
    assert max(layer["keys"][2] for layer in long.runs[1].layers.values() if "keys" in layer) > 30


def test_without_matplotlib_that_is_said(sd1, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = memkern.bench(sd1, ["none"], out=tmp_path, **FEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]
    for text in (str(result), (tmp_path / "bench.md").read_text()):
        assert "no plot: it needs matplotlib, pip install memkern[plot]" in text


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"rounds": 2}, ValueError, "rounds: expected at least 3, got 2"),
        ({"rounds": 2.5}, TypeError, "rounds: expected a whole number, got 2.5"),
        ({"batch": 0}, ValueError, "batch: expected at least 1, got 0"),
        ({"batch": True}, TypeError, "batch: expected a whole number, got True"),
        ({"size": 512}, TypeError, r"size: expected height and width such as \(512, 512\), got 512"),
        ({"size": (16, 17)}, ValueError, "size: expected multiples of 2, got 16x17"),
        ({"prompt": 3}, TypeError, "prompt: expected text, got 3"),
        ({"inputs": {"imaeg": 1}}, ValueError, "inputs: StableDiffusionPipeline takes no 'imaeg'"),
        ({"inputs": {"prompt": "a"}}, ValueError, "inputs: 'prompt' is a separate argument"),
        ({"inputs": {"guidance_scale": "much"}}, ValueError, "inputs: this StableDiffusionPipeline cannot be called"),
        ({"policies": []}, ValueError, "policies: expected at least one, such as 'zero-pad:0.7', got none"),
        ({"policies": ["zero-pads"]}, ValueError, "policies: policy: unknown preset 'zero-pads'; the presets are"),
        ({"policies": [3]}, ValueError, "policies: policy: expected a Policy or a preset's name, got int"),
    ],
)
def test_what_is_wrong_is_named(sd1, given, error, message):
    before = snapshot(sd1)
    with pytest.raises(error, match=message):
        memkern.bench(sd1, **{"quiet": True, **given})
    assert snapshot(sd1) == before


def test_pipelines_that_cannot_be_measured(tokenizers, sd1):
    with pytest.raises(TypeError, match="pipe: expected a diffusers pipeline, got int"):
        memkern.bench(3)
    other = sdxl_families(tokenizers)["StableDiffusion3Pipeline"]().pipe
    with pytest.raises(ValueError, match="expected a pipeline with a UNet.*this StableDiffusion3Pipeline has a SD3"):
        memkern.bench(other)
    variation = sd_families(tokenizers)["StableDiffusionImg2ImgPipeline"]().pipe
    with pytest.raises(ValueError, match="size: StableDiffusionImg2ImgPipeline takes it from its image, got 16x16"):
        memkern.bench(variation, size=(16, 16))
    with pytest.raises(ValueError, match="inputs: this StableDiffusionImg2ImgPipeline cannot be called with"):
        memkern.bench(variation, quiet=True)
    sd1.encode_prompt = functools.wraps(sd1.encode_prompt)(lambda *args, **named: None)
    with pytest.raises(ValueError, match="pipe: its encode_prompt was replaced by <function"):
        memkern.bench(sd1, quiet=True)


def test_an_offloaded_pipeline_is_refused(sd1):
    sd1.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="pipe: its (text_encoder|unet|vae) is offloaded"):
        memkern.bench(sd1, quiet=True)


def test_turns():
    order, done = [], []
    measures = [lambda name=name: order.append(name) or len(order) for name in "abc"]
    assert in_turn(measures, 2, warm_up=1, done=lambda: done.append(1)) == [[6, 7], [5, 8], [4, 9]]
    assert "".join(order) == "abccbaabc"
    assert len(done) == 9


def test_bench_is_imported_when_it_is_asked_for():
    source = (
        "import sys, memkern; assert 'memkern.benchmark' not in sys.modules; first = memkern.bench; "
        "import memkern.benchmark.run; assert callable(first) and memkern.bench is first; "
        "assert 'bench' in dir(memkern)"
    )
    subprocess.run([sys.executable, "-c", source], check=True)
    with pytest.raises(AttributeError, match="module 'memkern' has no attribute 'bunch'"):
        memkern.bunch  # noqa: B018


def test_the_command_on_the_embedded_model(tmp_path, capsys):
    arguments = ["--policy", "zero-pad:0.7", "--rounds", "3", "--dtype", "bfloat16", "--device", "cpu"]
    assert main(["bench", *arguments, "--size", "32x32", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert [row[0] for row in tables(shown.out)[0]] == ["pipeline", "unpatched", "zero-pad:0.7"]
    for name in ("bench.md", "bench.json", "bench.png"):
        assert str(tmp_path / name) in shown.out
    assert "call/s" in shown.err
    document = json.loads((tmp_path / "bench.json").read_text())
    check(document, ["zero-pad:0.7"])
    assert document["settings"]["dtype"] == "bfloat16"
    assert document["settings"]["size"] == [32, 32]
    assert str(Path(memkern.__file__).parent) not in json.dumps(document["settings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "512"], "expected a width and a height such as 512x768, got '512'"),
        (["--policy", "zero-pads"], "unknown preset 'zero-pads'; the presets are "),
    ],
)
def test_the_command_refuses_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "memkern bench: rounds: expected at least 3, got 1"),
        (["--dtype", "int8"], "memkern bench: dtype: expected float32, float16, bfloat16, got 'int8'"),
        (["--device", "tpu"], "memkern bench: device: expected a device such as cpu"),
        (["--model", "nowhere.ckpt"], "memkern bench: model: nowhere.ckpt: a .ckpt file can run code"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, capsys, tmp_path):
    assert main(["bench", *arguments, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err

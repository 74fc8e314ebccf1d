"""Choices by what was timed: once for a shape, alike in every process, and without a trace in the image."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)

import memkern
from memkern import timings
from memkern.cli import main
from memkern.ops import backends
from memkern.pipelines.attention import clock, measured
from memkern.pipelines.attention.clock import Clock
from memkern.pipelines.attention.layer import Layer
from memkern.pipelines.attention.measured import Chooser, Shape, calls, rounded
from memkern.pipelines.attention.sources import unedited
from memkern.testing import SiteHolder, tiny_pipeline, train_tokenizer
from memkern.timings import Table, Times

pytestmark = pytest.mark.skipif(bool(backends.installed("cpp")), reason="needs the compiled CPU library")
CPU = torch.device("cpu")


@pytest.fixture
def told(monkeypatch, caplog):
    """A log that is empty, as in a new process."""
    monkeypatch.setattr(backends, "_logged", set())
    caplog.set_level(logging.WARNING, "memkern")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def timed(monkeypatch):
    """A timing that takes a second and gives the test's values; it returns the paths that were asked for."""
    asked = []

    def compare(self, found):
        asked.append(list(found))
        self.spent = 1.0
        return {name: timed.milliseconds[name] for name in found}

    def timed():
        return asked

    timed.milliseconds = {"former": 3.0, "projected": 2.0, "absorbed": 1.0}
    monkeypatch.setattr(Clock, "compare", compare)
    return timed


def attention(processor=None, width=32):
    torch.manual_seed(0)
    made = Attention(width, 24, heads=4, dim_head=width // 4, processor=processor or AttnProcessor2_0()).eval()
    return made.requires_grad_(False)


@torch.no_grad()
def choice(chooser, queries=16, attn=None):
    """The choice of a layer with `chooser`."""
    attn = attn or attention()
    holder = SiteHolder(torch.nn.ModuleDict({"attn2": attn}))
    holder.chooser = chooser
    x, context = torch.ones(2, queries, 32), torch.ones(2, 77, 24)
    context[:, 1::2] = 2
    for _ in range(2):
        attn(x, encoder_hidden_states=context)
    return holder.session.layers["attn2"]


def files(folder):
    return sorted(folder.glob("*.json"))


@pytest.mark.parametrize(
    ("milliseconds", "path"),
    [
        ((3.0, 2.0, 1.0), "absorbed"),
        ((3.0, 1.0, 2.0), "projected"),
        ((1.0, 2.0, 3.0), "former"),
        ((1.0, 0.98, 0.99), "former"),  # not by a margin
    ],
)
def test_the_fastest_is_taken(tmp_path, timed, milliseconds, path):
    timed.milliseconds = dict(zip(timings.PATHS, milliseconds, strict=True))
    made = choice(Chooser(True, 2, tmp_path))
    assert made.path == path
    assert f"measured in ms: former {milliseconds[0]:.2f}, projected" in str(made)


def test_a_shape_is_timed_once_and_another_process_reads(tmp_path, timed):
    first = choice(Chooser(True, 9, tmp_path))
    assert choice(Chooser(True, 9, tmp_path)) == first
    assert len(timed()) == 1
    choice(Chooser(True, 9, tmp_path), queries=24)
    assert len(timed()) == 2
    timed.milliseconds = dict.fromkeys(timings.PATHS, 1.0)
    timings.table.cache_clear(), timings._table.cache_clear()
    read = choice(Chooser(True, 9, tmp_path))
    assert len(timed()) == 2
    assert read.path == first.path
    assert "from the table, measured in ms: former 3.00" in str(read)
    assert read.times.milliseconds == first.times.milliseconds


def test_the_budget_is_a_pipelines_and_what_is_estimated_stays(tmp_path, timed):
    """A later timing, with time left, would make another image."""
    chooser = Chooser(True, 2, tmp_path)
    made = [choice(chooser, queries) for queries in (8, 16, 24)]
    assert [one.times.measured for one in made] == [True, True, False]
    assert chooser.left == 0
    assert "estimates in ms: former" in str(made[2])
    assert choice(Chooser(True, 2, tmp_path), 24) == made[2]
    timings.table.cache_clear(), timings._table.cache_clear()
    assert "from the table, estimates in ms: former" in str(choice(Chooser(True, 2, tmp_path), 24))
    assert choice(Chooser(True, 2, tmp_path, again=True), 24).times.measured
    timings.table.cache_clear(), timings._table.cache_clear()
    assert choice(Chooser(True, 2, tmp_path), 24).times.measured


def test_time_that_runs_out_midway(monkeypatch):
    """By then all paths must have been timed twice."""
    seconds = iter(range(1000))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(seconds))
    given = {"former": lambda: None, "projected": lambda: None}
    assert Clock(CPU, 1.5).compare(given) is None  # while it warms up
    assert Clock(CPU, 6).compare(given) is None
    enough = Clock(CPU, 14)
    assert enough.compare(given) == {"former": 1000.0, "projected": 1000.0}
    assert 14 <= enough.spent < 18


def test_a_processor_that_others_have(monkeypatch, told):
    switches = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(clock, "_switches", lambda: next(switches))
    for _ in range(2):
        assert Clock(CPU, 9).compare({"former": lambda: None}) is None
    assert [message for message in told() if "busy" in message] == [
        "memkern: the processor is busy: paths of layers are estimated, until `memkern tune` times them"
    ]


PROCESSORS = [
    AttnProcessor2_0,
    AttnProcessor,
    lambda: SlicedAttnProcessor(2),
    FusedAttnProcessor2_0,
    lambda: IPAdapterAttnProcessor2_0(32, 24),
]


@torch.no_grad()
@pytest.mark.parametrize("make", PROCESSORS, ids=["2_0", "eager", "sliced", "fused", "images"])
@pytest.mark.parametrize("projections", ["read", "called", "anew"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_timed_is_one_function_by_every_path(make, projections, dtype):
    """Timing leaves the layer and all states of random numbers as they are."""
    attn = attention(make())
    if make is FusedAttnProcessor2_0:
        attn.fuse_projections()
    before = {name: value.clone() for name, value in attn.state_dict().items()}
    modules, state = dict(attn.named_modules()), torch.get_rng_state()
    layer, context = Layer(attn, attn.processor), torch.rand(2, 77, 24)
    context[1, 13:] = 0
    shape = Shape.of(layer, torch.empty(2, 16, 32, dtype=dtype), unedited(context), 24, "auto", projections)
    assert shape.keys == ((16, 1), (77, 1))
    state = torch.get_rng_state()
    found = calls(layer, shape, CPU, list(timings.PATHS))
    made = {path: call() for path, call in found.items()}
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(attn.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in attn.state_dict().items())
    assert made["former"].shape == (2, 16, 32)
    # The former attends to all 77 rows, the others to what a sequence has left: alike where that is all.
    for path in ("projected", "absorbed"):
        torch.testing.assert_close(made[path][1], made["former"][1], atol=2e-2, rtol=2e-2)
        assert not torch.allclose(made[path][0], made["former"][0], atol=1e-6)
    torch.testing.assert_close(made["projected"], made["absorbed"], atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_under_autocast_products_are_in_its_dtype():
    layer = Layer(attention(), AttnProcessor2_0())
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(1, 16, 32)
        shape = Shape.of(layer, x, unedited(torch.rand(1, 77, 24)), 24, "auto", "read")
        made = [call() for call in calls(layer, shape, CPU, ["former", "projected", "absorbed"]).values()]
    assert "float32 as bfloat16" in str(shape)
    assert all(one.isfinite().all() for one in made)


def test_shapes_that_are_told_apart():
    attn, context = attention(), unedited(torch.rand(2, 77, 24))

    def key(queries=16, dtype=torch.float32, processor=None, projections="read", backend="auto"):
        layer = Layer(attn, processor or AttnProcessor2_0())
        return str(Shape.of(layer, torch.empty(2, queries, 32, dtype=dtype), context, 24, backend, projections))

    keys = [
        key(),
        key(queries=24),
        key(dtype=torch.float16),
        key(processor=AttnProcessor()),
        key(processor=SlicedAttnProcessor(2)),
        key(processor=SlicedAttnProcessor(4)),
        key(projections="called"),
        key(backend="cpp"),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys.append(key())
    torch.set_num_threads(threads)
    assert len({*keys}) == len(keys)
    assert key() == keys[0]
    readers = [(count, 1) for count in (1, 8, 9, 70, 76, 77, 0)]
    assert rounded(readers, 77) == tuple((count, 1) for count in (8, 8, 8, 16, 72, 77, 77))


def test_modes_that_count_or_make_up_what_is_computed(tmp_path, timed):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        made = choice(Chooser(True, 2, tmp_path))
    assert not made.times.measured
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not choice(Chooser(True, 2, tmp_path)).times.measured
    handle.remove()
    assert not timed()
    assert not files(tmp_path)
    assert choice(Chooser(True, 2, tmp_path)).times.measured


def test_timing_that_fails_leaves_the_estimate(tmp_path, monkeypatch, told):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(measured, "calls", fail)
    for _ in range(2):
        assert not choice(Chooser(True, 2, tmp_path)).times.measured
    assert [message for message in told() if "OutOfMemoryError: no room" in message] == told()
    assert len(told()) == 1


DAMAGED = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "bytes": lambda text: "\udcff\udcfe",
    "another card": lambda text: text.replace('"device": "', '"device": "another than '),
    "another version": lambda text: text.replace(f'"memkern": "{memkern.__version__}"', '"memkern": "0.0.1"'),
    "a list": lambda text: "[1, 2]",
    "no times": lambda text: json.dumps({"of": json.loads(text)["of"]}),
    "words for numbers": lambda text: text.replace("3.0", '"three"'),
    "below zero": lambda text: text.replace("3.0", "-3.0"),
    "a path is missing": lambda text: text.replace('"former"', '"fastest"'),
    "no numbers": lambda text: text.replace("3.0", "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_foreign_table_is_ignored_and_logged_once(tmp_path, timed, told, damage):
    choice(Chooser(True, 9, tmp_path))
    (path,) = files(tmp_path)
    whole = path.read_text()
    path.write_text(DAMAGED[damage](whole), errors="surrogateescape")
    timings.table.cache_clear(), timings._table.cache_clear()
    assert choice(Chooser(True, 9, tmp_path)).times == Times(timed.milliseconds, measured=True)
    choice(Chooser(True, 9, tmp_path), queries=24)
    assert len(told()) == 1
    assert f"{path} is ignored, as it is no table of this device and version: " in told()[0]
    # Times found since are in an undamaged one.
    assert len(json.loads(path.read_text())["times"]) == 2


def test_two_versions_or_cards_have_tables_of_their_own(tmp_path, timed, monkeypatch):
    choice(Chooser(True, 9, tmp_path))
    monkeypatch.setattr(timings, "__version__", "9.9")
    timings.table.cache_clear()
    choice(Chooser(True, 9, tmp_path))
    timings.table.cache_clear()
    assert len(files(tmp_path)) == 2
    assert len(timed()) == 2


@pytest.mark.parametrize("folder", ["/dev/null/x", "a file"])
def test_a_folder_that_cannot_be_written_is_ignored_and_logged_once(tmp_path, timed, told, folder):
    """The folder cannot be written by root either."""
    if folder == "a file":
        folder = tmp_path / "file"
        folder.write_text("")
    chooser = Chooser(True, 9, timings.Path(folder))
    assert choice(chooser).times.measured
    assert choice(chooser).times.measured
    choice(chooser, queries=24)
    assert len(timed()) == 2
    assert len(told()) == 1
    assert "no choice of paths can be kept in" in told()[0]
    assert told()[0].endswith("; another process may choose differently")


def test_nothing_is_kept_where_that_is_off(tmp_path, timed, monkeypatch):
    monkeypatch.setenv("MEMKERN_CHOICE", "measured")
    monkeypatch.setenv("MEMKERN_CACHE", "off")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choice(Chooser.from_environment()).times.measured
    assert not [*tmp_path.rglob("*")]


def test_the_cache_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMKERN_CACHE", str(tmp_path / "own"))
    assert timings.cache_folder() == tmp_path / "own"
    monkeypatch.setenv("MEMKERN_CACHE", "~/own")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert timings.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("MEMKERN_CACHE")
    assert timings.cache_folder().name == "memkern"


def test_estimated_looks_nothing_up(tmp_path, timed, monkeypatch):
    monkeypatch.setenv("MEMKERN_CHOICE", "estimated")
    monkeypatch.setenv("MEMKERN_CACHE", str(tmp_path))
    assert not choice(Chooser.from_environment()).times.measured
    assert not timed()
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("MEMKERN_CHOICE", "fastest", "measured or estimated"),
        ("MEMKERN_CHOICE", "", "measured or estimated"),
        ("MEMKERN_CHOICE_SECONDS", "soon", "a number of seconds such as 2"),
        ("MEMKERN_CHOICE_SECONDS", "-1", "a number of seconds such as 2"),
        ("MEMKERN_CHOICE_SECONDS", "nan", "a number of seconds such as 2"),
        ("MEMKERN_CACHE", "", "off or a folder"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_patched(sd1, monkeypatch, name, value, right):
    monkeypatch.setenv(name, value)
    own = type(sd1)
    with pytest.raises(ValueError) as raised:
        memkern.patch(sd1)
    assert str(raised.value) == f"{name}: expected {right}, got {value!r}"
    assert type(sd1) is own
    assert not memkern.status(sd1).patched


def test_a_pipeline_and_its_copies_share_a_budget(sd1, monkeypatch):
    import copy

    monkeypatch.setenv("MEMKERN_CHOICE_SECONDS", "7")
    patch = memkern.patch(sd1)
    assert patch.family.chooser.left == 7
    assert memkern.patch(copy.copy(sd1)).family.chooser is patch.family.chooser


WRITER = """
import sys, time
from pathlib import Path
from memkern.timings import Table, Times
path, name, go = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
table = Table(path, {"device": "any"})
Path(f"{go}.{name}").touch()
while not go.exists():
    time.sleep(0.001)
for number in range(40):
    table.add(f"{name} {number}", Times({"former": 1.0, "projected": 2.0}, True))
    stands = table.add(f"shared {number}", Times({"former": 1.0, "projected": float(name)}, True))
    print(stands.milliseconds["projected"])
"""


def test_two_processes_that_write_at_once_lose_nothing_and_agree(tmp_path):
    path, go = tmp_path / "table.json", tmp_path / "go"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(name), str(go)], stdout=subprocess.PIPE, text=True
        )
        for name in (1, 2)
    ]
    while len([*tmp_path.glob("go.*")]) < 2:
        assert all(process.poll() is None for process in started)
    go.touch()
    said = [process.communicate()[0].split() for process in started]
    assert said[0] == said[1]
    assert len(said[0]) == 40
    table = Table(path, {"device": "any"})
    for number in range(40):
        assert table.find(f"1 {number}") == table.find(f"2 {number}")
        assert table.find(f"1 {number}").measured
        assert table.find(f"shared {number}").milliseconds["projected"] == float(said[0][number])
    assert not [*tmp_path.glob("*.part")]


IMAGE = """
import hashlib, torch, memkern
torch.set_num_threads(1)
from memkern.testing import tiny_pipeline, train_tokenizer
pipe = tiny_pipeline(train_tokenizer(["a cat"]))
memkern.patch(pipe, "zero-pad:0.7")
image = pipe("a cat", num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(0)).images
print(hashlib.sha256(image.numpy().tobytes()).hexdigest())
for line in str(memkern.status(pipe)).splitlines():
    if "attn2: " in line:
        print(line)
"""


def image(folder):
    """An image's digest, and what its layers did, in a process of its own."""
    environment = {**timings.os.environ, "MEMKERN_CHOICE": "measured", "MEMKERN_CACHE": str(folder)}
    done = subprocess.run([sys.executable, "-c", IMAGE], capture_output=True, text=True, env=environment, check=True)
    digest, *layers = done.stdout.split("\n")
    return digest, [line.partition("attn2: ")[2] for line in layers if line]


def test_a_later_process_makes_the_same_choices_and_the_same_image(tmp_path):
    first, layers = image(tmp_path)
    (path,) = files(tmp_path)
    again, read = image(tmp_path)
    assert read
    assert first == again
    assert [line.split()[0] for line in layers] == [line.split()[0] for line in read]
    assert all("from the table, " in line for line in read)
    assert not any("from the table, " in line for line in layers)
    # The table decides, whatever timing would find now.
    kept = json.loads(path.read_text())
    for chosen in ("former", "projected", "absorbed"):
        for entry in kept["times"].values():
            entry["ms"] = {name: 1.0 if name == chosen else 9.0 for name in timings.PATHS}
        path.write_text(json.dumps(kept))
        assert {line.split()[0] for line in image(tmp_path)[1]} == {chosen}


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

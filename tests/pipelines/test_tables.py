"""Tables of timed paths: a later process makes the same choices, and one that cannot be read or written is no harm."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from measuring import choice, files, forget

import memkern
from memkern import timings
from memkern.ops import backends
from memkern.pipelines.attention.measured import Chooser
from memkern.timings import Table, Times

pytestmark = pytest.mark.skipif(bool(backends.installed("cpp")), reason="needs the compiled CPU library")


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
def test_a_damaged_or_foreign_table_is_ignored_and_logged_once(tmp_path, timed, logged, damage):
    choice(Chooser(True, 9, tmp_path))
    (path,) = files(tmp_path)
    whole = path.read_text()
    path.write_text(DAMAGED[damage](whole), errors="surrogateescape")
    forget()
    assert choice(Chooser(True, 9, tmp_path)).times == Times(timed.milliseconds, measured=True)
    choice(Chooser(True, 9, tmp_path), queries=24)
    assert len(logged()) == 1
    assert f"{path} is ignored, as it is no table of this device and version: " in logged()[0]
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
def test_a_folder_that_cannot_be_written_is_ignored_and_logged_once(tmp_path, timed, logged, folder):
    """The folder cannot be written by root either."""
    if folder == "a file":
        folder = tmp_path / "file"
        folder.write_text("")
    chooser = Chooser(True, 9, timings.Path(folder))
    assert choice(chooser).times.measured
    assert choice(chooser).times.measured
    choice(chooser, queries=24)
    assert len(timed()) == 2
    assert len(logged()) == 1
    assert "no choice of paths can be kept in" in logged()[0]
    assert logged()[0].endswith("; another process may choose differently")


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
    other = "former" if any(line.split()[0] != "former" for line in read) else "absorbed"
    for entry in kept["times"].values():
        entry["ms"] = {name: 1.0 if name == other else 9.0 for name in timings.PATHS}
    path.write_text(json.dumps(kept))
    assert {line.split()[0] for line in image(tmp_path)[1]} == {other}

"""Compiled libraries that are damaged, of another version, or of a second copy are skipped or refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from libraries import python, write_record

import memkern
from memkern.ops import backends

ROOT = Path(__file__).resolve().parents[1]

needs_library = pytest.mark.skipif(bool(backends.installed("cpp")), reason="needs the compiled CPU library")


def test_a_library_that_does_not_load_is_named_and_bypassed(tmp_path):
    package = tmp_path / "memkern"
    shutil.copytree(ROOT / "memkern", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.abi3.so").write_bytes(b"not a library")
    write_record(package)
    result = python("import memkern; print(memkern.info())", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "backend cpp    the compiled CPU library does not load with torch" in result.stdout


def test_a_library_that_misses_a_symbol_is_named_and_bypassed(tmp_path):
    """A library that needs a newer torch is such a one."""
    package = tmp_path / "memkern"
    shutil.copytree(ROOT / "memkern", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    source = tmp_path / "newer.c"
    source.write_text(
        "extern int of_a_newer_torch(void); void* PyInit__C(void) { return (void*)(long)of_a_newer_torch(); }"
    )
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", package / "_C.abi3.so"], check=True)
    write_record(package)
    result = python("import memkern; print(memkern.info())", tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(
        "backend cpp    the compiled CPU library does not load with torch .*: of_a_newer_torch", result.stdout
    )


@pytest.fixture
def package(tmp_path):
    """A copy of this installation, which `python(code, tmp_path)` imports."""
    copy = tmp_path / "memkern"
    shutil.copytree(ROOT / "memkern", copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def cut(path, share=0.5):
    """Leave the first part of a file."""
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))


def seldom(*values):
    """A case that is like another one."""
    return pytest.param(*values, marks=pytest.mark.slow)


@needs_library
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda package: cut(package / "_C.abi3.so"), r"it has \d+ bytes, \d+ were built: install again"),
        seldom(lambda package: cut(package / "_C.abi3.so", 0), r"it has 0 bytes, \d+ were built: install again"),
        (lambda package: flip(package / "_C.abi3.so"), "its content is not what was built: install again"),
        (lambda package: cut(package / "build.json"), r"build.json cannot be read \(.*\): install again"),
        seldom(lambda package: cut(package / "build.json", 0), r"build.json cannot be read \(.*\): install again"),
        (lambda package: (package / "build.json").write_text("[]"), "build.json is not what the build writes"),
        (lambda package: (package / "build.json").unlink(), "there is no build.json: not installed by its setup.py"),
        (lambda package: write_record(package, libraries={}), "build.json does not have it: install again"),
    ],
    ids=["cut", "empty", "changed", "record cut", "record empty", "record of another kind", "no record", "not in it"],
)
def test_g20_what_is_not_whole_is_passed_by(package, tmp_path, change, why):
    """The library is not mapped into memory, where a cut one ends the process; the operators run without it."""
    change(package)
    run = "import torch, memkern; print(memkern.ops.edit_embeds(torch.ones(1, 2, 3), None, "
    run += "torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2)).sum()); print(memkern.info())"
    result = python(run, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "tensor(6.)" in result.stdout
    (backend,) = re.findall("^backend cpp (.*)$", result.stdout, re.M)
    assert re.search(
        rf"the compiled CPU library does not load with torch {re.escape(torch.__version__)}: {why}", backend
    )
    assert "(built with torch " in backend or "(built with an unknown torch)" in backend
    (build,) = re.findall("^build (.*)$", result.stdout, re.M)
    assert "build.json" in build or "with the compiled CPU library, which is not in use (see backend cpp)" in build


def flip(path):
    """Change a byte in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@needs_library
def test_g20_the_build_writes_down_what_it_made():
    folder = Path(memkern.__file__).parent
    record = json.loads((folder / "build.json").read_text())
    assert set(record["libraries"]) == {path.name for path in folder.glob("_*.so")}
    assert record["libraries"]["_C.abi3.so"]["size"] == (folder / "_C.abi3.so").stat().st_size
    assert f"torch {record['torch']}" in memkern.info().build


SECOND = """
import sys, torch, memkern
from memkern.ops import cpu
given = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8), torch.zeros(1, 7)
before = memkern.ops.biased_attention(*given)
dump = torch._C._dispatch_dump("memkern_cpu::biased_attention"), torch._C._dispatch_dump("memkern::edit_embeds")
{forget}
sys.path.insert(0, {place!r})
try:
    {imported}
except ImportError as error:
    print("refused:", error)
assert torch.equal(memkern.ops.biased_attention(*given), before)
after = torch._C._dispatch_dump("memkern_cpu::biased_attention"), torch._C._dispatch_dump("memkern::edit_embeds")
assert after == dump, "nothing was registered over the first copy's"
"""
FORGET = "for name in [name for name in sys.modules if name.split('.')[0] == 'memkern']: del sys.modules[name]"


@pytest.mark.parametrize(
    ("forget", "imported", "where"),
    [(FORGET, "import memkern as second", ""), ("", "import vendored.memkern", "vendored")],
    ids=["forgotten", "vendored"],
)
def test_g21_a_second_copy_is_refused_before_it_registers_anything(tmp_path, forget, imported, where):
    copy = tmp_path / where / "memkern"
    shutil.copytree(ROOT / "memkern", copy, ignore=shutil.ignore_patterns("__pycache__"))
    result = python(SECOND.format(forget=forget, place=str(tmp_path), imported=imported), ROOT)
    assert result.returncode == 0, result.stderr
    (refused,) = re.findall("^refused: (.*)$", result.stdout, re.M)
    assert f"{copy} is a second copy in one process, where {ROOT / 'memkern'} was imported before" in refused


def test_g21_the_same_copy_twice_is_said_to_be_that():
    result = python(SECOND.format(forget=FORGET, place=str(ROOT), imported="import memkern as second"), ROOT)
    assert result.returncode == 0, result.stderr
    assert f"refused: memkern: {ROOT / 'memkern'} is imported a second time in one process" in result.stdout


def test_libraries_of_another_version_are_named_and_bypassed(tmp_path):
    """An update of the sources without a build: the library would serve operators that have changed since."""
    package = tmp_path / "memkern"
    shutil.copytree(ROOT / "memkern", package, ignore=shutil.ignore_patterns("__pycache__"))
    built = json.loads((package / "build.json").read_text())
    (package / "build.json").write_text(json.dumps(built | {"version": "0.0.9"}))
    (package / "_cuda.abi3.so").touch()
    result = python("import memkern; print(memkern.info())", tmp_path)
    assert result.returncode == 0, result.stderr
    for name, title in (("cpp ", "CPU"), ("cuda", "CUDA")):
        reason = (
            f"the compiled {title} library was built for memkern 0.0.9, this is {memkern.__version__}: install again"
        )
        assert f"backend {name}   {reason}" in result.stdout

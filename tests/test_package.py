"""The package: importing without its optional parts, how it is built, and what it says of itself."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from libraries import python

import memkern
from memkern.ops import backends

ROOT = Path(__file__).resolve().parents[1]
HAS_COMPILER = bool(shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++"))

BLOCKED = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("memkern._C", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def test_d15_import_is_silent_without_the_compiled_part_and_triton():
    result = python(BLOCKED + "import memkern; print(memkern.info())")
    assert result.returncode == 0, result.stderr
    assert "backend cpp    the compiled CPU library is not part of this installation" in result.stdout
    assert "backend torch  available" in result.stdout
    assert "memkern" not in result.stderr


def test_import_leaves_out_what_takes_seconds_until_it_is_used():
    """Operators, and the commands that need no pipeline, do without diffusers and transformers."""
    result = python("""
import sys, memkern
assert not {"diffusers", "transformers", "triton"} & sys.modules.keys()
assert set(memkern.__all__) <= set(dir(memkern))
for name in memkern.__all__:
    getattr(memkern, name)
from memkern import *
assert callable(patch) and callable(support) and callable(probe) and callable(status) and callable(bench)
""")
    assert result.returncode == 0, result.stderr


def test_the_fallback_is_told_once_and_a_named_backend_raises():
    result = python(
        BLOCKED
        + """
import torch, memkern
from memkern.testing import tiny_pipeline, train_tokenizer
pipe = tiny_pipeline(train_tokenizer(["a cat"]))
memkern.patch(pipe)
for _ in range(2):
    pipe("a cat", num_inference_steps=1, output_type="latent")
print(memkern.status(pipe))
try:
    memkern.patch(pipe, backend="cpp")
except ValueError as error:
    print(error)
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the operators run as plain torch: the compiled CPU library is not part") == 1
    assert "auto: torch on CPU, torch on CUDA (the compiled CPU library is not part" in result.stdout
    assert "backend 'cpp' cannot run: the compiled CPU library is not part of this installation" in result.stdout


def test_the_compiled_part_is_here_wherever_it_can_be():
    """A build's record is true: a library that was built loads, on this machine and this torch."""
    built = json.loads((Path(memkern.__file__).parent / "build.json").read_text())
    assert built["cpp"] == (not backends.installed("cpp"))
    assert built["cpp"] or not HAS_COMPILER or built["mode"] == "none", built["reason"]


@pytest.fixture
def tree(tmp_path):
    """A copy of what is needed to build the package; of the CPU library only its module, which compiles quickly."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("csrc", "memkern"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "build.json", "__pycache__"))
    for path in (source / "csrc/cpu").glob("*.cpp"):
        path.unlink()
    return source


def install(tree, mode, path=None):
    """pip-install the copy into a folder of its own; the process, and that folder."""
    command = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q", "-v", "--target"]
    return build(tree, mode, path, [*command, str(tree.parent / "made"), str(tree)])


def build(tree, mode, path=None, command=("setup.py", "-q", "build", "--build-lib", "../made")):
    """Build the copy by `setup.py`, as pip does, which starts it three times; the process, and the package's folder."""
    environment = {"TORCH_CUDA_ARCH_LIST": "8.0"} | os.environ | {"MEMKERN_BUILD": mode}
    environment |= {"PATH": path} if path else {}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, capture_output=True, text=True, env=environment, check=False
    )
    return done, tree.parent / "made/memkern"


@pytest.mark.parametrize(
    ("mode", "reason"), [("none", "MEMKERN_BUILD=none"), ("auto", "no C++ compiler on PATH at build time")]
)
def test_pure_python_builds(tree, tmp_path, mode, reason):
    done, package = install(tree, mode, path=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert json.loads((package / "build.json").read_text()) == {
        "version": memkern.__version__,
        "mode": mode,
        "cpp": False,
        "cuda": None,
        "reason": reason,
        "cuda_reason": reason,
    }
    assert not list(package.glob("_C*"))
    assert (package / "py.typed").exists()


def test_auto_survives_a_failing_build(tree, no_nvcc):
    (tree / "csrc/module.cpp").write_text("#error injected\n")
    done, package = install(tree, "auto", path=no_nvcc)
    assert done.returncode == 0, done.stdout
    built = json.loads((package / "build.json").read_text())
    assert not built["cpp"]
    assert built["reason"].startswith(("the build failed", "no C++ compiler"))


def test_an_unknown_mode_fails_loudly(tree):
    done, _ = build(tree, "gpu")
    assert done.returncode != 0
    assert "MEMKERN_BUILD: expected one of auto, cpp, cuda, none, got 'gpu'" in done.stdout + done.stderr


def test_cpp_fails_loudly_without_a_compiler(tree, tmp_path):
    done, _ = build(tree, "cpp", path=str(tmp_path))
    assert done.returncode != 0
    assert "MEMKERN_BUILD=cpp: no C++ compiler on PATH" in done.stdout + done.stderr


@pytest.fixture
def no_nvcc(tmp_path, monkeypatch):
    """A PATH with a compiler and without nvcc."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "g++", "gcc", "cc", "as", "ld", "sh"):
        if shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    return str(tools)


def put_nvcc(folder, release="13.0", compiles="echo injected >&2; exit 1"):
    """An nvcc that knows its release and its architectures."""
    nvcc = Path(folder) / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"  --version) echo release {release}, V{release}.88;;\n"
        "  --list-gpu-arch) echo compute_80 compute_90;;\n"
        f"  *) {compiles};;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)


@pytest.fixture
def fake_nvcc(no_nvcc):
    """A PATH with a compiler and an nvcc that compiles nothing."""
    put_nvcc(no_nvcc)
    return no_nvcc


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize(("jobs", "threads"), [(None, min(4, os.cpu_count() or 1)), ("3", 3)])
def test_an_nvcc_of_another_major_builds_for_what_it_can(tree, no_nvcc, monkeypatch, jobs, threads):
    """The library has CUDA's runtime in it and calls torch by its stable ABI: releases are not compared."""
    find_output = 'echo "$*" >> "$0.calls"; while [ "$1" != -o ]; do shift; done'
    put_nvcc(no_nvcc, "12.8", f'{find_output}; "${{0%/*}}/c++" -shared -o "$2" -xc++ - < /dev/null')
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.delenv("NVCC_THREADS", raising=False)
    if jobs is None:
        monkeypatch.delenv("MAX_JOBS", raising=False)
    else:
        monkeypatch.setenv("MAX_JOBS", jobs)
    done, package = build(tree, "cuda", path=no_nvcc)
    assert done.returncode == 0, done.stdout + done.stderr
    built = json.loads((package / "build.json").read_text())
    assert built["cuda"] == {"nvcc": "12.8", "architectures": ["sm_80", "sm_90", "compute_90"]}
    assert f"--threads {threads} " in (Path(no_nvcc) / "nvcc.calls").read_text()
    assert (package / "_cuda.abi3.so").exists()


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_cuda_fails_loudly_without_nvcc(tree, no_nvcc):
    done, _ = build(tree, "cuda", path=no_nvcc)
    assert done.returncode != 0
    assert "MEMKERN_BUILD=cuda: no nvcc: set CUDA_HOME, or put it on PATH" in done.stdout + done.stderr


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [(False, "no nvcc: set CUDA_HOME, or put it on PATH"), (True, "the build failed: nvcc failed: injected")],
    ids=["without nvcc", "with an nvcc that fails"],
)
def test_auto_goes_on_without_the_cuda_library(tree, no_nvcc, request, nvcc, reason):
    if nvcc:
        request.getfixturevalue("fake_nvcc")
    done, package = build(tree, "auto", path=no_nvcc)
    assert done.returncode == 0, done.stdout
    built = json.loads((package / "build.json").read_text())
    assert built["cpp"], built["reason"]
    assert built["cuda"] is None
    assert built["cuda_reason"].replace(f"{no_nvcc}/", "") == reason
    assert not list(package.glob("_cuda*"))


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_a_bad_list_of_architectures_is_named(tree, fake_nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    done, _ = build(tree, "cuda", path=fake_nvcc)
    assert done.returncode != 0
    assert (
        "TORCH_CUDA_ARCH_LIST: expected capabilities such as 8.0;9.0+PTX, got '8.0;Hopper'" in done.stdout + done.stderr
    )


@pytest.mark.skipif(not HAS_COMPILER or shutil.which("nvcc") is None, reason="no C++ compiler or no nvcc")
def test_cuda_installs_both_libraries_whatever_the_python(tree, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
    done, package = install(tree, "cuda")
    assert done.returncode == 0, done.stdout
    built = json.loads((package / "build.json").read_text())
    assert built["cpp"]
    assert built["cuda"]["architectures"] == ["sm_80", "compute_80"]
    assert {path.name for path in package.glob("*.so")} == {"_C.abi3.so", "_cuda.abi3.so"}
    (wheel,) = package.parent.glob("memkern-*.dist-info/WHEEL")
    assert "Tag: cp310-abi3-" in wheel.read_text()
    assert "Root-Is-Purelib: false" in wheel.read_text()


def test_the_source_distribution_has_all_sources_wherever_it_is_made(tree):
    """The archive is made once, and built on machines that have parts which this one lacks."""
    environment = os.environ | {"MEMKERN_BUILD": "none"}
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=True)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*.*")} <= names


def cuda_library():
    """The CUDA library of this installation; skips where none was built."""
    built = json.loads((Path(memkern.__file__).parent / "build.json").read_text())
    if built["cuda"] is None:
        pytest.skip(f"no CUDA library: {built['cuda_reason']}")
    return Path(memkern.__file__).parent / "_cuda.abi3.so", built["cuda"]["architectures"]


def cuobjdump(library, option):
    """The output of CUDA's own reader of libraries; skips where it is missing."""
    places = [Path(shutil.which("nvcc") or "nvcc").resolve().parent]
    if triton := importlib.util.find_spec("triton"):
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    tool = shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *map(str, places)]))
    if tool is None:
        pytest.skip("no cuobjdump")
    return subprocess.run([tool, option, library], capture_output=True, text=True, check=True).stdout


def test_the_cuda_library_is_here_wherever_it_can_be():
    built = json.loads((Path(memkern.__file__).parent / "build.json").read_text())
    there = (Path(memkern.__file__).parent / "_cuda.abi3.so").exists()
    assert there == (built["cuda"] is not None)
    asked = built["mode"] in ("auto", "cuda") and HAS_COMPILER
    assert there or not asked or shutil.which("nvcc") is None, built["cuda_reason"]


def test_the_cuda_library_has_code_for_every_architecture():
    """Read from the fat binary's headers: machine code for each, PTX for the newest."""
    library, architectures = cuda_library()
    listing = {kind: cuobjdump(library, f"--list-{kind}") for kind in ("elf", "ptx")}
    for name in architectures:
        kind, number = name.split("_")
        assert f"sm_{number}" in listing["elf" if kind == "sm" else "ptx"]


def test_the_cuda_kernels_keep_nothing_in_local_memory():
    """Local memory would be written and read for every row; an argument taken by reference is enough to cause it."""
    library, _ = cuda_library()
    usage = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump(library, "-res-usage"))
    assert len(usage) >= 16, "two kernels, of four dtypes, in vectors and not"
    assert set(usage) == {("0", "0")}


def test_the_cuda_library_names_the_libraries_it_needs():
    """libtorch_cuda by name, though it is linked without it: Python loads libtorch for itself alone."""
    library, _ = cuda_library()
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    for needed in ("libtorch_cuda.so", "libtorch_cpu.so"):
        assert f"[{needed}]" in dynamic
    assert "libcudart" not in dynamic
    assert "libpython" not in dynamic

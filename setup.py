"""Builds the compiled parts of memkern, as far as `MEMKERN_BUILD` and this machine allow.

MEMKERN_BUILD=auto  (default) build what can be built; never fails
              cpp   the CPU library, or fail
              cuda  the CPU and the CUDA library, or fail; no GPU is needed, and a CPU build of torch is enough
              none  pure Python

CUDACXX or CUDA_HOME name an nvcc that is not on PATH; TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") the architectures.
The result, or the reason of a failure, is written to `memkern/build.json`, which `memkern info` shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = Path("memkern")
MODES = ("auto", "cpp", "cuda", "none")
MODE = os.environ.get("MEMKERN_BUILD", "auto")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # stable ABI of torch 2.11
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.*h"))

if MODE not in MODES:
    raise SystemExit(f"MEMKERN_BUILD: expected one of {', '.join(MODES)}, got {MODE!r}")


class Unavailable(Exception):
    """The reason why something cannot be built here."""


def cpp_library() -> tuple[Extension, type[build_ext]]:
    """The CPU library, and torch's build command."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise Unavailable(
            f"torch was not importable at build time ({error}): use pip install --no-build-isolation"
        ) from error
    compiler = os.environ.get("CXX", "c++").split()[0]
    if os.name != "nt" and not (shutil.which(compiler) or shutil.which("g++")):
        raise Unavailable("no C++ compiler on PATH at build time")
    flags = ["/O2"] if os.name == "nt" else ["-O3", "-g0", "-fopenmp-simd", "-fvisibility=hidden", "-Wall"]
    sources = ["csrc/module.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
    extension = CppExtension(
        "memkern._C", sources, depends=HEADERS, extra_compile_args=DEFINES + flags, py_limited_api=True
    )
    # For a few small files ninja gains nothing, and it may be missing.
    return extension, BuildExtension.with_options(use_ninja=False)


def find_nvcc() -> str:
    """The path of nvcc."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in (os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), "nvcc"):
        if found := candidate and shutil.which(candidate):
            return found
    raise Unavailable("no nvcc: set CUDA_HOME, or put it on PATH")


def run(command: list[str]) -> str:
    """The output of a compiler; if it fails, the output is in the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def architectures(nvcc: str) -> list[str]:
    """The compile targets that nvcc supports: "sm_80" for machine code, "compute_120" for PTX."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    if asked:
        wanted = re.findall(r"(\d+)\.(\d)(\+PTX)?", asked)
        if len(wanted) != len(asked.split(";")):
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST: expected capabilities such as 8.0;9.0+PTX, got {asked!r}")
        return [name for major, minor, ptx in wanted
                for name in (f"sm_{major}{minor}", *([f"compute_{major}{minor}"] if ptx else []))]  # fmt: skip
    listed = run([nvcc, "--list-gpu-arch"]).split()
    can = [number for number in ARCHITECTURES if f"compute_{number}" in listed]
    if not can:
        raise Unavailable(f"{nvcc} compiles for none of {', '.join(map(str, ARCHITECTURES))}")
    return [*(f"sm_{number}" for number in can), f"compute_{can[-1]}"]


def link_to_torch(nvcc: str, folder: Path) -> list[str]:
    """Linker flags for libtorch and libtorch_cuda, even if this torch has no libtorch_cuda.

    Python loads libtorch privately, so the library has to name the libraries that it needs. In a CPU build of torch
    an empty library named libtorch_cuda.so stands in; only its name goes into ours.
    """
    from torch.utils.cpp_extension import library_paths

    paths = library_paths()
    if not any(Path(path, "libtorch_cuda.so").exists() for path in paths):
        empty = folder / "empty.cpp"
        empty.write_text("")
        stub = folder / "libtorch_cuda.so"
        run([nvcc, "-shared", "-cudart", "none", "-Xlinker", "-soname=libtorch_cuda.so", str(empty), "-o", str(stub)])
        paths = [*paths, str(folder)]
    flags = ["-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_cuda"]
    return [*(f"-L{path}" for path in paths), *flags]


def build_cuda(output: Path, folder: Path) -> dict[str, object]:
    """Compile and link the CUDA library, which does not use Python, in one call; the nvcc and the targets."""
    from torch.utils.cpp_extension import include_paths

    nvcc = find_nvcc()
    targets = architectures(nvcc)
    release = re.search(r"release ([\d.]+)", run([nvcc, "--version"]))
    for place in (folder, output.parent):
        place.mkdir(parents=True, exist_ok=True)
    codes = [f"-gencode=arch=compute_{target.split('_')[1]},code={target}" for target in targets]
    jobs = os.environ.get("NVCC_THREADS") or os.environ.get("MAX_JOBS") or str(min(4, os.cpu_count() or 1))
    flags = ["-O3", "-std=c++17", "--threads", jobs, "-cudart", "static", "-DUSE_CUDA", *DEFINES]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-g0", *(f"-I{path}" for path in include_paths())]
    sources = [str(path) for pattern in ("*.cpp", "*.cu") for path in sorted(Path("csrc/cuda").glob(pattern))]
    command = [nvcc, "-shared", *flags, *codes, *sources, *link_to_torch(nvcc, folder), "-o", str(output)]
    print(" ".join(command))
    run(command)
    return {"nvcc": release[1] if release else "unknown", "architectures": targets}


def prepare() -> tuple[list[Extension], type[build_ext], str, str]:
    """The extensions to build, the command that builds them, and the reasons for no CPU and no CUDA library."""
    if MODE == "none":
        return [], build_ext, "MEMKERN_BUILD=none", "MEMKERN_BUILD=none"
    extensions, command = [], build_ext
    try:
        cpp, command = cpp_library()
        extensions.append(cpp)
        if MODE == "cpp":
            return extensions, command, "", "MEMKERN_BUILD=cpp"
        architectures(find_nvcc())
    except Unavailable as reason:
        if MODE != "auto":
            raise SystemExit(f"MEMKERN_BUILD={MODE}: {reason}") from reason
        return extensions, command, "" if extensions else str(reason), str(reason)
    # Without sources, as torch's build command would look for a CUDA build of torch. `build_cuda` finds them itself.
    return [*extensions, Extension("memkern._cuda", [], py_limited_api=True)], command, "", ""


EXTENSIONS, BASE_COMMAND, CPP_REASON, CUDA_REASON = prepare()
for extension in EXTENSIONS:
    extension.optional = MODE == "auto"


def version() -> str:
    """The version of the package, without importing it."""
    return re.findall(r'__version__ = "(.*)"', (PACKAGE / "version.py").read_text())[0]


def fingerprint(library: Path) -> dict[str, object]:
    """The size and digest that identify a library before it is loaded."""
    content = library.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def record(folder: Path, cpp: str = CPP_REASON, cuda_reason: str = CUDA_REASON, cuda: object = None) -> None:
    """Write the result of the build, or the reasons against it, into the package at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome = {"version": version(), "mode": MODE, "cpp": not cpp, "cuda": cuda}
    outcome |= {"reason": cpp, "cuda_reason": cuda_reason}
    made = (*(["_C"] if not cpp else []), *(["_cuda"] if cuda else []))
    libraries = [path for name in made for path in sorted(folder.glob(f"{name}.*"))]
    if libraries:
        import torch

        outcome |= {"torch": torch.__version__, "libraries": {path.name: fingerprint(path) for path in libraries}}
    (folder / "build.json").write_text(json.dumps(outcome, indent=2) + "\n")


class Build(BASE_COMMAND):  # type: ignore[misc, valid-type]
    """Builds the extensions of `prepare`, allows failures if the mode is auto, and records the outcome."""

    def run(self) -> None:
        """Build, then write `memkern/build.json` beside the package."""
        self.reasons, self.cuda = {"memkern._C": CPP_REASON, "memkern._cuda": CUDA_REASON}, None
        super().run()
        folder = PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        if self.cuda is None:
            (folder / "_cuda.abi3.so").unlink(missing_ok=True)  # of an earlier build
        record(folder, self.reasons["memkern._C"], self.reasons["memkern._cuda"], self.cuda)

    def build_extension(self, extension: Extension) -> None:
        """Build one library."""
        try:
            if extension.name == "memkern._cuda":
                self.cuda = build_cuda(Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp) / "cuda")
            else:
                super().build_extension(extension)
        except Exception as error:
            if MODE != "auto":
                raise
            self.reasons[extension.name] = f"the build failed: {error}".splitlines()[0]
            print(f"memkern: {extension.name}: the build failed, continuing without it: {error}")

    def get_outputs(self) -> list[str]:
        """The built files; not those of a failed build, so that nothing missing is packed."""
        return [path for path in super().get_outputs() if Path(path).exists()]


if not EXTENSIONS:
    # build_ext does not run: the record goes into the source tree, and from there into the package as data.
    record(PACKAGE)

setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)

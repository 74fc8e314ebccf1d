"""Builds the compiled part of memkern, as far as `MEMKERN_BUILD` and this machine allow.

MEMKERN_BUILD=auto  (default) build what can be built; never fails
              cpp   the CPU library, or fail
              cuda  the CUDA library, or fail (this version has no CUDA sources: it fails)
              none  pure Python

What was built, or why not, is written to `memkern/build.json`, which `memkern info` shows.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = Path("memkern")
MODES = ("auto", "cpp", "cuda", "none")
MODE = os.environ.get("MEMKERN_BUILD", "auto")
SOURCES = ["csrc/module.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
TARGET_TORCH = "0x020b000000000000"  # stable ABI of torch 2.11

if MODE not in MODES:
    raise SystemExit(f"MEMKERN_BUILD: expected one of {', '.join(MODES)}, got {MODE!r}")
if MODE == "cuda":
    raise SystemExit("MEMKERN_BUILD=cuda: this version of memkern has no CUDA sources; use auto, cpp or none")


def torch_extension() -> tuple[Extension, type[build_ext]]:
    """The extension and its build command. Raises if torch is not here (as in an isolated build)."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = [f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"]
    flags += ["/O2"] if os.name == "nt" else ["-O3", "-g0", "-fvisibility=hidden", "-Wall"]
    extension = CppExtension("memkern._C", SOURCES, depends=HEADERS, extra_compile_args=flags, py_limited_api=True)
    # Six small files: ninja would gain nothing and is one more thing that may be missing.
    return extension, BuildExtension.with_options(use_ninja=False)


def prepare() -> tuple[list[Extension], type[build_ext], str]:
    """The extensions to build, the command that builds them, and why there is none."""
    if MODE == "none":
        return [], build_ext, "MEMKERN_BUILD=none"
    try:
        extension, command = torch_extension()
    except ImportError as error:
        if MODE == "cpp":
            raise SystemExit(
                f"MEMKERN_BUILD=cpp: torch is not importable at build time ({error}); "
                "use pip install --no-build-isolation"
            ) from error
        return [], build_ext, f"torch was not importable at build time ({error}): use --no-build-isolation"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if os.name != "nt" and not (shutil.which(compiler) or shutil.which("g++")):
        if MODE == "cpp":
            raise SystemExit("MEMKERN_BUILD=cpp: no C++ compiler on PATH")
        return [], build_ext, "no C++ compiler on PATH at build time"
    return [extension], command, ""


EXTENSIONS, BASE_COMMAND, REASON = prepare()


def record(folder: Path, reason: str) -> None:
    """Write what was built, or why not, into the package at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome = {"mode": MODE, "cpp": not reason, "reason": reason}
    (folder / "build.json").write_text(json.dumps(outcome, indent=2) + "\n")


class Build(BASE_COMMAND):  # type: ignore[misc, valid-type]
    """Builds what `prepare` found, lets it fail where the mode is auto, and records the outcome."""

    def run(self) -> None:
        """Build, then write `memkern/build.json` beside the package."""
        reason = REASON
        if EXTENSIONS:
            try:
                super().run()
            except Exception as error:
                if MODE != "auto":
                    raise
                reason = f"the build failed: {error}".splitlines()[0]
                print(f"memkern: {reason}; going on without the compiled part")
        record(PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE, reason)

    def get_outputs(self) -> list[str]:
        """None where the build was given up, so that nothing missing is packed."""
        return [path for path in super().get_outputs() if Path(path).exists()]


if not EXTENSIONS:
    # build_ext does not run: the record goes into the tree, and from there into the package as data.
    record(PACKAGE, REASON)

setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)

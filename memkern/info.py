"""What this installation of memkern is made of: `memkern.info()` and `memkern info`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from .ops import backends


@dataclass(frozen=True)
class Info:
    """Versions, how the package was built, and which backends run here.

    Attributes:
        versions: package name → version, or "absent".
        build: what the build wrote down.
        backends: backend → "available", or why it is not.
    """

    versions: dict[str, str]
    build: str
    backends: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name:<13} {version}" for name, version in self.versions.items()]
        lines.append(f"{'build':<13} {self.build}")
        lines += [f"{'backend ' + name:<13} {state}" for name, state in self.backends.items()]
        return "\n".join(lines)


def info() -> Info:
    """Describe this installation."""
    versions = {"memkern": _version("memkern"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in ("torch", "diffusers", "transformers", "triton")}
    versions["cuda"] = torch.version.cuda or "absent: torch is a CPU build"
    cpu = torch.device("cpu")
    return Info(
        versions,
        _build(),
        {name: "; ".join(backends.refusals(name, cpu)) or "available" for name in backends.BACKENDS if name != "auto"},
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _build() -> str:
    record = Path(__file__).with_name("build.json")
    if not record.exists():
        return "no record: not installed by its setup.py"
    built = json.loads(record.read_text())
    outcome = "with the compiled CPU library" if built["cpp"] else f"pure Python: {built['reason']}"
    return f"{outcome} (MEMKERN_BUILD={built['mode']})"

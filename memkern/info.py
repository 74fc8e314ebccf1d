"""The parts of this installation of memkern: `memkern.info()` and `memkern info`."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from .ops import backends
from .ops.cards import architecture
from .ops.compiled import Unreadable, read_record
from .version import __version__


@dataclass(frozen=True)
class Info:
    """Versions, how the package was built, and which backends run here.

    Attributes:
        versions: package name → version, or "absent"; GPU → its name and architecture.
        build: the record that the build wrote.
        backends: backend → "available", or the reasons why it is not.
        failures: launches that were tried in this process and failed.
    """

    versions: dict[str, str]
    build: str
    backends: dict[str, str]
    failures: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{name:<14} {version}" for name, version in self.versions.items()]
        lines.append(f"{'build':<14} {self.build}")
        lines += [f"{'backend ' + name:<14} {state}" for name, state in self.backends.items()]
        lines += [f"{'failed':<14} {failure}" for failure in self.failures]
        return "\n".join(lines)


def info() -> Info:
    """Describe this installation."""
    # Versions of the modules that run: metadata may be of another installation.
    versions = {"memkern": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: _version(name) for name in ("diffusers", "transformers", "triton")}
    versions["cuda"] = torch.version.cuda or f"absent: torch is a {'ROCm' if torch.version.hip else 'CPU'} build"
    if torch.version.hip is not None:
        versions["rocm"] = f"{torch.version.hip}, for which kernels were compiled but never run"
    for index in range(torch.cuda.device_count()):
        versions[f"gpu {index}"] = f"{torch.cuda.get_device_name(index)}, {architecture(index)}"
    states = {name: "; ".join(_against(name)) or "available" for name in backends.BACKENDS if name != "auto"}
    return Info(versions, _build(), states, tuple(backends.failures()))


def _against(backend: str) -> list[str]:
    """The reasons why `backend` cannot run on this machine."""
    reasons = backends.installed(backend)
    needs_gpu = backend == "cuda" or (backend == "triton" and not backends.INTERPRETING)
    return [*reasons, "torch sees no GPU"] if needs_gpu and not torch.cuda.is_available() else reasons


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _build() -> str:
    try:
        built = read_record()
    except Unreadable as reason:
        return str(reason)
    passed_by = {
        name: f", which is not in use (see backend {name})" if backends.installed(name) else ""
        for name in ("cpp", "cuda")
    }
    cpp = f"without the compiled CPU library: {built['reason']}"
    if built["cpp"]:
        cpp = f"with the compiled CPU library{passed_by['cpp']}"
    cuda = built["cuda"]
    if cuda is None:
        gpu = f"without the CUDA library: {built['cuda_reason']}"
    else:
        gpu = f"with the CUDA library (nvcc {cuda['nvcc']}: {' '.join(cuda['architectures'])}){passed_by['cuda']}"
    torch_then = f", torch {built['torch']}" if "torch" in built else ""
    return f"{cpp}; {gpu} (memkern {built['version']}{torch_then}, MEMKERN_BUILD={built['mode']})"

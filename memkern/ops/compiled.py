"""The compiled libraries, and the record that the build wrote of them in `build.json`.

A library is loaded only if it is, byte by byte, the one that was built for this version: a truncated library would
end the process, and one of another version would serve operators that have changed since.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

FOLDER = Path(__file__).parents[1]
KEYS = {"version", "mode", "cpp", "cuda", "reason", "cuda_reason"}
ABSENT = "the compiled {} library is not part of this installation (see `memkern info`)"


class Unreadable(ValueError):
    """The reason why `build.json` cannot be read."""


def read_record(folder: Path = FOLDER) -> dict[str, Any]:
    """The record that the build wrote in `folder`.

    Raises:
        Unreadable: it is missing, or damaged.
    """
    path = folder / "build.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unreadable("there is no build.json: not installed by its setup.py") from None
    except (OSError, ValueError) as error:
        raise Unreadable(f"build.json cannot be read ({error}): install again") from error
    if not isinstance(record, dict) or not record.keys() >= KEYS:
        raise Unreadable("build.json is not what the build writes: install again")
    return record


def _stale(folder: Path) -> str | None:
    """The text that the libraries are of another version, left by an update without a build; or None."""
    try:
        version = read_record(folder)["version"]
    except Unreadable:
        return None
    return None if version == __version__ else f"was built for memkern {version}, this is {__version__}: install again"


def damage(library: Path) -> str | None:
    """The reason why a library is not the one that was built, by the record beside it; or None."""
    try:
        expected = read_record(library.parent).get("libraries", {}).get(library.name)
    except Unreadable as reason:
        return str(reason)
    if expected is None:
        return "build.json does not have it: install again"
    size = library.stat().st_size
    if size != expected["size"]:
        return f"it has {size} bytes, {expected['size']} were built: install again"
    if hashlib.sha256(library.read_bytes()).hexdigest() != expected["sha256"]:
        return "its content is not what was built: install again"
    return None


def _refusal(title: str, library: Path, here: str, why: object) -> str:
    try:
        built = f"torch {read_record(library.parent).get('torch', 'of an unknown version')}"
    except Unreadable:
        built = "an unknown torch"
    return f"the compiled {title} library does not load with {here}: {why} (built with {built})"


def load_cpp() -> str | None:
    """Load the compiled CPU library, which registers itself; the reason if it cannot be loaded, or None."""
    try:
        found = importlib.util.find_spec("._C", __package__.rpartition(".")[0])
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        return ABSENT.format("CPU")
    library, here = Path(found.origin), f"torch {torch.__version__}"
    if stale := _stale(library.parent):
        return f"the compiled CPU library {stale}"
    if why := damage(library):
        return _refusal("CPU", library, here, why)
    try:
        from .. import _C  # noqa: F401
    except ImportError as error:
        return _refusal("CPU", library, here, error)
    return None


def load_cuda(library: Path = FOLDER / "_cuda.abi3.so") -> str | None:
    """Load the compiled CUDA library, which registers itself; the reason if it cannot be loaded, or None."""
    if not library.exists():
        return ABSENT.format("CUDA")
    if stale := _stale(library.parent):
        return f"the compiled CUDA library {stale}"
    if torch.version.hip is not None:
        return f"the compiled CUDA library is not for ROCm, which torch {torch.__version__} is built for"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    here = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    if why := damage(library):
        return _refusal("CUDA", library, here, why)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return _refusal("CUDA", library, here, error)
    return None

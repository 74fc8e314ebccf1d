"""The times of cross-attention layers on this machine, by shape and path: a table on disk that processes share.

The first process that meets a shape writes its times; later processes read the same times and choose the same path, so
that the same seed gives the same image. There is a file per device and set of versions; entries in it do not change.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import torch

from .ops.backends import tell
from .ops.cards import architecture
from .version import __version__

OFF = "off"

PATHS = ("former", "projected", "absorbed")
"""The layer's own processor, and the two paths that replace it."""

_LOCK_SECONDS = 1.0
"""The time to wait for another process: it holds the table while it writes a small file."""


@dataclass(frozen=True)
class Times:
    """The times of a layer.

    Attributes:
        milliseconds: by path.
        measured: True if they were timed; if not, they were estimated.
        is_read: True if another process wrote them.
    """

    milliseconds: dict[str, float]
    measured: bool
    is_read: bool = False

    def __str__(self) -> str:
        origin = f"{'from the table, ' if self.is_read else ''}{'measured' if self.measured else 'estimates'} in ms"
        return f"{origin}: {', '.join(f'{path} {took:.2f}' for path, took in self.milliseconds.items())}"


def cache_folder() -> Path | None:
    """The folder of the tables, by MEMKERN_CACHE: the user's cache folder, another one, or None to keep none.

    Raises:
        ValueError: it is empty.
    """
    given = os.environ.get("MEMKERN_CACHE")
    if given is None:
        return platformdirs.user_cache_path("memkern", appauthor=False)
    if not given.strip():
        raise ValueError(f"MEMKERN_CACHE: expected {OFF} or a folder, got {given!r}")
    return None if given == OFF else Path(given).expanduser()


def identity(device: torch.device) -> dict[str, str]:
    """The device that times hold for, and the versions of the packages that run there."""
    versions = {"memkern": __version__, "torch": torch.__version__}
    versions |= {name: _version(name) for name in ("diffusers", "triton")}
    return {"device": _cpu() if device.type == "cpu" else _gpu(device), **versions}


@dataclass
class Table:
    """The known times of shapes, in this process and on disk.

    Attributes:
        path: of the file; None if nothing is kept.
        of: the device and versions that its times hold for.
    """

    path: Path | None
    of: dict[str, str]
    _times: dict[str, Times] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def find(self, key: str) -> Times | None:
        """The times of a shape, also from the file; None if unknown. Within a process they never change."""
        with self._lock:
            if key not in self._times:
                self._take(self._read())
            return self._times.get(key)

    def add(self, key: str, times: Times, *, replace: bool = False) -> Times:
        """Write the times of a shape, unless another process or thread was faster.

        Args:
            replace: True to overwrite an existing entry.

        Returns:
            The entry now in force.
        """
        with self._lock:
            if replace or key not in self._times:
                self._times[key] = times
                if self.path is not None:
                    try:
                        self._merge(self.path, key, replace)
                    except OSError as error:
                        why = f"no choice of paths can be kept in {self.path}: {error.strerror or error}"
                        tell(("unkept", self.path), f"{why}; another process may choose differently")
            return self._times[key]

    def _take(self, found: Mapping[str, Times]) -> None:
        # Times that this process has used for a choice stay in use.
        self._times = {**found, **self._times}

    def _merge(self, path: Path, key: str, replace: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            found = self._read()
            if key in found and not replace:
                self._times[key] = found[key]
                return
            if replace:
                found.pop(key, None)
            _write(path, {"of": self.of, "times": {k: _as_json(v) for k, v in {**self._times, **found}.items()}})

    def _read(self) -> dict[str, Times]:
        """The entries of the file; none if it is of another device or version, or not a table."""
        if self.path is None:
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["of"] != self.of:
                raise ValueError(f"it is of {found['of']}")
            return {str(key): _from_json(entry) for key, entry in found["times"].items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            tell(("table", self.path), f"{self.path} is ignored, as it is no table of this device and version: {error}")
            return {}


@functools.cache
def table(folder: Path | None, device: torch.device) -> Table:
    """The table of a device; one per process, shared by all cards of a kind."""
    return _table(folder, *identity(device).items())


@functools.cache
def _table(folder: Path | None, *of: tuple[str, str]) -> Table:
    digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]
    name = "".join(letter if letter.isalnum() else "-" for letter in of[0][1].partition(",")[0])
    return Table(None if folder is None else folder / f"{name}-{digest}.json", dict(of))


def _as_json(times: Times) -> dict[str, Any]:
    return {"measured": times.measured, "ms": times.milliseconds}


def _from_json(entry: Any) -> Times:
    took = {path: float(entry["ms"][path]) for path in PATHS if path in entry["ms"]}
    if not {"former", "projected"} <= took.keys() or not all(0 <= one < math.inf for one in took.values()):
        raise ValueError(f"it says {entry}")
    return Times(took, bool(entry["measured"]), is_read=True)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Replace a file in one step: a reader gets either the old one or the new one, whole."""
    made, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with open(made, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """A lock against other writers: two that read, add and write at once would lose one's addition."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(path, "a", encoding="utf-8") as file:
        end = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.005)
            except OSError:  # a file system without locks
                break
        yield


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _cpu() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} processors"


def _gpu(device: torch.device) -> str:
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return f"{torch.cuda.get_device_name(device)}, {architecture(device)}, {processors} processors"

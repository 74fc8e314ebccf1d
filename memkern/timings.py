"""What cross-attention layers of one shape take on this machine, path by path: a table on disk that processes share.

Who meets a shape first writes down what it found, and whoever comes later finds the same there and chooses alike, so
that the same seed gives the same image. There is a file per device and set of versions; what stands in it stays.
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
"""What a layer's own processor does, and the two ways around it."""

_LOCK_SECONDS = 1.0
"""How long another process is waited for: it holds the table for as long as a small file takes to write."""


@dataclass(frozen=True)
class Times:
    """What a layer takes.

    Attributes:
        milliseconds: by path.
        measured: whether that was timed; if not, it was estimated.
        is_read: whether another process had written it down.
    """

    milliseconds: dict[str, float]
    measured: bool
    is_read: bool = False

    def __str__(self) -> str:
        origin = f"{'from the table, ' if self.is_read else ''}{'measured' if self.measured else 'estimates'} in ms"
        return f"{origin}: {', '.join(f'{path} {took:.2f}' for path, took in self.milliseconds.items())}"


def cache_folder() -> Path | None:
    """Where tables are kept, by MEMKERN_CACHE: the user's cache folder, another one, or None for nowhere.

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
    """What times hold for: a device, and the versions of what runs there."""
    versions = {"memkern": __version__, "torch": torch.__version__}
    versions |= {name: _version(name) for name in ("diffusers", "triton")}
    return {"device": _cpu() if device.type == "cpu" else _gpu(device), **versions}


@dataclass
class Table:
    """What is known of shapes, in this process and on disk.

    Attributes:
        path: of the file; None where nothing is kept.
        of: what its times hold for.
    """

    path: Path | None
    of: dict[str, str]
    _times: dict[str, Times] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def find(self, key: str) -> Times | None:
        """What is known of a shape, in the file too; None if nothing is. Within a process it never changes."""
        with self._lock:
            if key not in self._times:
                self._take(self._read())
            return self._times.get(key)

    def add(self, key: str, times: Times, *, replace: bool = False) -> Times:
        """Write down what was found of a shape, unless someone was faster.

        Args:
            replace: whether it takes the place of what is there.

        Returns:
            What stands.
        """
        with self._lock:
            if replace or key not in self._times:
                self._times[key] = times
                if self.path is not None:
                    try:
                        self._merge(self.path, key, replace)
                    except OSError as error:
                        why = f"no choice of paths can be kept in {self.path}: {error.strerror or error}"
                        tell(("unkept", self.path), f"{why}; another process may choose otherwise")
            return self._times[key]

    def _take(self, found: Mapping[str, Times]) -> None:
        # What this process has chosen by, it goes on choosing by.
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
        """What the file has; nothing where it is of something else, or no table."""
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
            tell(("table", self.path), f"{self.path} is passed by, being no table of this device and version: {error}")
            return {}


@functools.cache
def table(folder: Path | None, device: torch.device) -> Table:
    """The table of a device; one in a process, and one for all cards of a kind."""
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
    """Put a whole file in place at once: who reads meanwhile gets the former one, whole."""
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
    """While nobody else writes: two who read, add and write at once would lose what one added."""
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

"""A build's record of its libraries, written by hand; and a fresh interpreter to import them in."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import memkern


def write_record(folder: Path, **changes: object) -> None:
    """A `build.json` for the libraries that lie in `folder`, as if they had been built with torch 2.99."""
    libraries = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.glob("*.so")
    }
    record = {
        "version": memkern.__version__,
        "mode": "auto",
        "cpp": "_C.abi3.so" in libraries,
        "cuda": {"nvcc": "13.0", "architectures": ["sm_80"]} if "_cuda.abi3.so" in libraries else None,
        "reason": "",
        "cuda_reason": "",
        "torch": "2.99",
        "libraries": libraries,
    }
    (folder / "build.json").write_text(json.dumps({**record, **changes}))


def python(code: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, in `folder`, which comes first in its path; its completed process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)

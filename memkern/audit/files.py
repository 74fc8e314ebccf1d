"""Checks of files that were asked for by name."""

from __future__ import annotations

from pathlib import Path


def check_file(option: str, path: Path) -> None:
    """Refuse a path that is no file.

    Raises:
        FileNotFoundError, IsADirectoryError: there is none, or a folder; the message begins with `option`.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option}: expected a file, {path} is a folder")
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {path}")

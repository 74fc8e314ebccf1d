"""The prompts of an audit, and the training images they may return."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

PROMPT_COLUMNS = ("prompt", "caption", "text")
REFERENCE_COLUMNS = ("reference", "image", "file_name")


@dataclass(frozen=True)
class Prompt:
    """One prompt of an audit.

    Attributes:
        id: names its images; four digits and up, by its place in the file.
        text: what is generated from.
        reference: the file of its training image, if one is known.
    """

    id: str
    text: str
    reference: Path | None = None


def read_prompts(path: Path, *, references: str | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file.

    Args:
        path: `.txt`, one prompt a line; `.csv` with a header; `.jsonl`, an object or a string a line. A table's prompts
            are in its column "prompt", "caption" or "text".
        references: a folder with an image for each prompt, by the prompt's id or place ("0007.png", "7.jpg"), or the
            column of a table that names it. By default a column "reference", "image" or "file_name" is taken.
        limit: how many prompts, from the start.

    Raises:
        FileNotFoundError: the file.
        ValueError: another kind of file, a column that is not there, or no prompt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts: there is no file {path}")
    readers = {".txt": _lines, ".csv": _table, ".jsonl": _objects}
    if path.suffix not in readers:
        raise ValueError(f"prompts: expected a .txt, .csv or .jsonl file, got {path.name}")
    folder = Path(references) if references is not None and Path(references).is_dir() else None
    column = references if folder is None else None
    found = []
    for place, row in enumerate(islice(readers[path.suffix](path), limit)):
        reference = _in_folder(folder, place) if folder is not None else _in_row(row, column, path, place)
        found.append(Prompt(f"{place:04d}", _text(row, path, place), reference))
    if not found:
        raise ValueError(f"prompts: {path} has none")
    return found


def _lines(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield {"prompt": line.rstrip("\n")}


def _table(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


def _objects(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"prompts: {path}, line {number} is not JSON: {error.msg}") from None
            yield value if isinstance(value, dict) else {"prompt": str(value)}


def _column(row: dict[str, str], names: Iterable[str]) -> str | None:
    by_lower = {name.lower(): name for name in row if name is not None}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _text(row: dict[str, str], path: Path, place: int) -> str:
    name = _column(row, PROMPT_COLUMNS)
    if name is None:
        raise ValueError(
            f"prompts: {path}, entry {place} has no column {' or '.join(PROMPT_COLUMNS)}; "
            f"it has {', '.join(map(str, row))}"
        )
    return str(row[name])


def _in_row(row: dict[str, str], column: str | None, path: Path, place: int) -> Path | None:
    if column is not None and column not in row:
        raise ValueError(
            f"references: {column!r} is neither a folder nor a column of {path}; "
            f"entry {place} has {', '.join(map(str, row))}"
        )
    name = column or _column(row, REFERENCE_COLUMNS)
    return path.parent / str(row[name]) if name is not None and row[name] else None


def _in_folder(folder: Path, place: int) -> Path | None:
    for name in (f"{place:04d}", str(place)):
        for suffix in (".png", ".jpg", ".jpeg", ".webp"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    return None

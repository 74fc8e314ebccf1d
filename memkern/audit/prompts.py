"""The prompts of an audit, and the training images they may return."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .files import check_file

PROMPT_COLUMNS = ("prompt", "caption", "text")
REFERENCE_COLUMNS = ("reference", "image", "file_name")
LABEL_COLUMNS = ("memorized", "label")
DELIMITERS = (",", "\t", ";")


@dataclass(frozen=True)
class Prompt:
    """One prompt of an audit.

    Attributes:
        id: names its images; four digits and up, by its place in the file.
        text: the text to generate from.
        reference: the file of its training image, if one is known.
        label: True if the model is known to have memorized it, False if not; None if unknown.
    """

    id: str
    text: str
    reference: Path | None = None
    label: bool | None = None


def read_prompts(path: Path, *, references: str | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, UTF-8 with a byte order mark or without.

    Args:
        path: `.txt`, one prompt a line; `.csv` or `.tsv` with a header, separated by commas, tabs or semicolons;
            `.jsonl`, an object or a string a line. A table's prompts are in its column "prompt", "caption" or "text";
            a column "memorized" or "label" of 0 and 1 is kept as the label.
        references: a folder with an image for each prompt, by the prompt's id or place ("0007.png", "7.jpg"), or the
            column of a table that names it. By default a column "reference", "image" or "file_name" is taken.
        limit: how many prompts, from the start.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: another kind of file, one that is not UTF-8, a column that is missing or there twice, a quote that
            is not closed, a value that is not text, no prompt, or a folder without one of their images; the message
            has the file, the line, the given value, and the accepted ones.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 prompt, got {limit}")
    check_file("prompts", path)
    readers = {".txt": _lines, ".csv": _table, ".tsv": _table, ".jsonl": _objects}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"prompts: expected a .txt, .csv, .tsv or .jsonl file, got {path.name}")
    folder = Path(references) if references is not None and Path(references).is_dir() else None
    column = references if folder is None else None
    found = []
    for place, (line, row) in enumerate(islice(reader(path, _decoded(path)), limit)):
        where = f"{path}, line {line}"
        reference = _in_folder(folder, place) if folder is not None else _in_row(row, column, path, where)
        found.append(Prompt(f"{place:04d}", _text(row, where), reference, _label(row, where)))
    if not found:
        raise ValueError(f"prompts: {path} has none; expected at least one")
    if folder is not None and all(prompt.reference is None for prompt in found):
        raise ValueError(
            f"references: {folder} has no image of these prompts; expected names such as 0000.png or 0.png"
        )
    return found


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"prompts: {path}, line {line} is not UTF-8: byte 0x{data[error.start]:02x}; save the file as UTF-8"
        ) from None


def _lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"prompt": line.removesuffix("\r")}


def _table(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(text.splitlines(keepends=True), delimiter=_delimiter(text), strict=True)
    start = 1
    try:
        header = [name.strip() for name in next(rows, [])]
        names = [name.lower() for name in header if name]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"prompts: {path}, line 1 has the column {', '.join(twice)} more than once")
        start = rows.line_num + 1
        for row in rows:
            if row:
                if len(row) > len(header):
                    raise ValueError(
                        f"prompts: {path}, line {start} has {len(row)} cells, the header {len(header)}: {row!r}; "
                        "put text with a separator in quotes"
                    )
                yield start, dict(zip(header, row, strict=False))
            start = rows.line_num + 1
    except csv.Error as error:
        reason = "a quote is not closed" if str(error) == "unexpected end of data" else error
        raise ValueError(f"prompts: {path}, line {start} is not CSV: {reason}") from None


def _delimiter(text: str) -> str:
    """The delimiter that splits the header into the most names, one of them a prompt column."""

    def fits(delimiter: str) -> tuple[bool, int]:
        names = next(csv.reader(text.splitlines()[:1], delimiter=delimiter), [])
        return _column(names, PROMPT_COLUMNS) is not None, len(names)

    return max(DELIMITERS, key=fits)


def _objects(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"prompts: {path}, line {number} is not JSON: {reason}") from None
        yield number, value if isinstance(value, dict) else {"prompt": value}


def _column(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    by_lower = {name.strip().lower(): name for name in names}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def _text(row: dict[str, Any], where: str) -> str:
    name = _column(row, PROMPT_COLUMNS)
    if name is None:
        has = ", ".join(row) or "nothing"
        raise ValueError(f"prompts: {where} has no column {' or '.join(PROMPT_COLUMNS)}; it has {has}")
    text = row[name]
    if not isinstance(text, str):
        raise ValueError(f"prompts: {where}, {name}: expected text, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"prompts: {where}, {name}: expected text, got half of a surrogate pair: {text!a}") from None
    return text


def _label(row: dict[str, Any], where: str) -> bool | None:
    name = _column(row, LABEL_COLUMNS)
    if name is None or row[name] in (None, ""):
        return None
    known = {"0": False, "1": True, "false": False, "true": True}
    label = known.get(str(row[name]).strip().lower())
    if label is None and name.strip().lower() == LABEL_COLUMNS[0]:
        raise ValueError(f"prompts: {where}, {name}: expected 0 or 1, got {row[name]!r}")
    return label


def _in_row(row: dict[str, Any], column: str | None, path: Path, where: str) -> Path | None:
    if column is not None and column not in row:
        raise ValueError(
            f"references: {column!r} is neither a folder nor a column of {path}; {where} has {', '.join(row)}"
        )
    name = column or _column(row, REFERENCE_COLUMNS)
    return path.parent / str(row[name]) if name is not None and row[name] else None


def _in_folder(folder: Path, place: int) -> Path | None:
    for name in (f"{place:04d}", str(place)):
        for suffix in (".png", ".jpg", ".jpeg", ".webp"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    return None

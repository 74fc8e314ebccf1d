"""The tables of an audit: a row per image."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .images import TIMES, Job, read
from .methods import UNMITIGATED, Method
from .metrics import Metric, Shown
from .prompts import Prompt

COPY = 0.5
"""The similarity above which an image counts as a copy, as in Kim & No and Wen et al."""
SIMILARITIES = ("sscd_to_unmitigated", "sscd_to_reference", "pixels_to_unmitigated", "pixels_to_reference")
FORMULA = tuple("=+-@\t\n＝＋－＠")
"""The characters that begin a formula in a spreadsheet."""
KEY = ("prompt_id", "method", "seed")
TEXTS = ("prompt_id", "prompt", "method", "image", "text")


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless the threshold is a similarity, which is a cosine or a correlation."""
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold: expected a similarity in [-1, 1], got {threshold}")


def reference_of(prompt: Prompt, broken: dict[str, str]) -> Image.Image | None:
    """The prompt's training image; a file that is no image is noted in `broken`, by its name, and skipped."""
    if prompt.reference is None:
        return None
    try:
        with Image.open(prompt.reference) as file:
            image: Image.Image = file.convert("RGB")
            return image
    except OSError as error:
        broken[str(prompt.reference)] = str(error)
        return None


def rows(
    out: Path,
    prompts: Sequence[Prompt],
    methods: Sequence[Method],
    seeds: Sequence[int],
    measures: Sequence[Metric],
    broken: dict[str, str],
    threshold: float = COPY,
) -> Iterator[dict[str, Any]]:
    """The table's rows, a prompt at a time: only the images of one prompt are in memory."""
    for prompt in prompts:
        reference = reference_of(prompt, broken)
        made = {(one.name, seed): read(Job(one, prompt, seed).path(out)) for one in methods for seed in seeds}
        shown = [
            Shown(
                made[one.name, seed][0],
                prompt.text,
                made[one.name, seed][1]["text"],
                made[UNMITIGATED, seed][0],
                reference,
                tuple(made[one.name, other][0] for other in seeds if other != seed),
            )
            for one in methods
            for seed in seeds
        ]
        scores = [metric(shown) for metric in measures]
        for index, (one, seed) in enumerate((one, seed) for one in methods for seed in seeds):
            row: dict[str, Any] = {"prompt_id": prompt.id, "prompt": prompt.text, "method": one.name, "seed": seed}
            row["image"] = str(Job(one, prompt, seed).path(Path()).as_posix())
            for metric, found in zip(measures, scores, strict=True):
                row |= dict(zip(metric.columns, found[index], strict=True))
            for name in SIMILARITIES:
                if name in row:
                    row[f"{name}_above"] = None if row[name] is None else int(row[name] > threshold)
            yield row | made[one.name, seed][1]


def write_csv(out: Path, table: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write `results.csv`, and the values that differ between any two runs to `times.csv`, each in one move.

    Numbers have six digits, and text that a spreadsheet would run as a formula has an apostrophe before it.

    Returns:
        The rows, without prompts and texts.
    """
    kept = []
    partial = {name: (out / name).with_suffix(".partial") for name in ("results.csv", "times.csv")}
    with (
        partial["results.csv"].open("w", encoding="utf-8", newline="") as results,
        partial["times.csv"].open("w", encoding="utf-8", newline="") as times,
    ):
        writers: list[csv.DictWriter[str]] = []
        for row in table:
            if not writers:
                names = ([name for name in row if name not in TIMES], [*KEY, *TIMES])
                for file, columns in zip((results, times), names, strict=True):
                    writers.append(csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n"))
                    writers[-1].writeheader()
            written = {name: cell(value) for name, value in row.items()}
            for writer in writers:
                writer.writerow(written)
            kept.append({name: value for name, value in row.items() if name not in ("prompt", "text")})
    for name, path in partial.items():
        os.replace(path, out / name)
    return kept


def cell(value: Any) -> Any:
    """A value as it is written: numbers with six digits, no text that a spreadsheet would run."""
    if isinstance(value, str):
        # csv leaves a lone carriage return unquoted, and readers end the row there.
        value = value.replace("\r\n", "\n").replace("\r", "\n")
        return f"'{value}" if value.startswith(FORMULA) else value
    return f"{value:.6g}" if isinstance(value, float) else value

"""The table of an audit: a row per picture, and a summary per method."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .methods import UNMITIGATED, Method
from .metrics import Metric, Shown
from .pictures import Job, read
from .prompts import Prompt

RESAMPLES = 2000
COPY = 0.5
"""The similarity above which a picture counts as a copy, as in Kim & No and Wen et al."""


@dataclass(frozen=True)
class Summary:
    """One measure of one method.

    Attributes:
        mean: over prompts, of the mean over seeds.
        low, high: its 95 % interval, by a bootstrap over prompts.
        above: the share of pictures above `COPY`.
        count: how many pictures had a value.
    """

    mean: float
    low: float
    high: float
    above: float
    count: int

    @classmethod
    def of(cls, values: Sequence[Sequence[float]]) -> Summary | None:
        """Of values per prompt; None without any."""
        kept = [np.asarray(row, np.float64) for row in values if len(row)]
        if not kept:
            return None
        means: NDArray[np.float64] = np.array([row.mean() for row in kept])
        picks = np.random.default_rng(0).integers(len(means), size=(RESAMPLES, len(means)))
        low, high = np.quantile(means[picks].mean(1), (0.025, 0.975))
        every = np.concatenate(kept)
        return cls(float(means.mean()), float(low), float(high), float((every > COPY).mean()), len(every))


def reference_of(prompt: Prompt, broken: dict[str, str]) -> Image.Image | None:
    """The prompt's training image; one that is none is noted in `broken`, by its file's name, and skipped."""
    if prompt.reference is None:
        return None
    try:
        with Image.open(prompt.reference) as image:
            picture: Image.Image = image.convert("RGB")
            return picture
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
) -> Iterator[dict[str, Any]]:
    """The table's rows, a prompt at a time: no more of the pictures is in memory."""
    for prompt in prompts:
        reference = reference_of(prompt, broken)
        made = {(one.name, seed): read(Job(one, prompt, seed).path(out)) for one in methods for seed in seeds}
        shown = [
            Shown(
                made[one.name, seed][0],
                prompt.text,
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
            yield row | made[one.name, seed][1]


def write_csv(path: Path, table: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the rows in one move, numbers with six digits; the rows, without texts."""
    partial = path.with_suffix(".partial")
    kept = []
    with partial.open("w", encoding="utf-8", newline="") as lines:
        writer = None
        for row in table:
            if writer is None:
                writer = csv.DictWriter(lines, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )
            kept.append({name: value for name, value in row.items() if name not in ("prompt", "text")})
    os.replace(partial, path)
    return kept


NOT_MEASURED = ("prompt_id", "method", "seed", "image", "text")


def summarize(table: Sequence[dict[str, Any]]) -> dict[str, dict[str, Summary]]:
    """Method → measure → its summary."""
    measures = [name for name in table[0] if name not in NOT_MEASURED]
    found: dict[str, dict[str, Summary]] = {}
    for name in dict.fromkeys(row["method"] for row in table):
        own = [row for row in table if row["method"] == name]
        found[name] = {}
        for measure in measures:
            per_prompt: dict[str, list[float]] = {}
            for row in own:
                if row[measure] is not None:
                    per_prompt.setdefault(row["prompt_id"], []).append(row[measure])
            summary = Summary.of(list(per_prompt.values()))
            if summary is not None:
                found[name][measure] = summary
    return found

"""The results of an audit in few numbers: means per method, and methods against each other on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .images import TIMES
from .results import COPY, KEY, SIMILARITIES

RESAMPLES = 2000

NAMES = {
    "sscd_to_unmitigated": "SSCD to the unmitigated image",
    "sscd_to_reference": "SSCD to the training image",
    "pixels_to_unmitigated": "pixel correlation with the unmitigated image",
    "pixels_to_reference": "pixel correlation with the training image",
    "kept": "ordinary prompts: similarity to the unmitigated image",
    "clip_score": "CLIP score",
    "clip_score_changed": "CLIP score of the changed text",
    "aesthetic": "aesthetic score",
    "lpips_diversity": "LPIPS between seeds",
    "noise_magnitude": "text-conditional noise (Wen et al.)",
    "seconds": "seconds per image",
    "peak_mib": "peak memory, MiB",
}
"""Measure → its description, in the order of the tables."""

Table = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Summary:
    """One measure of one method.

    Attributes:
        mean: over prompts, of the mean over seeds.
        low, high: its 95 % interval, by a bootstrap over prompts.
        above: the share of images above the threshold.
        count: how many images had a value.
    """

    mean: float
    low: float
    high: float
    above: float
    count: int

    @classmethod
    def of(cls, values: Sequence[Sequence[float]], threshold: float = COPY) -> Summary | None:
        """The summary of values per prompt; None without any."""
        kept = [np.asarray(row, np.float64) for row in values if len(row)]
        if not kept:
            return None
        means: NDArray[np.float64] = np.array([row.mean() for row in kept])
        low, high = interval(means)
        every = np.concatenate(kept)
        return cls(float(means.mean()), low, high, float((every > threshold).mean()), len(every))


def interval(means: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of the mean of `[prompts]`, by a bootstrap over prompts with a fixed seed."""
    picks = np.random.default_rng(0).integers(len(means), size=(RESAMPLES, len(means)))
    low, high = np.quantile(means[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def summarize(table: Table, threshold: float = COPY) -> dict[str, dict[str, Summary]]:
    """Method → measure → its summary."""
    found: dict[str, dict[str, Summary]] = {}
    for name, measures in _per_prompt(table).items():
        found[name] = {}
        for measure, values in measures.items():
            summary = Summary.of(list(values.values()), threshold)
            if summary is not None:
                found[name][measure] = summary
    return found


@dataclass(frozen=True)
class Difference:
    """One measure of two methods on the same prompts: the mean of the first's minus the second's.

    Attributes:
        mean: over the prompts that both have, of the difference of the means over seeds.
        low, high: its 95 % interval, by a bootstrap over prompts; if 0 is outside, the two differ.
        count: how many prompts.
    """

    mean: float
    low: float
    high: float
    count: int


def paired(table: Table) -> dict[tuple[str, str], dict[str, Difference]]:
    """(method, method) → measure → their difference, each pair once, in the order of the methods."""
    per_prompt = _per_prompt(table)
    found: dict[tuple[str, str], dict[str, Difference]] = {}
    for first, second in combinations(per_prompt, 2):
        found[first, second] = {}
        for measure, values in per_prompt[first].items():
            others = per_prompt[second].get(measure, {})
            both = [name for name in values if values[name] and others.get(name)]
            if both:
                means = np.array([np.mean(values[name]) - np.mean(others[name]) for name in both])
                found[first, second][measure] = Difference(float(means.mean()), *interval(means), len(both))
    return found


def _per_prompt(table: Table) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Method → measure → prompt → its values; "kept" is the similarity of prompts that have no training image."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    similar = next((name for name in SIMILARITIES if name in table[0]), None)
    known = {
        row["prompt_id"]
        for row in table
        if any(row.get(f"{kind}_to_reference") is not None for kind in ("sscd", "pixels"))
    }
    for row in table:
        values = {name: row[name] for name in NAMES if name in row}
        if similar is not None and known and row["prompt_id"] not in known:
            values["kept"] = row[similar]
        own = found.setdefault(row["method"], {})
        for name, value in values.items():
            if value is not None:
                own.setdefault(name, {}).setdefault(row["prompt_id"], []).append(value)
    return found


def write_summary(out: Path, table: Table, threshold: float) -> None:
    """Write `summary.json`, `summary.md` and `summary.tex`; without times, which differ between any two runs."""
    summaries = {
        method: {name: one for name, one in found.items() if name not in TIMES}
        for method, found in summarize(table, threshold).items()
    }
    pairs = [
        {"first": first, "second": second, "measure": name} | asdict(one)
        for (first, second), found in paired(table).items()
        for name, one in found.items()
        if name not in TIMES
    ]
    document = {
        "threshold": threshold,
        "methods": {method: {name: asdict(one) for name, one in found.items()} for method, found in summaries.items()},
        "differences": pairs,
    }
    measures = [name for name in NAMES if any(name in found for found in summaries.values())]
    cells = [[cell(found.get(name)) for name in measures] for found in summaries.values()]
    files = {
        "summary.json": json.dumps(document, indent=1) + "\n",
        "summary.md": _markdown(measures, list(summaries), cells),
        "summary.tex": _latex(measures, list(summaries), cells),
    }
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")


def cell(summary: Summary | Difference | None) -> str:
    """A mean with its interval."""
    if summary is None:
        return "–"
    if summary.mean >= 100:
        return f"{summary.mean:.0f}"
    return f"{summary.mean:.3f} ({summary.low:.3f}–{summary.high:.3f})"


def _markdown(measures: list[str], methods: list[str], cells: list[list[str]]) -> str:
    head = f"| method | {' | '.join(NAMES[name] for name in measures)} |\n| --- |{' ---: |' * len(measures)}\n"
    lines = (f"| {_piped(name)} | {' | '.join(row)} |\n" for name, row in zip(methods, cells, strict=True))
    return head + "".join(lines)


def _piped(text: str) -> str:
    return text.replace("|", "\\|")


def _latex(measures: list[str], methods: list[str], cells: list[list[str]]) -> str:
    head = " & ".join(["method", *(_escaped(NAMES[name]) for name in measures)])
    lines = [" & ".join([_escaped(name), *map(_escaped, row)]) for name, row in zip(methods, cells, strict=True)]
    body = " \\\\\n".join([head + " \\\\ \\hline", *lines]).replace("\\hline \\\\", "\\hline")
    return f"\\begin{{tabular}}{{l{'r' * len(measures)}}}\n{body} \\\\\n\\end{{tabular}}\n"


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


assert set(KEY).isdisjoint(NAMES)

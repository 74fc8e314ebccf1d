"""The result of a sweep: candidates by copies and loss, those that no other beats, and the files."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..policy import Policy
from .methods import Method
from .summary import Summary


@dataclass(frozen=True)
class Candidate:
    """A policy and its measured effect.

    Attributes:
        method: the audit's method for it.
        policy: None is the unpatched pipeline.
        copies: the share of images of memorized prompts that are copies.
        similarity: the mean similarity of those images, which separates policies if none has a copy.
        fidelity: measure → its mean over ordinary prompts.
        loss: measure → unpatched minus this one on the same prompts, with a 95 % interval.
        front: True if no other has less similarity and less loss.
        images: how many were measured.
    """

    method: Method
    policy: Policy | None
    copies: Summary
    similarity: float
    fidelity: dict[str, float]
    loss: dict[str, tuple[float, float, float]]
    images: int
    front: bool = False

    @property
    def worst(self) -> float:
        """The largest loss of any measure."""
        return max(self._losses)

    @property
    def total(self) -> float:
        """The sum of the losses of all measures."""
        return sum(self._losses)

    @property
    def _losses(self) -> list[float]:
        return [mean for mean, _, _ in self.loss.values()]


@dataclass(frozen=True)
class Swept:
    """The result of a sweep.

    Attributes:
        candidates: those of the last round, the best first.
        best: the one that is farthest from both limits; if all have too many copies, the one with the fewest.
        checked: the best one on seeds that the sweep did not use; None without such seeds.
        out: the folder.
    """

    candidates: list[Candidate]
    best: Candidate
    checked: Candidate | None
    out: Path

    def __str__(self) -> str:
        lines = [table([*self.candidates])]
        if self.checked is not None:
            lines.append(f"on seeds that were not swept:\n\n{table([self.checked])}")
        return "\n".join([*lines, f"best: {self.best.method.name}\n{self.out / 'best.json'}"])


def fronted(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with `front` set: no other is as good in similarity or loss and better in the other."""

    def beaten(one: Candidate) -> bool:
        return any(
            (other.similarity, other.worst) != (one.similarity, one.worst)
            and other.similarity <= one.similarity
            and other.worst <= one.worst
            for other in candidates
        )

    return [replace(one, front=not beaten(one)) for one in candidates]


@dataclass(frozen=True)
class Limits:
    """The largest share of copies and the largest loss of any measure that the winner may have."""

    copies: float = 0.03
    loss: float = 0.03

    def reached(self, one: Candidate) -> tuple[float, float, float]:
        """The sort key: the part of the nearer limit that a candidate has used up, then what decides between equals."""
        return max(_part(one.copies.mean, self.copies), _part(one.worst, self.loss)), one.total, one.similarity


def _part(value: float, limit: float) -> float:
    return value / limit if limit else math.inf if value > 0 else 0.0


def ordered(candidates: Sequence[Candidate], limits: Limits) -> list[Candidate]:
    """The candidates, those that are farthest from the nearer of their two limits first."""
    return sorted(candidates, key=lambda one: (*limits.reached(one), one.method.name))


def best(candidates: Sequence[Candidate], limits: Limits) -> Candidate:
    """The first of those with few enough copies; if none, the one with the fewest copies."""
    few = [one for one in candidates if one.copies.mean <= limits.copies]
    return ordered(few, limits)[0] if few else min(candidates, key=lambda one: (one.copies.mean, one.worst))


def table(candidates: Sequence[Candidate]) -> str:
    """Markdown table; per cent, with 95 % intervals."""
    names = list(candidates[0].loss)
    head = f"| policy | front | copies % | similarity | {' | '.join(f'{name}, loss' for name in names)} | images |\n"
    lines = [head, f"| --- | --- | ---: | ---: |{' ---: |' * len(names)} ---: |\n"]
    for one in candidates:
        copies = f"{100 * one.copies.mean:.1f} ({100 * one.copies.low:.1f}–{100 * one.copies.high:.1f})"
        losses = (f"{100 * mean:+.1f} ({100 * low:+.1f}–{100 * high:+.1f})" for mean, low, high in one.loss.values())
        front = "yes" if one.front else ""
        lines.append(
            f"| {one.method.name} | {front} | {copies} | {one.similarity:.2f} | {' | '.join(losses)} | {one.images} |\n"
        )
    return "".join(lines)


def _row(one: Candidate) -> dict[str, Any]:
    row: dict[str, Any] = {"policy": one.method.name, "front": int(one.front), "images": one.images}
    row |= {"copies": one.copies.mean, "copies_low": one.copies.low, "copies_high": one.copies.high}
    row["similarity"] = one.similarity
    for name, (mean, low, high) in one.loss.items():
        row |= {name: one.fidelity[name], f"{name}_loss": mean, f"{name}_loss_low": low, f"{name}_loss_high": high}
    return row


def write(found: Swept) -> None:
    """Write `sweep.csv`, `sweep.json`, `sweep.md`, `best.json` and, if matplotlib is installed, `front.png`."""
    out, rows = found.out, [_row(one) for one in found.candidates]
    with (out / "sweep.partial").open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows)
    os.replace(out / "sweep.partial", out / "sweep.csv")
    assert found.best.policy is not None
    document = {
        "candidates": rows,
        "best": found.best.method.name,
        "checked": None if found.checked is None else _row(found.checked),
    }
    for name, text in (
        ("sweep.json", json.dumps(document, indent=1)),
        ("sweep.md", str(found)),
        ("best.json", found.best.policy.to_json()),
    ):
        (out / name).write_text(text + "\n", encoding="utf-8")
    _plot(found, out / "front.png")


def _plot(found: Swept, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4.5 + 0.2 * len(found.candidates)), layout="constrained")
    axes = figure.add_subplot()
    for one in found.candidates:
        mean, low, high = max(one.loss.values())
        xerr = [[100 * (one.copies.mean - one.copies.low)], [100 * (one.copies.high - one.copies.mean)]]
        yerr = [[100 * (mean - low)], [100 * (high - mean)]]
        axes.errorbar(
            100 * one.copies.mean, 100 * mean, xerr=xerr, yerr=yerr, fmt="o" if one.front else "x", capsize=3,
            label=one.method.name[:110] + (" (best)" if one is found.best else ""),
        )  # fmt: skip
    axes.set_xlabel("copies, % of images of memorized prompts")
    axes.set_ylabel("largest loss of fidelity on ordinary prompts, points")
    figure.legend(fontsize=7, loc="outside lower left")
    figure.savefig(path, dpi=110)

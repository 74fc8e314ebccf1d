"""The report of an audit: one self-contained HTML page, and a grid of images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..demo.grid import draw_grid
from .images import Job, read
from .manifest import Contents
from .methods import Method
from .prompts import Prompt
from .results import SIMILARITIES, reference_of
from .summary import NAMES, Summary, cell, paired, summarize, write_summary

SHOWN_PROMPTS = 50
"""The most prompts in the grid; the table has all."""

PUBLISHED = {
    "swap-pad-zero-eot": "0.08 / 0.31",
    "swap-pad": "0.14 / 0.32",
    "zero-pad:0.7": "0.10 / 0.31",
    "ren:1.25": "0.09 / 0.30",
    "wen:3": "0.51 / 0.32",
    "random-tokens:1": "0.58",
    "random-numbers:1": "0.53",
}
"""Kim & No (arXiv 2605.02908): SSCD to the unmitigated image / CLIP score, Stable Diffusion 1.4, 458 prompts."""


def write_report(
    out: Path,
    contents: Contents,
    table: Sequence[dict[str, Any]],
    notes: Sequence[str],
    threshold: float,
) -> Path:
    """Write `grid.png`, the summaries and `report.html` from the rows of the results; the page's path."""
    from jinja2 import Environment, PackageLoader

    summaries = summarize(table, threshold)
    write_summary(out, table, threshold)
    draw(out, table, contents.prompts, contents.methods, contents.seeds).save(out / "grid.png")
    measures = [name for name in NAMES if any(name in of_method for of_method in summaries.values())]
    page = Environment(loader=PackageLoader("memkern.audit", "."), autoescape=True).get_template("report.html.j2")
    text = page.render(
        settings=contents.settings,
        seeds=contents.seeds,
        methods=[one.name for one in contents.methods],
        measures=measures,
        names=NAMES,
        summaries=summaries,
        copies=SIMILARITIES,
        threshold=threshold,
        cell=cell,
        differences=paired(table),
        published=PUBLISHED if "clip_score" in measures and "sscd_to_unmitigated" in measures else {},
        grid_measure=NAMES.get(grid_measure(table) or ""),
        grid=_inline((out / "grid.png").read_bytes()),
        plot=plot(summaries, measures),
        fidelity=axes_of(measures) is not None,
        shown=min(len(contents.prompts), SHOWN_PROMPTS),
        count=len(contents.prompts),
        notes=notes,
    )
    path = out / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def draw(
    out: Path,
    table: Sequence[dict[str, Any]],
    prompts: Sequence[Prompt],
    methods: Sequence[Method],
    seeds: Sequence[int],
) -> Image.Image:
    """A row per prompt, a column per method by the first seed, each image's similarity under it; references first."""
    measure = grid_measure(table)
    values = {(row["prompt_id"], row["method"], row["seed"]): row.get(measure or "") for row in table}
    shown = prompts[:SHOWN_PROMPTS]
    with_references = any(prompt.reference is not None for prompt in shown)
    cells, under = [], []
    for prompt in shown:
        row = [read(Job(one, prompt, seeds[0]).path(out))[0] for one in methods]
        found = [values[prompt.id, one.name, seeds[0]] for one in methods]
        numbers = ["" if value is None else f"{value:.2f}" for value in found]
        if with_references:
            reference = reference_of(prompt, {})
            blank = Image.new("RGB", row[0].size, "white")
            row.insert(0, blank if reference is None else reference.resize(row[0].size))
            numbers.insert(0, "")
        cells.append(row)
        under.append(numbers)
    columns = [*(["training\nimage"] if with_references else []), *(one.name.replace("-", "-\n", 1) for one in methods)]
    return draw_grid(cells, [prompt.text[:120] for prompt in shown], columns, cell=128, under=under)


def grid_measure(table: Sequence[dict[str, Any]]) -> str | None:
    """The measure written under the images: the first similarity that was measured."""
    return next((name for name in SIMILARITIES if any(row.get(name) is not None for row in table)), None)


def axes_of(measures: Sequence[str]) -> tuple[str, str] | None:
    """The two measures on the axes of a chart of memorization against fidelity; None if there is no such pair.

    Memorization is the similarity to the training image if there is one, else to the unmitigated image; fidelity is
    the CLIP score, else the similarity of ordinary prompts' images to the unmitigated ones.
    """
    across = ("sscd_to_reference", "pixels_to_reference", "sscd_to_unmitigated", "pixels_to_unmitigated")
    found = [next((name for name in names if name in measures), None) for names in (across, ("clip_score", "kept"))]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def plot(summaries: dict[str, dict[str, Summary]], measures: Sequence[str]) -> str:
    """Memorization against fidelity, a point per method, as an inline image; "" without matplotlib or a pair."""
    pair = axes_of(measures)
    if pair is None:
        return ""
    across, up = pair
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, found in summaries.items():
        if across in found and up in found:
            x, y = found[across], found[up]
            xerr, yerr = ([[value.mean - value.low], [value.high - value.mean]] for value in (x, y))
            axes.errorbar(x.mean, y.mean, xerr=xerr, yerr=yerr, fmt="o", capsize=3, label=name)
    axes.set_xlabel(f"memorization: {NAMES[across]}")
    axes.set_ylabel(f"fidelity:\n{NAMES[up]}")
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _inline(buffer.getvalue())


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()

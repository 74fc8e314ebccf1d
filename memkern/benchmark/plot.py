"""The ratios of a benchmark as an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .measured import Run

NO_PLOT = "no plot: it needs matplotlib, pip install memkern[plot]"

_PANELS = {"step": "UNet step", "encode": "encode_prompt", "host": "host"}


def plot(runs: Sequence[Run], path: Path) -> Path | None:
    """Draw each policy's ratios to the unpatched pipeline, with quartiles; the path, None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    patched = [run for run in reversed(runs) if run.policy is not None]
    panels = {name: title for name, title in _PANELS.items() if any(getattr(run, name) for run in patched)}
    figure = Figure(figsize=(3.2 * len(panels) + 2, 1.2 + 0.35 * len(patched)), layout="constrained")
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, title) in zip(every, panels.items(), strict=True):
        for row, run in enumerate(patched):
            timed = getattr(run, name)
            if timed is not None:
                low, median, high = timed.ratio
                axes.barh(row, median, color="#fdae6b" if run.compiled else "#9ecae1")
                axes.errorbar(median, row, xerr=[[median - low], [high - median]], color="#08519c", capsize=3)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(patched)), [run.name[:60] for run in patched])
        axes.set_title(title, fontsize=10)
    figure.supxlabel("time over the unpatched pipeline's, median and quartiles: below 1 is faster", fontsize=9)
    figure.savefig(path, dpi=110)
    return path

"""Figures of two probes, unpatched and patched."""

from __future__ import annotations

from typing import Any

import torch

from ..pipelines import Probe
from ..roles import Role

COLOURS = {Role.SOT: "#6b7280", Role.PROMPT: "#2563eb", Role.EOT: "#dc2626", Role.PAD: "#d97706"}


def mass(before: Probe, after: Probe) -> Any:
    """Attention mass per role over the steps, a mean over layers: dashed unpatched, solid patched."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axis = figure.subplots()
    for found, style, name in ((before, "--", "unpatched"), (after, "-", "patched")):
        for role, values in found.mass("cond").items():
            curve = values.nanmean(0)
            axis.plot(range(len(curve)), curve, style, color=COLOURS[role], label=f"{role.name}, {name}")
    axis.set(xlabel="denoising step", ylabel="attention mass, mean over layers", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def maps(before: Probe, after: Probe, count: int = 6) -> Any:
    """Maps of the attention to EOT over the steps: a row unpatched, a row patched, on one scale."""
    from matplotlib.figure import Figure

    rows = [found.maps("cond") for found in (before, after)]
    steps = torch.linspace(0, len(rows[0]) - 1, min(count, len(rows[0])), dtype=torch.float32, device="cpu")
    chosen = list(dict.fromkeys(steps.round().int().tolist()))
    highest = max(float(row.max()) for row in rows)
    figure = Figure(figsize=(1.6 + 1.2 * len(chosen), 3), layout="constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for line, row, name in zip(axes, rows, ("unpatched", "patched"), strict=True):
        for axis, step in zip(line, chosen, strict=True):
            image = axis.imshow(row[step], vmin=0, vmax=highest, cmap="magma")
            axis.set(xticks=[], yticks=[])
            if line is axes[0]:
                axis.set_title(f"step {step}", fontsize=9)
        line[0].set_ylabel(name)
    figure.colorbar(image, ax=axes, label="attention to EOT")
    return figure

"""The record of a probe: the attention mass on each role, as numbers, a table and images."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...ledger import KnownRows
from ...policy import BRANCHES, Branch
from ...roles import Role


@dataclass(frozen=True)
class Record:
    """One call of one layer.

    Attributes:
        layer: its dotted name.
        step: the number of the UNet's call since the prompt was encoded.
        rows: the description of each row of the batch; None for a row that the pipeline did not make.
        roles: uint8 `[B, L]`.
        mass: float32 `[B, L]`, the mass on each position.
        map: float32 `[B, N]`, for each query the mass on the EOT key; None for layers without a map.
    """

    layer: str
    step: int
    rows: KnownRows
    roles: torch.Tensor
    mass: torch.Tensor
    map: torch.Tensor | None = None


@dataclass
class Probe:
    """The attention masses that `probe` recorded.

    Attributes:
        records: one per layer and call, in order.
    """

    records: list[Record] = field(default_factory=list)

    def mass(self, branch: Branch = "cond") -> dict[Role, torch.Tensor]:
        """Role → mass `[layers, steps]` in the order of `layers`, a mean over rows; NaN where nothing was recorded."""
        names, steps = self.layers, self.steps
        total = {role: torch.full((len(names), steps), torch.nan, dtype=torch.float32, device="cpu") for role in Role}
        found: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
        for record in self.records:
            for row, roles, mass in zip(record.rows, record.roles, record.mass.cpu(), strict=True):
                if row is not None and row.branch == branch:
                    per_role = torch.stack([mass[roles == role].sum() for role in Role])
                    found[names.index(record.layer), record.step].append(per_role)
        for (layer, step), masses in found.items():
            for role, value in zip(Role, torch.stack(masses).mean(0), strict=True):
                total[role][layer, step] = value
        return total

    @property
    def layers(self) -> list[str]:
        """The layers that were called, in order."""
        return list(dict.fromkeys(record.layer for record in self.records))

    @property
    def steps(self) -> int:
        """The largest number of UNet calls after one prompt was encoded."""
        return max((record.step for record in self.records), default=-1) + 1

    def table(self) -> str:
        """Markdown: for each layer the mass per role, a mean over steps, on both branches."""
        branches = self._branches()
        columns = list(itertools.product(branches, Role))
        lines = [
            f"| layer | {' | '.join(f'{branch} {role.name}' for branch, role in columns)} |",
            f"| --- |{' ---: |' * len(columns)}",
        ]
        masses = {branch: self.mass(branch) for branch in branches}
        means = [masses[branch][role].nanmean(1) for branch, role in columns]
        for index, name in enumerate(self.layers):
            lines.append(f"| {name} | {' | '.join(f'{float(mean[index]):.3f}' for mean in means)} |")
        lines.append(f"| all | {' | '.join(f'{float(mean.nanmean()):.3f}' for mean in means)} |")
        return "\n".join(lines) + "\n"

    def plot(self, path: str | Path) -> None:
        """Write an image: a heat map of layers × steps per role and branch. Needs matplotlib (`memkern[plot]`)."""
        pyplot = _pyplot()
        branches = self._branches()
        if not branches:
            raise ValueError("plot: nothing was recorded")
        height = 1.5 + 0.22 * len(self.layers) * len(branches)
        figure, axes = pyplot.subplots(
            len(branches),
            len(Role),
            figsize=(14, height),
            squeeze=False,
            sharex=True,
            sharey=True,
            layout="constrained",
        )
        for row, branch in enumerate(branches):
            for column, (role, mass) in enumerate(self.mass(branch).items()):
                axis = axes[row][column]
                image = axis.imshow(mass, vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest")
                axis.set_title(f"{branch}: {role.name}")
                axis.set_yticks(range(len(self.layers)), [_short(name) for name in self.layers], fontsize=7)
                if row == len(branches) - 1:
                    axis.set_xlabel("step")
        figure.colorbar(image, ax=axes, label="share of the attention")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)

    def maps(self, branch: Branch = "cond") -> torch.Tensor:
        """The attention that each place gives to EOT, `[steps, h, w]`, in the first blocks at full resolution.

        A mean over those layers, their heads and the rows of the branch. Memorized images show it brightly in the
        last steps (Chen et al., "Exploring Local Memorization in Diffusion Models via Bright Ending Attention", 2025).
        """
        found: dict[int, list[torch.Tensor]] = defaultdict(list)
        for step, maps in self._maps("maps", branch):
            found[step].extend(maps)
        return torch.stack([torch.stack(found[step]).mean(0).cpu() for step in sorted(found)])

    def last_maps(self, branch: Branch = "cond") -> torch.Tensor:
        """The attention that each place gives to EOT in the last step, for each row of the branch: `[B, h, w]`.

        As `maps`, a mean over layers and heads.
        """
        found = self._maps("last_maps", branch)
        last = max(step for step, _ in found)
        return torch.stack([torch.stack(maps) for step, maps in found if step == last]).mean(0).cpu()

    def _maps(self, name: str, branch: Branch) -> list[tuple[int, list[torch.Tensor]]]:
        """The step and the branch's rows of each recorded map."""
        found = []
        for record in self.records:
            if record.map is not None:
                rows = zip(record.rows, record.map, strict=True)
                if maps := [one for row, one in rows if row is not None and row.branch == branch]:
                    found.append((record.step, maps))
        if not found:
            raise ValueError(f"{name}: no layer was called for a {branch} row that the pipeline encoded")
        return found

    def plot_maps(self, path: str | Path, branch: Branch = "cond", count: int = 8) -> None:
        """Write an image of `count` of the `maps`, evenly spread over the steps. Needs matplotlib."""
        pyplot, maps = _pyplot(), self.maps(branch)
        steps = torch.linspace(0, len(maps) - 1, min(count, len(maps)), dtype=torch.float32, device="cpu")
        chosen = steps.round().int().tolist()
        figure, axes = pyplot.subplots(
            1, len(chosen), figsize=(2 * len(chosen), 2.4), squeeze=False, layout="constrained"
        )
        for axis, step in zip(axes[0], chosen, strict=True):
            image = axis.imshow(maps[step], vmin=0, vmax=float(maps.max()), cmap="magma")
            axis.set_title(f"step {step}")
            axis.set_axis_off()
        figure.colorbar(image, ax=axes, label="attention to EOT")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)

    def _branches(self) -> list[Branch]:
        found = {row.branch for record in self.records for row in record.rows if row is not None}
        return [branch for branch in BRANCHES if branch in found]


def _short(name: str) -> str:
    """A layer's dotted name without the parts that all names share."""
    return name.replace("_blocks", "").replace(".attentions", "").replace(".transformer", "").removesuffix(".attn2")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plotting needs matplotlib: pip install memkern[plot]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

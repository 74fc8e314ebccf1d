"""What a UNet attends to: the attention mass on each role, per layer and step.

    with memkern.probe(pipe) as probe:
        pipe("a photograph of an astronaut")
    print(probe.table())
    probe.plot("roles.png")

Mass is the share of the softmax that the keys of a role get, as a mean over queries and heads: over the roles of a
row it sums to 1. On a patched pipeline it is that of the edited keys.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..plan import Plan
from ..policy import BRANCHES, Branch
from ..roles import Role
from ..windows import layer_size
from .instance import Patch, find
from .kv import Source, edited
from .patching import patch
from .paths import split_heads
from .rows import Rows, recognise
from .sites import cross_attention_layers, unwrapped

BLOCK_BYTES = 1 << 25
"""Of probabilities, float32: they are made for that many queries at a time and never for a whole layer."""


@dataclass(frozen=True)
class Record:
    """One call of one layer.

    Attributes:
        layer: its dotted name.
        step: the number of the UNet's call since the prompt was encoded.
        rows: what each row of the batch is; None for one that was not made by the pipeline.
        roles: uint8 `[B, L]`.
        mass: float32 `[B, L]`, the mass on each position.
        map: float32 `[B, N]`, for each query the mass on the EOT key; for layers of which maps are kept.
    """

    layer: str
    step: int
    rows: Rows
    roles: torch.Tensor
    mass: torch.Tensor
    map: torch.Tensor | None = None


@dataclass
class Probe:
    """What was recorded; made by `probe`.

    Attributes:
        records: one per layer and call, in order.
    """

    records: list[Record] = field(default_factory=list)

    def mass(self, branch: Branch = "cond") -> dict[Role, torch.Tensor]:
        """Role → mass `[layers, steps]` in the order of `layers`, a mean over rows; NaN where nothing was recorded."""
        names, steps = self.layers, self.steps
        total = {role: torch.full((len(names), steps), torch.nan) for role in Role}
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
        """How many calls of the UNet there were since a prompt was encoded, at most."""
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
        """Write a picture: a heat map of layers × steps per role and branch. Needs matplotlib (`memkern[plot]`)."""
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
        """`[steps, h, w]`: how much of its attention each place gives to EOT, in the first blocks at full resolution.

        A mean over those layers, their heads and the rows of the branch. Memorized images show it brightly in the
        last steps (Chen et al., "Exploring Local Memorization in Diffusion Models via Bright Ending Attention", 2025).
        """
        found: dict[int, list[torch.Tensor]] = defaultdict(list)
        for record in self.records:
            for index, row in enumerate(record.rows):
                if record.map is not None and row is not None and row.branch == branch:
                    found[record.step].append(record.map[index])
        if not found:
            raise ValueError(f"maps: no layer was called for a {branch} row that the pipeline encoded")
        return torch.stack([torch.stack(found[step]).mean(0).cpu() for step in sorted(found)])

    def plot_maps(self, path: str | Path, branch: Branch = "cond", count: int = 8) -> None:
        """Write a picture of `count` of the `maps`, evenly spread over the steps. Needs matplotlib."""
        pyplot, maps = _pyplot(), self.maps(branch)
        chosen = torch.linspace(0, len(maps) - 1, min(count, len(maps))).round().int().tolist()
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


class LayerHook:
    """A forward pre-hook on one layer that computes what it is about to attend to, and leaves it alone."""

    reads_only = True

    def __init__(self, name: str, owner: Recorder, *, mapped: bool) -> None:
        self.name, self.owner, self.mapped = name, owner, mapped

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def __call__(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        if isinstance(context, torch.Tensor):
            self.owner.record(self.name, attn, x, context, mapped=self.mapped)


class Recorder:
    """The hooks of one probe, and where they write."""

    def __init__(self, patched: Patch, probe: Probe) -> None:
        self.patch, self.probe = patched, probe
        self.step, self.prompt = -1, patched.prompt_number
        self.sample: tuple[int, int] | None = None
        self._last: tuple[weakref.ref[torch.Tensor], int | None, Rows] | None = None
        unet = patched.pipe.unet
        layers = cross_attention_layers(unet)
        first = layers[0][0].split(".")[:2] if layers else []
        self._handles = [unwrapped(unet).register_forward_pre_hook(self.count, with_kwargs=True)]
        for name, attn in layers:
            hook = LayerHook(name, self, mapped=name.split(".")[:2] == first)
            self._handles.append(attn.register_forward_pre_hook(hook, with_kwargs=True))

    def count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The UNet is called."""
        self.step = self.step + 1 if self.prompt == self.patch.prompt_number else 0
        self.prompt = self.patch.prompt_number
        sample = kwargs.get("sample", args[0] if args else None)
        self.sample = None if sample is None else tuple(sample.shape[-2:])

    def record(self, name: str, attn: Any, x: torch.Tensor, context: torch.Tensor, *, mapped: bool) -> None:
        """Compute and keep the mass of one call of a layer."""
        stage, rows = self.patch.watching, self._rows(context)
        roles = stage.roles(rows, context.shape[1])
        source = stage.source(context, rows, stage.active(name, x.shape[1]), "torch", coalesced=False)
        if source is None:
            source = edited(context, Plan.identity(*context.shape[:2]), backend="torch", coalesced=False)
        size = layer_size(x.shape[1], self.sample) if mapped else None
        mass, on_eot = attention_mass(attn, x, source, None if size is None else roles == Role.EOT)
        positions = torch.zeros(context.shape[:2], device=mass.device).scatter_add_(1, source.keys.index, mass)
        shaped = None if on_eot is None or size is None else on_eot.view(-1, *size)
        self.probe.records.append(Record(name, self.step, rows, roles, positions, shaped))

    def _rows(self, context: torch.Tensor) -> Rows:
        version = None if context.is_inference() else context._version
        if self._last is None or self._last[0]() is not context or self._last[1] != version:
            self._last = weakref.ref(context), version, recognise(context, self.patch.encodings)
        return self._last[2]

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()


def attention_mass(
    attn: Any, x: torch.Tensor, source: Source, among: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The mass on each of the source's keys, float32 `[B, n]`, and for each query that on the keys `among`.

    Args:
        x: hidden states `[B, N, C]`.
        among: bool `[B, L]` on the host, positions; then the second result is float32 `[B, N]`.
    """
    keys = source.keys
    k = split_heads(source.project(attn)[0], attn.heads)  # [B, H, n, D]
    bias = keys.bias[:, None, None]  # [B, 1, 1, n]
    q = split_heads(attn.to_q(x), attn.heads)
    for attenuation in source.attenuation:
        k = k * attenuation.factors(q, k, attn.scale).unsqueeze(-1).to(k.dtype)
    chosen = None if among is None else among.to(x.device).gather(1, keys.index).to(torch.float32)[:, None, :, None]
    total = torch.zeros(k.shape[0], k.shape[2], device=x.device)
    mapped = []
    size = max(1, BLOCK_BYTES // max(1, 4 * k.shape[0] * k.shape[1] * k.shape[2]))
    for part in torch.split(q, size, 2):
        logits = (part @ k.mT).float() * attn.scale + bias
        p = logits.softmax(-1).nan_to_num()  # a row whose keys are all excluded attends to nothing
        total += p.sum((1, 2))
        if chosen is not None:
            mapped.append((p @ chosen).squeeze(-1).mean(1))
    mass = total / (attn.heads * x.shape[1])
    return mass.masked_fill(keys.bias == -torch.inf, 0), torch.cat(mapped, 1) if mapped else None


@contextmanager
def probe(pipe: Any) -> Iterator[Probe]:
    """Record the attention mass per role, layer and step of what `pipe` generates inside the `with` block.

    It works on a patched pipeline and on one that is not: that is patched with "none" meanwhile, which changes no
    image. Nothing but the record stays.

    Yields:
        A `Probe`.

    Raises:
        TypeError, ValueError: `pipe` cannot be patched.
    """
    own = find(pipe)
    patched = own if own is not None else patch(pipe, "none", accelerate=False, on_unknown="pass")
    found = Probe()
    with patched.watched():
        recorder = Recorder(patched, found)
        try:
            yield found
        finally:
            recorder.remove()
            if own is None:
                patched.remove()


def _short(name: str) -> str:
    """A layer's dotted name without what all have."""
    return name.replace("_blocks", "").replace(".attentions", "").replace(".transformer", "").removesuffix(".attn2")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plotting needs matplotlib: pip install memkern[plot]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

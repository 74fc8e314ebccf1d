"""The measurements as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .measured import Run, Timed
from .turns import Spread

MIB = 2**20


def table(runs: Sequence[Run]) -> str:
    """A table with a row per run; medians, with quartiles in brackets."""
    columns: dict[str, Callable[[Run], str]] = {
        "pipeline": lambda run: _safe(run.name),
        "UNet step, ms": lambda run: _time(run.step),
        "ratio": lambda run: _ratio(run.step),
        "encode_prompt, ms": lambda run: _time(run.encode),
        "ratio ": lambda run: _ratio(run.encode),
        "host, ms": lambda run: _time(run.host),
        "ratio  ": lambda run: _ratio(run.host),
        "peak, MiB": lambda run: "–" if run.peak is None else f"{run.peak / MIB:.1f}",
        "kept, MiB": lambda run: f"{run.kept / MIB:.1f}",
    }
    lines = [f"| {' | '.join(name.strip() for name in columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(cell(run) for cell in columns.values())} |" for run in runs]
    return "\n".join(lines) + "\n"


def layers(runs: Sequence[Run]) -> str:
    """A table of the layers' choices for the context, a row for equal choices with equal reasons; "" without any."""
    lines = []
    for run in runs:
        alike: dict[str, list[str]] = {}
        for name, layer in run.layers.items():
            alike.setdefault(layer["choice"], []).append(name)
        for choice, (first, *others) in alike.items():
            names = f"{first}{f' and {len(others)} more' if others else ''}"
            lines.append(f"| {_safe(run.name)} | {names} | {_safe(choice)} |")
    return "\n".join(["| pipeline | layers | choice |", "| --- | --- | --- |", *lines, ""]) if lines else ""


def described(values: Mapping[str, Any]) -> str:
    """A table with a row per value."""
    lines = [f"| {name} | {_safe(_shown(value))} |" for name, value in values.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines, ""])


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return " × ".join(map(_shown, value)) if all(isinstance(one, int) for one in value) else ", ".join(value)
    return "the pipeline's" if value is None else str(value)


def _time(timed: Timed | None) -> str:
    return "–" if timed is None else _cell(timed.spread, _digits(timed.spread.median))


def _ratio(timed: Timed | None) -> str:
    spread = None if timed is None else timed.ratio
    return "–" if spread is None else _cell(spread, 3)


def _digits(value: float) -> int:
    """The number of decimals that gives three digits or more."""
    return 0 if value >= 1000 else 1 if value >= 100 else 2


def _cell(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}–{spread.high:.{digits}f})"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

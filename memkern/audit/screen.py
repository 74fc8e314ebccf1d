"""`memkern screen`: the prompts of a list that a model memorized, by scores of which one alone needs an image."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .listed import listed
from .manifest import Contents, grown, write_manifest
from .models import EMBEDDED, Model, opened, settings_of
from .processes import place, wait
from .prompts import Prompt
from .protocol import protocol
from .results import cell
from .roc import Roc
from .scores import DEFAULT_SCORES, SCORES, Passes

BATCH, STEPS, SCHEDULER = 8, 50, "DDIM"


@dataclass(frozen=True)
class Screened:
    """The result of a screen.

    Attributes:
        rows: "prompt_id", "prompt", "label" and the scores, means over seeds; the highest of the first score first.
        curves: score → its curve, if there are labels of both kinds.
        path: of `screen.csv`.
    """

    rows: list[dict[str, Any]]
    curves: dict[str, Roc]
    path: Path

    def __str__(self) -> str:
        lines = [f"{'  '.join(f'{row[name]:8.3f}' for name in _names(row))}  {row['prompt']}" for row in self.rows[:20]]
        head = ["  ".join(f"{name:>8}" for name in _names(self.rows[0])) + "  prompt"] if self.rows else []
        more = [f"… {len(self.rows) - 20} more in {self.path}"] if len(self.rows) > 20 else []
        quality = [
            f"{name}: AUC {roc.auc:.3f}, {100 * roc.true_at_few_false:.0f} % found at 1 % false alarms "
            f"({roc.positives} memorized, {roc.negatives} others)"
            for name, roc in self.curves.items()
        ]
        return "\n".join([*head, *lines, *more, *quality])


def screen(
    *,
    out: str | Path,
    model: Any = EMBEDDED,
    config: str | None = None,
    loras: Sequence[str] = (),
    prompts: str | Path | None = None,
    limit: int | None = None,
    scores: Sequence[str] = DEFAULT_SCORES,
    seeds: Sequence[int] = (0,),
    batch: int = BATCH,
    dtype: str | None = None,
    device: str | None = None,
    generator_device: str | None = None,
    quiet: bool = False,
) -> Screened | None:
    """Score prompts by how likely the model memorized them; no image is generated, and no prompt is blocked.

    If run again it continues where it stopped, and takes more prompts and seeds; under `accelerate launch` the prompts
    are split among the processes.

    Args:
        out: the folder of `screen.csv`, `screen.json`, `roc.png` and `manifest.json`.
        model, config, loras, prompts, limit: see `run`; a column "memorized" or "label" of the prompts' file is
            compared with the scores.
        scores: of `SCORES`; the table is sorted by the first.
        seeds: of the noise; scores are means over them.
        batch: how many prompts at once.
        dtype, device, generator_device: see `Protocol`.
        quiet: no progress bar.

    Returns:
        The result; None in a process that is not the first.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `run`.
        OSError: the folder cannot be written; finished scores stay.
    """
    out = Path(out)
    unknown = [name for name in scores if name not in SCORES]
    if unknown or not scores:
        raise ValueError(f"scores: expected some of {', '.join(SCORES)}, got {', '.join(unknown) or 'none'}")
    made = protocol(
        seeds=tuple(seeds),
        steps=STEPS,
        scheduler=SCHEDULER,
        batch=batch,
        dtype=dtype,
        device=device,
        generator_device=generator_device,
    )
    source = Model(model, config, tuple(loras))
    scores = tuple(dict.fromkeys(scores))
    settings = settings_of(source, made) | {"scores": list(scores)}
    asked = Contents(listed(source, prompts, None, limit), [], list(made.seeds), settings)
    rank, world = place()
    if rank == 0:
        write_manifest(out, grown(out, asked), {})
    wait(world)
    held = grown(out, asked)
    done = _done(out)
    wait(world)
    left = [(prompt, seed) for seed in held.seeds for prompt in held.prompts if (prompt.id, seed) not in done]
    if mine := left[rank::world]:
        with opened(source, made, rank) as pipe, tqdm(total=len(mine), unit="prompt", disable=quiet or rank > 0) as bar:
            for seed, some in _batches(mine, made.batch):
                _append(out, rank, seed, some, _scored(pipe, some, seed, scores, made.generators_of(pipe), made.steps))
                bar.update(len(some))
    wait(world)
    return _report(out, held, scores) if rank == 0 else None


def _batches(left: Sequence[tuple[Prompt, int]], batch: int) -> Iterator[tuple[int, list[Prompt]]]:
    for seed in dict.fromkeys(seed for _, seed in left):
        own = [prompt for prompt, other in left if other == seed]
        for start in range(0, len(own), batch):
            yield seed, own[start : start + batch]


def _scored(
    pipe: Any, prompts: Sequence[Prompt], seed: int, scores: Sequence[str], device: str, steps: int
) -> list[dict[str, float]]:
    generators = [torch.Generator(device).manual_seed(seed) for _ in prompts]
    passes = Passes(pipe, [prompt.text for prompt in prompts], generators, steps)
    found = {name: SCORES[name](passes).tolist() for name in scores}
    return [{name: round(values[index], 6) for name, values in found.items()} for index in range(len(prompts))]


def _append(out: Path, rank: int, seed: int, prompts: Sequence[Prompt], found: Sequence[dict[str, float]]) -> None:
    """Append a line per prompt to this process's file; a killed process leaves whole lines, or half of the last one."""
    path = out / "scores" / f"{rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": prompt.id, "seed": seed, "scores": one}) for prompt, one in zip(prompts, found, strict=True)
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(lines) + "\n")


def _done(out: Path) -> dict[tuple[str, int], dict[str, float]]:
    found = {}
    for path in sorted(out.glob("scores/*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                found[row["id"], row["seed"]] = row["scores"]
            except (ValueError, KeyError, TypeError):
                continue
    return found


def _report(out: Path, held: Contents, scores: Sequence[str]) -> Screened:
    done = _done(out)
    rows: list[dict[str, Any]] = [
        {"prompt_id": prompt.id, "prompt": prompt.text, "label": prompt.label}
        | {name: sum(done[prompt.id, seed][name] for seed in held.seeds) / len(held.seeds) for name in scores}
        for prompt in held.prompts
    ]
    rows.sort(key=lambda row: -row[scores[0]])
    labelled = [row for row in rows if row["label"] is not None]
    curves = {name: Roc.of([row[name] for row in labelled], [row["label"] for row in labelled]) for name in scores}
    found = Screened(rows, {name: roc for name, roc in curves.items() if roc is not None}, out / "screen.csv")
    _write_csv(found)
    document = {
        name: {
            "auc": roc.auc,
            "true_at_1_percent_false": roc.true_at_few_false,
            "memorized": roc.positives,
            "others": roc.negatives,
        }
        for name, roc in found.curves.items()
    }
    (out / "screen.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _plot(found.curves, out / "roc.png")
    return found


def _write_csv(found: Screened) -> None:
    partial = found.path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(found.rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in found.rows:
            label = "" if row["label"] is None else int(row["label"])
            writer.writerow({name: cell(value) for name, value in row.items()} | {"label": label})
    os.replace(partial, found.path)


def _plot(curves: dict[str, Roc], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not curves:
        return
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    # Curves may lie on each other: the later ones are dashed.
    for (name, roc), dashes in zip(curves.items(), itertools.cycle(("-", "--", ":")), strict=False):
        axes.plot(roc.false, roc.true, dashes, label=f"{name}: AUC {roc.auc:.3f}")
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    axes.set_xlabel("others above the threshold, share")
    axes.set_ylabel("memorized above the threshold, share")
    axes.legend()
    figure.savefig(path, dpi=110)


def _names(row: dict[str, Any]) -> list[str]:
    return [name for name in row if name in SCORES]

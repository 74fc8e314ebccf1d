"""An audit from end to end: prompts, images, measures, report. Resumable, and split among processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..policy import Policy
from ..presets import DEFAULT_POLICIES
from .images import Job, is_done, make
from .listed import listed
from .manifest import Contents, grown, write_manifest
from .methods import methods, split
from .metrics import Weights, metrics
from .models import EMBEDDED, Model, opened, settings_of
from .processes import place, wait
from .protocol import protocol as protocol_of
from .report import write_report
from .results import COPY, check_threshold, rows, write_csv


def run(
    *,
    out: str | Path,
    model: Any = EMBEDDED,
    config: str | None = None,
    loras: Sequence[str] = (),
    prompts: str | Path | None = None,
    references: str | None = None,
    policies: str | Sequence[str | Path | Policy] = DEFAULT_POLICIES,
    limit: int | None = None,
    protocol: str | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    generator_device: str | None = None,
    batch: int | None = None,
    sscd: str | Path | None = None,
    sscd_size: int | None = None,
    clip: str | None = None,
    aesthetic: str | Path | None = None,
    lpips: str | Path | None = None,
    threshold: float = COPY,
    quiet: bool = False,
) -> Path:
    """Audit a model: measure its memorization, and the effect of each policy on that and on its images.

    If run again with the same settings it continues where it stopped; with more policies, seeds or prompts it generates
    only what is missing. Under `accelerate launch` the images are split among the processes, and the first of them
    measures and reports.

    Args:
        out: the folder of `results.csv`, `report.html`, `grid.png`, `manifest.json` and `images/`.
        model: "embedded" with its own prompts, a diffusers folder or hub name, a `.safetensors` file of a whole
            checkpoint, or a loaded pipeline.
        config: a folder or hub name with the configuration of a single file.
        loras: `.safetensors` files, "FILE" or "FILE:weight".
        prompts: a .csv, .tsv, .jsonl or .txt file; see `read_prompts`.
        references: a folder or column of training images.
        policies: presets, `Policy` objects, JSON files of them, "none" for the unpatched pipeline (always included), or
            alternatives: "random-tokens:4", "random-numbers:4", "late-guidance:0.5", "wen:3".
        limit: how many prompts, from the start.
        protocol: "kim-no", or None for one image of 20 steps; the next arguments replace its parts.
        seeds, steps, guidance, scheduler, dtype, device, generator_device, batch: see `Protocol`.
        sscd, sscd_size, clip, aesthetic, lpips: see `Weights`. A metric without weights is skipped, with a note.
        threshold: the similarity above which an image counts as a copy.
        quiet: no progress bars and no printed notes.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError, TypeError, ValueError: prompts, weights or policies that are missing or wrong, a model that
            cannot be patched (with the reasons), or a folder with another audit.
        OSError: the folder cannot be written; finished images stay.
    """
    out = Path(out)
    given = split(policies) if isinstance(policies, str) else policies
    chosen = methods([given] if isinstance(given, Policy) else given)
    check_threshold(threshold)
    made = protocol_of(
        protocol,
        seeds=None if seeds is None else tuple(seeds),
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        dtype=dtype,
        device=device,
        generator_device=generator_device,
        batch=batch,
    )
    source = Model(model, config, tuple(loras))
    of = listed(source, prompts, references, limit)
    rank, world = place()
    weights = Weights(_path(sscd), sscd_size, clip, _path(aesthetic), _path(lpips))
    measures, missing = metrics(weights, "cuda" if torch.cuda.is_available() else "cpu")
    asked = Contents(of, chosen, list(made.seeds), settings_of(source, made))
    if rank == 0:
        described = {name: value for metric in measures for name, value in metric.described.items()}
        write_manifest(out, grown(out, asked), described | {"threshold": threshold, "not_measured": missing})
    wait(world)
    held = grown(out, asked)
    jobs = [Job(one, prompt, seed) for one in held.methods for prompt in held.prompts for seed in held.seeds]
    # The missing images are listed before any is generated, so that all processes split the same list.
    left = [job for job in jobs if not is_done(job.path(out))]
    wait(world)
    if mine := left[rank::world]:
        with opened(source, made, rank) as pipe, _bar("images", len(mine), quiet or rank > 0) as bar:
            options = {"num_inference_steps": made.steps, "guidance_scale": made.guidance}
            generators = made.generators_of(pipe)
            make(pipe, mine, out, options, bar.update, batch=made.batch, generator_device=generators)
    wait(world)
    if rank > 0:
        return out / "report.html"
    broken: dict[str, str] = {}
    found = rows(out, held.prompts, held.methods, held.seeds, measures, broken, threshold)
    table = write_csv(out, tqdm(found, total=len(jobs), desc="measures", unit="image", disable=quiet))
    notes = [f"not measured: {line}" for line in missing]
    notes += [f"{len(broken)} references are no images and were skipped: {', '.join(sorted(broken))}"] if broken else []
    for line in () if quiet else notes:
        print(line)
    return write_report(out, held, table, notes, threshold)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _bar(what: str, count: int, quiet: bool) -> Any:
    return tqdm(total=count, desc=what, unit="image", disable=quiet)

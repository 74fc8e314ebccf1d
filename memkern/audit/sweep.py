"""`memkern sweep`: the best policy for a model, by successive halving over a grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..actions import whole
from ..policy import Policy
from .front import Candidate, Limits, Swept, best, fronted, ordered, write
from .grid import EVERYWHERE, grid
from .images import Job, is_done, make, read
from .judges import Judge, judge_of
from .listed import listed
from .manifest import Contents, grown, write_manifest
from .methods import UNMITIGATED, Method, method
from .metrics import Weights
from .models import EMBEDDED, Model, opened, settings_of
from .prompts import Prompt
from .protocol import Protocol, protocol
from .results import COPY, check_threshold
from .summary import Summary, interval

DEFAULT_PATTERNS = (
    "swap-pad",
    "swap-pad-zero-eot",
    "zero-pad:{0.6..1.0:0.05}",
    "zero-pad-last:{0.6..1.0:0.05}",
    "zero-pad-last:0.9@down+mid & zero-pad-last:{0.6..0.8:0.1}@up",
)
BATCH = 8
RUNGS, LEAST = 3, 6
"""The number of rounds, and the least number of policies in the last one."""


def sweep(
    *,
    out: str | Path,
    model: Any = EMBEDDED,
    config: str | None = None,
    loras: Sequence[str] = (),
    prompts: str | Path | None = None,
    references: str | None = None,
    limit: int | None = None,
    policies: Sequence[str] = DEFAULT_PATTERNS,
    layers: Sequence[str] = (EVERYWHERE,),
    steps: Sequence[str] = ("0-1",),
    seeds: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 7),
    check_seeds: Sequence[int] = (),
    max_copies: float = 0.03,
    max_loss: float = 0.03,
    inference_steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    batch: int = BATCH,
    sscd: str | Path | None = None,
    clip: str | None = None,
    threshold: float = COPY,
    quiet: bool = False,
) -> Swept:
    """Find the policy with few copies and the least loss of fidelity, among a grid.

    Each round measures the policies that are left on more prompts and seeds, and keeps the better half: those that are
    farthest from the nearer of two limits, `max_copies` and `max_loss`. The last round has all. Images stay in the
    folder, so that a sweep continues where it stopped, and a larger grid generates only the missing ones.

    Args:
        out: the folder of `sweep.csv`, `sweep.json`, `sweep.md`, `front.png`, `best.json` and `images/`.
        model, config, loras, prompts, references, limit: see `run`. Prompts with a training image, or labelled as
            memorized, measure copies; the others measure fidelity. Both kinds are needed.
        policies, layers, steps: see `grid`.
        seeds: of the sweep; check_seeds: of the check of the winner, other ones.
        max_copies: the share of copies that the winner may have.
        max_loss: the loss that it may have in any measure of fidelity, as a share or in the measure's own unit.
        inference_steps, guidance, scheduler, dtype, device, batch: see `Protocol`.
        sscd, clip, threshold: see `run`; without SSCD copies are found by pixels, and without CLIP ordinary images
            are compared with the unpatched pipeline's. The embedded model has its own measures.
        quiet: no progress bars.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `run`; or prompts of one kind only.
        OSError: the folder cannot be written; finished images stay.
    """
    out = Path(out)
    embedded_model = model == EMBEDDED
    check_threshold(threshold)
    if inference_steps is not None:
        whole("inference_steps", inference_steps, 1)  # a protocol's "steps", which is another option here
    made = protocol(
        seeds=tuple(seeds),
        steps=inference_steps,
        # The numbers of `memkern demo`.
        guidance=5.0 if guidance is None and embedded_model else guidance,
        scheduler=scheduler,
        dtype=dtype,
        device=device,
        batch=batch,
    )
    for name, most in (("max_copies", max_copies), ("max_loss", max_loss)):
        if not 0 <= most <= 1:
            raise ValueError(f"{name}: expected a share in [0, 1], got {most}")
    fresh = Protocol(seeds=tuple(check_seeds)).seeds if check_seeds else ()
    if both := sorted({*fresh} & {*made.seeds}):
        raise ValueError(f"check_seeds: expected seeds that the sweep does not use, got {', '.join(map(str, both))}")
    limits = Limits(max_copies, max_loss)
    candidates = [(method(policy), policy) for policy in grid(policies, layers, steps) if policy != Policy()]
    if not candidates:
        raise ValueError(f"policies: expected at least one that edits something, got {', '.join(policies)}")
    source = Model(model, config, tuple(loras))
    weights = Weights(None if sscd is None else Path(sscd), None, clip)
    judge = judge_of(embedded_model and prompts is None, weights, threshold)
    of = listed(source, prompts, references, limit)
    settings = settings_of(source, made)
    asked = Contents(of, [Method(UNMITIGATED), *(one for one, _ in candidates)], list(made.seeds), settings)
    write_manifest(out, grown(out, asked), judge.described)
    with opened(source, made) as pipe:
        measurer = _Measurer(pipe, out, made, judge, quiet)
        for rung in range(RUNGS):
            prompts_of_round, seeds_of_round = _round(of, made.seeds, rung)
            measured = measurer.measured(candidates, prompts_of_round, seeds_of_round)
            found = ordered(measured, limits)
            if rung < RUNGS - 1:
                kept = {one.method.name for one in found[: max(LEAST, -(-len(found) // 2))]}
                candidates = [one for one in candidates if one[0].name in kept]
        winner = best(found, limits)
        checked = None
        if fresh:
            (checked,) = measurer.measured([(winner.method, winner.policy)], of, fresh)
    swept = Swept(found, winner, checked, out)
    write(swept)
    return swept


class _Measurer:
    """Generates the missing images of candidates, and measures them."""

    def __init__(self, pipe: Any, out: Path, made: Protocol, judge: Judge, quiet: bool) -> None:
        self.pipe, self.out, self.made, self.judge, self.quiet = pipe, out, made, judge, quiet

    def measured(
        self,
        candidates: Sequence[tuple[Method, Policy | None]],
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
    ) -> list[Candidate]:
        """Each candidate, measured against the unpatched pipeline on these prompts and seeds."""
        methods = [Method(UNMITIGATED), *(one for one, _ in candidates)]
        jobs = [Job(one, prompt, seed) for one in methods for prompt in prompts for seed in seeds]
        left = [job for job in jobs if not is_done(job.path(self.out))]
        options = {"num_inference_steps": self.made.steps, "guidance_scale": self.made.guidance}
        with tqdm(total=len(left), desc=f"{len(candidates)} policies", unit="image", disable=self.quiet) as bar:
            generators = self.made.generators_of(self.pipe)
            make(self.pipe, left, self.out, options, bar.update, batch=self.made.batch, generator_device=generators)
        values = {one.name: self._judged(one, prompts, seeds) for one in methods}
        return fronted([self._candidate(*one, values, len(prompts) * len(seeds)) for one in candidates])

    def _judged(
        self, one: Method, prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> dict[str, dict[str, list[float]]]:
        """Measure → prompt → values over seeds; "copies" and "similarity" if memorized, else the fidelity."""
        found: dict[str, dict[str, list[float]]] = {}
        for prompt in prompts:
            pairs = [
                (
                    read(Job(one, prompt, seed).path(self.out))[0],
                    read(Job(Method(UNMITIGATED), prompt, seed).path(self.out))[0],
                )
                for seed in seeds
            ]
            for name, values in self.judge(prompt, pairs).items():
                found.setdefault(name, {})[prompt.id] = values
        return found

    def _candidate(
        self, one: Method, policy: Policy | None, values: dict[str, dict[str, dict[str, list[float]]]], images: int
    ) -> Candidate:
        own, plain = values[one.name], values[UNMITIGATED]
        copies = Summary.of(list(own["copies"].values()))
        assert copies is not None
        fidelity, loss = {}, {}
        for name in own:
            if name not in ("copies", "similarity"):
                fidelity[name] = float(np.mean([np.mean(row) for row in own[name].values()]))
                lost = np.array([np.mean(plain[name][prompt]) - np.mean(row) for prompt, row in own[name].items()])
                loss[name] = (float(lost.mean()), *interval(lost))
        similarity = float(np.mean([np.mean(row) for row in own["similarity"].values()]))
        return Candidate(one, policy, copies, similarity, fidelity, loss, images)


def _round(prompts: Sequence[Prompt], seeds: Sequence[int], rung: int) -> tuple[list[Prompt], list[int]]:
    """The prompts and seeds of a round: growing parts, with equal shares of memorized and ordinary prompts."""
    kinds = [[p for p in prompts if is_memorized(p)], [p for p in prompts if not is_memorized(p)]]
    if not all(kinds):
        raise ValueError(
            f"prompts: a sweep needs memorized and ordinary ones, got {len(kinds[0])} and {len(kinds[1])}; "
            "give training images or a column memorized"
        )
    share = 2 ** (rung - RUNGS + 1)
    chosen = [prompt for kind in kinds for prompt in kind[: max(2, round(len(kind) * share))]]
    return chosen, list(seeds[: max(2, round(len(seeds) * share))])


def is_memorized(prompt: Prompt) -> bool:
    """True if images of the prompt are checked for copies."""
    return prompt.reference is not None if prompt.label is None else prompt.label

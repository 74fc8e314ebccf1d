"""`memkern bench`: a pipeline unpatched and under each policy, measured in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..actions import whole
from ..info import info
from ..policy import Policy
from ..presets import DEFAULT_POLICIES
from .given import LEAST_ROUNDS, checked_inputs, checked_pipeline, checked_policies, described
from .measure import WARM_UP, Plan, encodings, runs
from .results import Bench
from .subject import Subject
from .twin import is_compiled

PROMPT = "a photograph of an astronaut riding a horse"
ROUNDS = 15


@torch.no_grad()
def bench(
    pipe: Any,
    policies: Sequence[Policy | str] = DEFAULT_POLICIES,
    *,
    compile: bool = False,
    rounds: int = ROUNDS,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    prompt: str = PROMPT,
    inputs: dict[str, Any] | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> Bench:
    """Measure a pipeline unpatched and under each policy: a step of its UNet, `encode_prompt`, host time, memory.

    Copies of the pipeline with the same weights are measured in turn, each at the first step of its own request. The
    pipeline itself is not called and does not change, patched or not; nor do torch's random generators.

    Args:
        pipe: a pipeline with a UNet that `memkern.patch` can patch.
        policies: as in `patch`; "none" accelerates and edits nothing.
        compile: True to measure UNets compiled by `torch.compile` too; those of a compiled pipeline always are.
        rounds: how often each call is timed, at least 3.
        batch: how many images are generated at once.
        size: height and width of the image, in pixels; None is the pipeline's own.
        prompt: of every image; its length decides how many keys are left.
        inputs: further arguments of the pipeline, such as `{"image": image}`.
        out: a folder for `bench.json`, `bench.md` and `bench.png`; None writes nothing.
        quiet: no progress bar.

    Returns:
        A `Bench`, to print.

    Raises:
        TypeError, ValueError: an argument that is not valid, or a pipeline that cannot be patched or has no UNet.
        OSError: the folder cannot be written.
    """
    unet, chosen = checked_pipeline(pipe), checked_policies(policies)
    whole("rounds", rounds, LEAST_ROUNDS)
    given = checked_inputs(pipe, batch=batch, size=size, prompt=prompt, inputs=inputs)
    if out is not None:
        # A folder that cannot be made should fail before the measurement, not after it.
        Path(out).mkdir(parents=True, exist_ok=True)
    notes, modes = [], [False]
    if compile or is_compiled(pipe.unet):
        modes = [False, True]
        if not compile:
            notes.append("the pipeline's UNet is compiled: compiled copies are measured as well")
    phases = 1 + len(modes) + (unet.device.type == "cpu")
    total = phases * (1 + len(chosen)) * (rounds + WARM_UP)
    with (
        torch.random.fork_rng(devices=[unet.device] if unet.device.type == "cuda" else []),
        ExitStack() as stack,
        tqdm(total=total, desc="bench", unit="call", disable=quiet) as bar,
    ):
        subjects = []
        for policy in (None, *chosen):
            subjects.append(Subject(pipe, policy))
            stack.callback(subjects[-1].close)
        plan = Plan(given, rounds, unet.device, bar.update)
        found = runs(subjects, plan, encoded=encodings(subjects, plan))
        if len(modes) > 1:
            with _room_to_compile(len(subjects)):
                found += runs(subjects, plan, compiled=True)
        # A phase that could not be measured has no calls.
        bar.total = bar.n
        step = subjects[0].given
        assert step is not None
    settings = {
        **described(pipe, step),
        "prompt": prompt,
        "batch": batch,
        "size": "the pipeline's" if size is None else list(size),
        "inputs": sorted(inputs or {}),
        "rounds": rounds,
    }
    result = Bench(settings, asdict(info()), tuple(found), tuple(notes))
    return result if out is None else result.written(out)


@contextmanager
def _room_to_compile(count: int) -> Iterator[None]:
    """Let torch compile `count` copies of a UNet, each as its own graph."""
    import torch._dynamo

    config = torch._dynamo.config
    with config.patch(recompile_limit=max(config.recompile_limit, 8 + 2 * count)):
        yield

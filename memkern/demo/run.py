"""The demonstration on any model: the same prompts and seed, unpatched and under each policy, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..pipelines import PromptStatus, patched, unpatch
from ..policy import Policy
from ..roles import Role
from .grid import draw_grid

PROMPTS = (
    "a red circle on a blue background",
    "the annual report of a small seaside town, front cover",
    "two green triangles!",
    "",
)


def demonstrate(
    pipe: Any,
    prompts: Sequence[str],
    policies: Sequence[Policy],
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    guidance: float = 7.5,
) -> Path:
    """Generate every prompt unpatched and under each policy from the same seeds, and write `grid.png`; its path."""
    unpatch(pipe)
    pipe.set_progress_bar_config(disable=True)
    images = []
    with tqdm(total=len(prompts) * (1 + len(policies)) * len(seeds), desc="images", unit="image") as bar:
        for prompt in prompts:
            row = []
            for policy in (None, *policies):
                with nullcontext() if policy is None else patched(pipe, policy):
                    for seed in seeds:
                        generator = torch.Generator("cpu").manual_seed(seed)
                        options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator}
                        row.append(pipe(prompt, **options).images[0])
                        bar.update()
            images.append(row)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "grid.png"
    columns = [f"{name}\nseed {seed}" for name in ("unpatched", *policies) for seed in seeds]
    draw_grid(images, [prompt or "(empty prompt)" for prompt in prompts], columns).save(path)
    return path


def roles_table(pipe: Any, prompts: Sequence[str], policies: Sequence[Policy]) -> str:
    """Markdown table of the roles of every prompt and of the empty negative prompt, and of each policy's edits."""
    lines = [
        f"| prompt | policy | branch | {' | '.join(role.name for role in Role)} | edits |",
        f"| --- | --- | --- |{' ---: |' * len(Role)} --- |",
    ]
    for policy in policies:
        with patched(pipe, policy) as patch:
            pipe.encode_prompt(list(prompts), pipe.device, 1, True)
            rows = patch.status().prompts[: len(prompts) + 1]  # the negative prompts are all equal
        names = [prompt.replace("|", "\\|") or "(empty)" for prompt in prompts]
        lines += [_line(name, policy, row) for name, row in zip([*names, "(negative)"], rows, strict=True)]
    return "\n".join(lines) + "\n"


def _line(name: str, policy: Policy, row: PromptStatus) -> str:
    counts = " | ".join(str(row.roles[role]) for role in Role)
    return f"| {name} | {policy} | {row.branch} | {counts} | {row.changes} |"

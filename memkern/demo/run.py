"""The demonstration: the same prompts and seeds through an unpatched and a patched pipeline, side by side."""

from __future__ import annotations

from dataclasses import dataclass
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
POLICIES = ("swap-pad-zero-eot", "zero-pad:0.7")


@dataclass(frozen=True)
class Demonstration:
    """Where the results are: a PNG grid, and the table of roles and edits, in Markdown."""

    grid: Path
    table: Path


def demonstrate(
    pipe: Any,
    prompts: list[str],
    policies: list[Policy],
    out: Path,
    *,
    steps: int = 20,
    seed: int = 0,
    guidance: float = 7.5,
) -> Demonstration:
    """Generate every prompt unpatched and under each policy from one seed; write `grid.png` and `roles.md`."""
    unpatch(pipe)
    images: list[list[Any]] = []
    lines = [
        f"| prompt | policy | branch | {' | '.join(role.name for role in Role)} | what was edited |",
        f"| --- | --- | --- |{' ---: |' * len(Role)} --- |",
    ]
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(prompts) * (1 + len(policies)), desc="images", unit="image") as bar:
        for prompt in prompts:

            def picture(prompt: str = prompt) -> Any:
                generator = torch.Generator("cpu").manual_seed(seed)
                made = pipe(prompt, num_inference_steps=steps, guidance_scale=guidance, generator=generator).images[0]
                bar.update()
                return made

            row = [picture()]
            for policy in policies:
                with patched(pipe, policy) as patch:
                    row.append(picture())
                    lines += [_table_line(prompt, policy, status) for status in patch.status().prompts]
            images.append(row)
    out.mkdir(parents=True, exist_ok=True)
    grid = draw_grid(
        images,
        [prompt or "(empty prompt)" for prompt in prompts],
        ["unpatched", *map(str, policies)],
    )
    result = Demonstration(out / "grid.png", out / "roles.md")
    grid.save(result.grid)
    result.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return result


def _table_line(prompt: str, policy: Policy, status: PromptStatus) -> str:
    shown = (prompt if status.branch == "cond" else "(negative)").replace("|", "\\|")
    counts = " | ".join(str(status.roles[role]) for role in Role)
    return f"| {shown} | {policy} | {status.branch} | {counts} | {status.changes} |"

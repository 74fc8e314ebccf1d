"""The ablations of Kim & No (arXiv 2605.02908, section 3) on a model of yours: a grid of images and a table.

    python examples/ablations.py                                    # the embedded model, its memorized captions
    python examples/ablations.py --model NAME_OR_PATH --prompts FILE.txt --seeds 0,1,2

For each prompt and seed it generates the image of the unpatched pipeline and of each ablation. It compares an image
with the unpatched one of the same seed and, for the embedded model, with the training image, by pixel correlation: that
recognises a copy which shows the same thing in the same place.
"""

from __future__ import annotations

import argparse
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

import memkern
from memkern import demo
from memkern.demo.grid import draw_grid
from memkern.demo.judge import COPY, correlation

ABLATIONS = {
    "(a) EOT, pads zeroed": "zero-eot-pad",
    "(b) prompt from EOT": "prompt-from-eot",
    "(c) prompt zeroed": "zero-prompt",
    "(d) pads from EOT": "pad-from-eot",
    "(e) prompt, pads from EOT": "prompt-pad-from-eot",
    "(f) EOT zeroed": "zero-eot",
    "(g) prompt, EOT from pads": "prompt-eot-from-pad",
    "(h) pads zeroed": "zero-pad:1",
    "method 1": "swap-pad-zero-eot",
    "method 2": "zero-pad:0.7",
    "Ren et al.": "ren:1.25",
}


def generate(pipe: Any, policy: str | None, prompts: list[str], seeds: list[int], options: dict[str, Any]) -> list[Any]:
    """A list of images per prompt, one for each seed."""
    rows = []
    with nullcontext() if policy is None else memkern.patched(pipe, policy):
        for prompt in prompts:
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            made = [pipe(prompt, generator=generator, **options).images[0].convert("RGB") for generator in generators]
            rows.append(made)
    return rows


def similarity(rows: list[Any], others: list[Any]) -> np.ndarray[Any, Any]:
    """Correlation of each image with its counterpart, `[prompts, seeds]`."""
    pairs = zip(rows, others, strict=True)
    return np.array([[correlation(*both) for both in zip(row, theirs, strict=True)] for row, theirs in pairs])


def main() -> None:
    """Generate, draw the grid, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers folder or hub name; default: the embedded model")
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line; default: memorized captions")
    parser.add_argument("--seeds", default="0", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=7.5, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("ablations"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()

    pipe = demo.load() if arguments.model is None else DiffusionPipeline.from_pretrained(arguments.model)
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    known = dict(demo.memorized()) if arguments.model is None else {}
    prompts = arguments.prompts.read_text(encoding="utf-8").splitlines() if arguments.prompts else list(known)
    if not prompts:
        parser.error("--prompts: needed with --model")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    options = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}

    unpatched = generate(pipe, None, prompts, seeds, options)
    training = [[known[prompt]] * len(seeds) for prompt in prompts] if all(p in known for p in prompts) else None
    columns, grid = ["unpatched"], [list(row[:1]) for row in unpatched]
    lines = [
        "| ablation | preset | correlation with the unpatched image | copies of the training image |",
        "| --- | --- | ---: | ---: |",
    ]

    def add(name: str, policy: str, rows: list[Any]) -> None:
        alike = similarity(rows, unpatched).mean()
        copies = "–" if training is None else f"{100 * np.mean(similarity(rows, training) > COPY):.0f} %"
        lines.append(f"| {name} | `{policy}` | {alike:.2f} | {copies} |")

    add("none", "none", unpatched)
    for name, policy in tqdm(ABLATIONS.items(), unit="ablation"):
        rows = generate(pipe, policy, prompts, seeds, options)
        add(name, policy, rows)
        columns.append("\n".join(textwrap.wrap(name, 12)))
        for cells, row in zip(grid, rows, strict=True):
            cells.append(row[0])
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw_grid(grid, prompts, columns, cell=128).save(arguments.out / "grid.png")
    table = "\n".join(lines) + "\n"
    (arguments.out / "table.md").write_text(table, encoding="utf-8")
    print(f"{table}\n{arguments.out / 'grid.png'}")


if __name__ == "__main__":
    main()

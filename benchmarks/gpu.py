"""Tests and benchmarks on a GPU, and their table: `make gpu`, or `python benchmarks/gpu.py` where memkern is installed.

Writes benchmarks/gpu/<card>.md and the raw numbers beside it.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import traceback
from collections import defaultdict
from pathlib import Path

import gpu_steps
import torch

import memkern

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("OUT", ROOT / "benchmarks/gpu"))


def pytest(*arguments: str) -> tuple[int, str]:
    """Run pytest; its status and its last line."""
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    print(done.stdout)
    return done.returncode, done.stdout.strip().splitlines()[-1].strip("= ")


def table(run: dict) -> list[str]:
    """A table per group: times, and the speed-up over the first row, which is the alternative."""
    groups = defaultdict(list)
    for bench in run["benchmarks"]:
        groups[bench["group"]].append((bench["name"], bench["extra_info"]))
    lines = []
    for group, rows in groups.items():
        base = next(info for name, info in rows if name in ("diffusers", "clone", "materialized"))
        lines += [
            "",
            f"### {group}",
            "",
            "| | median, µs (20–80 %) | speed-up | in a CUDA graph, µs | speed-up | predicted, µs | of the floor |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, info in rows:
            low, high = info["quantiles_us"]
            cells = [
                f"{info['median_us']:.1f} ({low:.1f}–{high:.1f})",
                f"{base['median_us'] / info['median_us']:.2f}×",
                f"{info['graph_us']:.1f}",
                f"{base['graph_us'] / info['graph_us']:.2f}×",
                "" if math.isnan(info["model_us"]) else f"{info['model_us']:.1f}",
                f"{info['floor_us'] / info['graph_us']:.0%}",
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Run everything, and write the table even if something failed."""
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no GPU", file=sys.stderr)
        return 1
    card = torch.cuda.get_device_name()
    name = re.sub(r"[^A-Za-z0-9]+", "-", card).strip("-")
    FOLDER.mkdir(parents=True, exist_ok=True)
    raw = FOLDER / f"{name}.json"
    tests, summary = pytest("-m", "gpu", "tests")
    benchmarks, _ = pytest("benchmarks/bench_gpu.py", "--benchmark-only", f"--benchmark-json={raw}")
    lines = [f"# {card}", "", "```", str(memkern.info()), "```", "", f"Tests: {summary}", ""]
    if raw.exists():
        run = json.loads(raw.read_text())
        ceiling = run["benchmarks"][0]["extra_info"]["ceiling"]
        lines.append(
            f"Ceilings measured in this run: copy {ceiling['bytes'] / 1e12:.2f} TB/s, float16 product "
            f"{ceiling['operations'] / 1e12:.0f} TFLOP/s. The floor is the larger of bytes and operations over them "
            "(benchmarks/model.md). Medians are with a cold L2 cache and launches, graphs with a warm one and without."
        )
        lines += ["", "## Layers and edits", *table(run)]
    failed = 0
    for model in gpu_steps.MODELS:
        try:
            lines += gpu_steps.report(model)
        except Exception as error:
            failed = 1
            traceback.print_exc()
            lines += ["", f"## A UNet step of {model.name}", "", f"Failed: {type(error).__name__}: {error}"]
    (FOLDER / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written: {FOLDER / name}.md")
    return tests or benchmarks or failed


if __name__ == "__main__":
    sys.exit(main())

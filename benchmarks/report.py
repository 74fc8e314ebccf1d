"""Turn pytest-benchmark's JSON into a Markdown table: `python benchmarks/report.py RUN.json [TABLE.md]`."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def table(run: dict) -> str:
    """A row per benchmark; the ratio is the median over pairs timed in turn, with its quartiles."""
    cpu = run["machine_info"]["cpu"]
    lines = [
        f"{cpu.get('brand_raw', 'unknown processor')}, {cpu.get('count')} cores, {run['datetime'][:10]}",
        "",
        "| benchmark | memkern, ms | against | ms | ratio (quartiles) |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for bench in run["benchmarks"]:
        info = bench["extra_info"]
        low, high = info["ratio_quartiles"]
        lines.append(
            f"| {bench['name'].removeprefix('test_')} | {info['ours_ms']:.2f} | {info['alternative']} "
            f"| {info['alternative_ms']:.2f} | {info['ratio']:.3f} ({low:.3f}–{high:.3f}) |"
        )
    return "\n".join(lines + speedups(run)) + "\n"


def speedups(run: dict) -> list[str]:
    """Geometric mean and worst of how many times as fast memkern is, over the layers of each group."""
    groups = defaultdict(list)
    for bench in run["benchmarks"]:
        if bench["group"] is not None:
            groups[bench["group"]].append(1 / bench["extra_info"]["ratio"])
    if not groups:
        return []
    lines = ["", "| cross-attention layers | speed-up, geometric mean | worst layer |", "| --- | ---: | ---: |"]
    return lines + [
        f"| {group} | {statistics.geometric_mean(found):.2f}× | {min(found):.2f}× |" for group, found in groups.items()
    ]


if __name__ == "__main__":
    text = table(json.loads(Path(sys.argv[1]).read_text()))
    print(text)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text, encoding="utf-8")

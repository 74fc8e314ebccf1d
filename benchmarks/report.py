"""Turn pytest-benchmark's JSON into a Markdown table: `python benchmarks/report.py RUN.json [TABLE.md]`."""

from __future__ import annotations

import json
import sys
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
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = table(json.loads(Path(sys.argv[1]).read_text()))
    print(text)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text, encoding="utf-8")

"""Turn pytest-benchmark's JSON into Markdown tables: `python benchmarks/report.py RUN.json [PAGE.md]`, and a plot
beside them.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

WHOLE = {
    "unet_step": "denoising step of SD 1.5's UNet",
    "compiled": "a step, compiled",
    "inference_mode": "a step in inference mode",
    "autocast": "a step under autocast",
    "encode_prompt": "`encode_prompt`",
    "host": "host time of a small layer",
}
"""Benchmarks of the times that a user waits for: prefix → name in the summary."""


def page(run: dict) -> str:
    """The summary, then every row; the site includes either by its marks."""
    parts = {"summary": whole(run) + speedups(run), "grid": grid(run), "rows": rows(run) + rates(run)}
    marked = [
        "\n".join([f"<!-- --8<-- [start:{name}] -->", *lines, f"<!-- --8<-- [end:{name}] -->"])
        for name, lines in parts.items()
        if lines
    ]
    return "\n\n".join(marked) + "\n"


def whole(run: dict) -> list[str]:
    """The benchmarks of `WHOLE`: the time over the alternative's, the median over pairs timed in turn."""
    cpu = run["machine_info"]["cpu"]
    machine = f"{cpu.get('brand_raw', 'unknown processor')}, {cpu.get('count')} cores, {run['datetime'][:10]}"
    lines = [f"| {machine} | against | ratio of times (quartiles) |", "| --- | --- | ---: |"]
    for prefix, name in WHOLE.items():
        for bench in compared(run):
            what, _, given = bench["name"].removeprefix("test_").partition("[")
            if what == prefix:
                against = bench["extra_info"]["alternative"]
                lines.append(f"| {name}, {given.rstrip(']')} | {against} | {_ratio(bench)} |")
    return lines


def rows(run: dict) -> list[str]:
    """A row per benchmark."""
    lines = [
        "| benchmark | memkern, ms | against | ms | ratio (quartiles) |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for bench in compared(run):
        info = bench["extra_info"]
        lines.append(
            f"| {bench['name'].removeprefix('test_')} | {info['ours_ms']:.2f} | {info['alternative']} "
            f"| {info['alternative_ms']:.2f} | {_ratio(bench)} |"
        )
    return lines


def grid(run: dict) -> list[str]:
    """The layers of `bench_grid.py`: a row per layer and dtype, a column per preset and batch."""
    found = [bench["extra_info"] for bench in run["benchmarks"] if "grid" in bench["extra_info"]]
    cells = {(one["grid"], f"{one['preset']}, {one['batch']}"): one["ratio"] for one in found}
    if not cells:
        return []
    layers, columns = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    lines = [f"| time over unpatched, cold caches | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| {layer} | {' | '.join(f'{cells[layer, one]:.2f}' for one in columns)} |" for layer in layers]
    return [*lines, "", f"The largest of {len(cells)} is {max(cells.values()):.3f}."]


def _ratio(bench: dict) -> str:
    low, high = bench["extra_info"]["ratio_quartiles"]
    return f"{bench['extra_info']['ratio']:.3f} ({low:.3f}–{high:.3f})"


def compared(run: dict) -> list[dict]:
    """The benchmarks that time memkern against something; those of the grid have a table of their own."""
    return [one for one in run["benchmarks"] if "ratio" in one["extra_info"] and "grid" not in one["extra_info"]]


def rates(run: dict) -> list[str]:
    """The processor's rate in matrix products alone."""
    found = [bench for bench in run["benchmarks"] if "operations" in bench["extra_info"]]
    if not found:
        return []
    lines = ["", "| matrix products alone | ms | 10⁹ operations a second |", "| --- | ---: | ---: |"]
    for bench in found:
        seconds = bench["stats"]["median"]
        operations = bench["extra_info"]["operations"]
        name = bench["name"].removeprefix("test_")
        lines.append(f"| {name} | {1e3 * seconds:.2f} | {operations / seconds / 1e9:.0f} |")
    return lines


def speedups(run: dict) -> list[str]:
    """Geometric mean and worst speed-up of memkern, over the layers of each group."""
    groups = grouped(run)
    if not groups:
        return []
    lines = ["", "| cross-attention layers | speed-up, geometric mean | worst layer |", "| --- | ---: | ---: |"]
    return lines + [
        f"| {group} | {statistics.geometric_mean(found):.2f}× | {min(found):.2f}× |" for group, found in groups.items()
    ]


def grouped(run: dict) -> dict[str, list[float]]:
    """Group → speed-up of each of its layers."""
    groups: dict[str, list[float]] = defaultdict(list)
    for bench in compared(run):
        if bench["group"] is not None:
            groups[bench["group"]].append(1 / bench["extra_info"]["ratio"])
    return groups


def plot(run: dict, path: Path) -> None:
    """Speed-up of each group's layers as points, and their geometric mean as a bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = dict(reversed(grouped(run).items()))
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.32 * len(groups)), layout="constrained")
    axes.barh(list(groups), [statistics.geometric_mean(found) for found in groups.values()], color="#9ecae1")
    for row, found in enumerate(groups.values()):
        axes.plot(found, [row] * len(found), "o", color="#08519c", markersize=4)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as the alternative: layers (points) and their geometric mean (bar)")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    recorded = json.loads(Path(sys.argv[1]).read_text())
    text = page(recorded)
    print(text)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text, encoding="utf-8")
        if grouped(recorded):
            plot(recorded, Path(sys.argv[2]).with_suffix(".png"))

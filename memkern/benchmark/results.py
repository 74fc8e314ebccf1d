"""The result of a benchmark of a pipeline: a value to print, and its files."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .measured import MEASURES, Run
from .plot import NO_PLOT, plot
from .tables import described, layers, table

VERSION = 1
"""The version of the JSON document."""


@dataclass(frozen=True)
class Bench:
    """The result of `memkern.bench`; it prints as the table.

    Attributes:
        settings: of the measurement, the pipeline and the device.
        versions: of memkern and the packages it runs on, and its backends: see `memkern.info`.
        runs: the unpatched pipeline first, then each policy; the compiled ones after the eager ones.
        notes: further remarks for the reader.
        files: the paths of the written files.
    """

    settings: dict[str, Any]
    versions: dict[str, Any]
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def document(self) -> dict[str, Any]:
        """The whole result, as `bench.json` has it."""
        return {
            "memkern_bench": VERSION,
            "settings": self.settings,
            "info": self.versions,
            "measures": MEASURES,
            "runs": [run.document() for run in self.runs],
            "notes": list(self.notes),
        }

    def written(self, out: str | Path) -> Bench:
        """Write `bench.json`, `bench.md` and, with matplotlib (`memkern[plot]`), `bench.png`; the result with paths.

        Raises:
            OSError: the folder cannot be written.
        """
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        image = plot(self.runs, out / "bench.png")
        (out / "bench.json").write_text(json.dumps(self.document(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (out / "bench.md").write_text(self.report(image), encoding="utf-8")
        return replace(self, files=(out / "bench.md", out / "bench.json", *([] if image is None else [image])))

    def report(self, image: Path | None = None) -> str:
        """The page of the result, in Markdown.

        Args:
            image: the path of the plot, if there is one.
        """
        machine = {**self.versions["versions"], "build": self.versions["build"]}
        machine |= {f"backend {name}": state for name, state in self.versions["backends"].items()}
        machine |= {f"failed {place}": failure for place, failure in enumerate(self.versions["failures"])}
        parts = {
            "# memkern bench": table(self.runs),
            "": NO_PLOT if image is None else f"![ratios]({image.name})",
            "## Settings": described(self.settings),
            "## Layers": layers(self.runs),
            "## Installation": described(machine),
            "## Columns": "\n".join(f"- **{name}**: {text}." for name, text in MEASURES.items()),
            "## Notes": "\n".join(f"- {note}" for note in self.notes),
        }
        return "\n\n".join(f"{title}\n\n{text}".strip() for title, text in parts.items() if text) + "\n"

    def __str__(self) -> str:
        lines = [table(self.runs), *self.notes, *map(str, self.files)]
        if self.files and not any(path.suffix == ".png" for path in self.files):
            lines.append(NO_PLOT)
        return "\n".join(lines)

"""The prompts of an audit: those of a file, or the embedded model's own."""

from __future__ import annotations

import json
from pathlib import Path

from ..demo import embedded
from .models import EMBEDDED, Model
from .prompts import Prompt, read_prompts


def listed(model: Model, path: str | Path | None, references: str | None, limit: int | None) -> list[Prompt]:
    """See `read_prompts`; without a file the embedded model's memorized captions, then its ordinary ones, labelled."""
    if path is not None:
        return read_prompts(Path(path), references=references, limit=limit)
    if model.source != EMBEDDED:
        raise ValueError("prompts: a file of prompts is needed, except for the embedded model")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 prompt, got {limit}")
    entries = json.loads((embedded.MODEL / "memorized.json").read_text(encoding="utf-8"))
    own = [(entry["caption"], embedded.MODEL / entry["image"]) for entry in entries]
    own += [(caption, None) for caption in embedded.ordinary()]
    return [Prompt(f"{place:04d}", text, image, image is not None) for place, (text, image) in enumerate(own[:limit])]

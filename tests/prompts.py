"""Prompts published with the paper, where they are at hand beside the checkout."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "prompts"
FILES = ("memorized_sd1_458.jsonl", "ordinary_1500.jsonl")


def published_prompts(count: int) -> list[str]:
    """The first `count`, memorized and ordinary in turn; empty where they are not at hand."""
    lists = []
    for name in FILES:
        path = FOLDER / name
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        lists.append([json.loads(line)["prompt"] for line in lines])
    return [prompt for pair in zip(*lists, strict=False) for prompt in pair][:count]

"""The contents of an audit's folder: settings that may not change, and lists that may grow."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..policy import Policy
from .methods import Method, method
from .prompts import Prompt

T = TypeVar("T")

FORMER: dict[str, Any] = {
    "config": None,
    "loras": [],
    "scheduler": None,
    "dtype": None,
    "generator_device": "cpu",
    "batch": 1,
}
"""The values of settings before a manifest recorded them; other settings are taken with their present values."""


@dataclass(frozen=True)
class Contents:
    """The contents of an audit: the lists that grow, and `settings`, which stay."""

    prompts: list[Prompt]
    methods: list[Method]
    seeds: list[int]
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The "settings" of a manifest."""
        return self.settings | {
            "prompts": [_entry(prompt) for prompt in self.prompts],
            "methods": [one.name for one in self.methods],
            "policies": {one.name: json.loads(one.document) for one in self.methods if one.document is not None},
            "seeds": self.seeds,
        }


def grown(out: Path, asked: Contents) -> Contents:
    """The requested contents together with those that the folder already holds.

    A list that covers the folder's keeps its order; otherwise new entries come after the old ones.

    Raises:
        ValueError: the folder holds an audit with other settings, or with other prompts in the same places.
    """
    path = out / "manifest.json"
    if not path.exists():
        return asked
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {path} is no manifest of an audit: {error!r}; take another folder") from None
    changed = [name for name in asked.settings if _former(before, name, asked) != asked.settings[name]]
    if changed:
        said = "; ".join(
            f"{name} was {_former(before, name, asked)!r}, is {asked.settings[name]!r}" for name in changed
        )
        raise ValueError(
            f"out: {out} holds an audit with other {', '.join(changed)}; take another folder ({said}). "
            "Policies, seeds and prompts may be added"
        )
    documents = before.get("policies", {})
    held = [
        method(Policy.from_json(json.dumps(documents[name]))) if name in documents else method(name)
        for name in before["methods"]
    ]
    methods = {one.name: one for one in [*held, *asked.methods]}
    names = _joined([one.name for one in held], [one.name for one in asked.methods])
    return Contents(
        _prompts(out, [_prompt(*entry) for entry in before["prompts"]], asked.prompts),
        [methods[name] for name in names],
        _joined(before["seeds"], asked.seeds),
        asked.settings,
    )


def write_manifest(out: Path, contents: Contents, measured: dict[str, Any]) -> None:
    """Write settings, measures and versions, in one move.

    Raises:
        OSError: the folder cannot be written.
    """
    import diffusers
    import transformers

    from .. import __version__

    settings = contents.as_json()
    versions = {
        "memkern": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    text = json.dumps({"settings": settings, "measured": measured, "versions": versions, "sha256": digest}, indent=1)
    path = out / "manifest.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"out: {out} cannot be written: {error}") from error


def _former(before: dict[str, Any], name: str, asked: Contents) -> Any:
    return before.get(name, FORMER.get(name, asked.settings[name]))


def _joined(held: Sequence[T], asked: Sequence[T]) -> list[T]:
    if set(held) <= set(asked):
        return list(asked)
    return [*held, *(one for one in asked if one not in held)]


def _prompts(out: Path, held: list[Prompt], asked: list[Prompt]) -> list[Prompt]:
    for former, now in zip(held, asked, strict=False):
        if former.text != now.text:
            raise ValueError(
                f"prompts: {out} holds {former.text!r} as {former.id}, but the requested one is {now.text!r}; "
                "add prompts at the end of the file, or take another folder"
            )
    return asked + held[len(asked) :]


def _entry(prompt: Prompt) -> list[str | bool | None]:
    return [prompt.id, prompt.text, None if prompt.reference is None else str(prompt.reference), prompt.label]


def _prompt(name: str, text: str, reference: str | None = None, label: bool | None = None) -> Prompt:
    return Prompt(name, text, None if reference is None else Path(reference), label)

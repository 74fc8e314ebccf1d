"""The methods that an audit compares: memkern's policies, and the published alternatives that need no retraining."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import patched
from ..policy import Policy
from ..presets import PRESETS
from .additions import random_numbers, random_tokens
from .files import check_file
from .wen import optimized

UNMITIGATED = "none"

Inputs = Callable[[Any, Sequence[str], Sequence[torch.Generator], dict[str, Any]], dict[str, Any]]


def _texts(
    pipe: Any, texts: Sequence[str], generators: Sequence[torch.Generator], options: dict[str, Any]
) -> dict[str, Any]:
    return {"prompt": list(texts)}


def _same(text: str, seed: int, tokenizer: Any) -> str:
    return text


@contextmanager
def _as_it_is(pipe: Any) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Method:
    """One column of an audit.

    Attributes:
        name: the name that was asked for.
        prompt: changes a prompt's text before the tokenizer sees it, by the image's seed and the tokenizer.
        installed: puts it into a pipeline for the length of a `with` block.
        inputs: the pipeline's arguments, besides its options, for texts with a generator each.
        document: the policy as JSON, if the name alone does not define it.
    """

    name: str
    prompt: Callable[[str, int, Any], str] = _same
    installed: Callable[[Any], Any] = _as_it_is
    inputs: Inputs = _texts
    document: str | None = None

    @property
    def folder(self) -> str:
        """The name of its folder, with a digest if other names could give the same one."""
        plain = re.sub(r"[^\w.,=-]", "_", self.name)
        if len(plain) <= 100 and re.fullmatch(r"[a-zA-Z0-9.,=-]+(:[a-zA-Z0-9.,=-]+)?", self.name):
            return plain
        return f"{plain[:80]}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def split(text: str) -> list[str]:
    """Comma-separated names, which may have comma-separated numbers themselves: "guard:0.2,1e-1, none" is two."""
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if found and _is_number(part):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def methods(given: Iterable[str | Path | Policy]) -> list[Method]:
    """The methods of an audit, each once, "none" first; see `method`."""
    # The text of a policy describes it fully, so one name is one method.
    found = [Method(UNMITIGATED), *(method(one) for one in given)]
    return list({one.name: one for one in found}.values())


def method(given: str | Path | Policy) -> Method:
    """One method: a `Policy`, a preset's name, a JSON file of a policy, or one of `ALTERNATIVES`.

    "none" is the unpatched pipeline.

    Raises:
        FileNotFoundError, ValueError: it is none of them.
        TypeError: it is not text, a path or a policy.
    """
    if isinstance(given, Policy):
        return _of_policy(given)
    if not isinstance(given, (str, Path)):
        raise TypeError(f"policies: expected names, Policy objects or JSON files, got {given!r}")
    name = str(given).strip()
    if Path(name).suffix.lower() == ".json":
        return _of_policy(_from_file(Path(name)))
    if name == UNMITIGATED:
        return Method(name)
    kind, _, number = name.partition(":")
    if kind in ALTERNATIVES:
        return ALTERNATIVES[kind](name, number)
    try:
        policy = Policy.parse(name)
    except ValueError as error:
        if kind in PRESETS:
            raise
        others = f"one of the alternatives {', '.join(ALTERNATIVES)}, or a .json file of a policy"
        raise ValueError(f"{error}; or {others}") from None
    return Method(name, installed=lambda pipe: patched(pipe, policy))


def _of_policy(policy: Policy) -> Method:
    name = str(policy)
    if name == UNMITIGATED:
        return Method(name)
    try:
        document = None if Policy.parse(name) == policy else policy.to_json()
    except ValueError:
        document = policy.to_json()
    return Method(name, installed=lambda pipe: patched(pipe, policy), document=document)


def _from_file(path: Path) -> Policy:
    check_file("policies", path)
    try:
        return Policy.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"policies: {path}: {error}") from None


def _random_additions(change: Callable[[str, int, Any, random.Random], str]) -> Callable[[str, str], Method]:
    def named(name: str, number: str) -> Method:
        count = _number(name, number, 4, int)

        def prompt(text: str, seed: int, tokenizer: Any) -> str:
            return change(text, count, tokenizer, random.Random(f"{name}/{text}/{seed}"))

        return Method(name, prompt)

    return named


def _late_guidance(name: str, number: str) -> Method:
    """Jain et al., "Classifier-free guidance inside the attraction basin may cause memorization", 2024.

    Until a part of the schedule (their static transition point; 0.5 by default) is over, the prediction is that of
    the negative prompt only, for any guidance scale: guidance 0.
    """
    start = _number(name, number, 0.5, float)
    if start > 1:
        raise ValueError(f"{name}: expected a part of the schedule in [0, 1] after the colon, got {number!r}")

    @contextmanager
    def installed(pipe: Any) -> Iterator[None]:
        def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            times = pipe.scheduler.timesteps
            step = int((times == kwargs.get("timestep", args[1] if len(args) > 1 else None)).nonzero()[0])
            if step / len(times) >= start:
                return output
            negative, _ = output[0].chunk(2)
            return (torch.cat([negative, negative]), *output[1:])

        handle = pipe.unet.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    return Method(name, installed=installed)


def _wen(name: str, number: str) -> Method:
    """See `optimized`; the target is 3 by default."""
    target = _number(name, number, 3.0, float)

    def inputs(
        pipe: Any, texts: Sequence[str], generators: Sequence[torch.Generator], options: dict[str, Any]
    ) -> dict[str, Any]:
        found = [optimized(pipe, text, own, options, target) for text, own in zip(texts, generators, strict=True)]
        return {key: torch.cat([one[key] for one in found]) for key in found[0]}

    return Method(name, inputs=inputs)


ALTERNATIVES: dict[str, Callable[[str, str], Method]] = {
    "random-tokens": _random_additions(random_tokens),
    "random-numbers": _random_additions(random_numbers),
    "late-guidance": _late_guidance,
    "wen": _wen,
}
"""Name → a method from its string form, "random-tokens:4"."""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(name: str, text: str, default: Any, kind: Callable[[str], Any]) -> Any:
    if not text:
        return default
    try:
        found = kind(text)
    except ValueError:
        raise ValueError(f"{name}: expected a number after the colon, got {text!r}") from None
    if not 0 <= found < float("inf"):
        raise ValueError(f"{name}: expected a finite number of at least 0 after the colon, got {text!r}")
    return found

"""Patching a diffusers pipeline, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..policy import Policy
from . import support
from .instance import OnUnknown, Patch, StageChoice, find
from .status import Status


def patch(
    pipe: Any,
    policy: Policy | str = "swap-pad-zero-eot",
    *,
    backend: str = "auto",
    on_unknown: OnUnknown = "raise",
    accelerate: bool = True,
    stage: StageChoice = "auto",
) -> Patch:
    """Protect a diffusers pipeline: from now on its prompts are edited as `policy` says.

    Args:
        pipe: a Stable Diffusion pipeline with one CLIP text encoder. Patching it again replaces what is in
            force and returns the same `Patch`.
        policy: a `Policy` or a preset's name; the default is method 1 of Kim & No (arXiv 2605.02908).
        backend: of the operators, one of `memkern.ops.BACKENDS`.
        on_unknown: what happens when a prompt cannot be classified, such as raw `prompt_embeds`: "raise"
            an `UnmitigatedError`, "warn" with an `UnmitigatedWarning`, or "pass".
        accelerate: whether the UNet's cross-attention layers are computed by memkern where that is faster;
            False leaves the UNet as it is, at the embeds stage.
        stage: where the policy is applied. "embeds": once, on the text encoder's output. "kv": on the keys and
            values of the UNet's cross-attention layers, which actions on logits and windows of layers and steps
            need. "auto": on the embeddings where that can express the policy. Both give the same image.

    Returns:
        The `Patch`.

    Raises:
        TypeError: `pipe` is not a pipeline, or `policy` is no policy.
        ValueError: the pipeline is not supported, or not at the stage the policy needs (with the reasons), or an
            argument is out of range.
    """
    support.require(pipe)
    policy = Policy.of(policy)
    existing = find(pipe)
    if existing is not None:
        existing.update(policy, backend=backend, on_unknown=on_unknown, accelerate=accelerate, stage=stage)
        return existing
    made = Patch(pipe, policy, backend, on_unknown, accelerate, stage)
    made.install()
    return made


def unpatch(pipe: object) -> None:
    """Restore `pipe`. A pipeline that is not patched is left as it is."""
    existing = find(pipe)
    if existing is not None:
        existing.remove()


def status(pipe: object) -> Status:
    """What is in force on `pipe`, where, and what its last prompts were: a value to print."""
    found = find(pipe)
    return Status(patched=False) if found is None else found.status()


@contextmanager
def patched(
    pipe: Any,
    policy: Policy | str = "swap-pad-zero-eot",
    *,
    backend: str = "auto",
    on_unknown: OnUnknown = "raise",
    accelerate: bool = True,
    stage: StageChoice = "auto",
) -> Iterator[Patch]:
    """`patch` for the length of a `with` block; what was in force before is restored in any case."""
    before = find(pipe)
    former = None if before is None else before.settings
    made = patch(pipe, policy, backend=backend, on_unknown=on_unknown, accelerate=accelerate, stage=stage)
    try:
        yield made
    finally:
        if former is None:
            made.remove()
        else:
            made.update(**former)

"""Patching a diffusers pipeline, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..policy import Policy
from . import supported
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
    controlnet: bool = True,
) -> Patch:
    """Protect a diffusers pipeline: from now on its prompts are edited as `policy` says.

    Args:
        pipe: a pipeline whose context comes from CLIP (see `memkern.support`). Patching it again replaces what is in
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
        controlnet: whether the cross-attention of the pipeline's ControlNets is treated as the UNet's is. Edited
            embeddings reach it in any case; False leaves its own keys and values, and its speed, alone.

    Returns:
        The `Patch`.

    Raises:
        TypeError: `pipe` is not a pipeline, or `policy` is no policy.
        ValueError: the pipeline is not supported, or not at the stage the policy needs (with the reasons), or an
            argument is out of range.
    """
    supported.require(pipe)
    policy = Policy.of(policy)
    settings: dict[str, Any] = {
        "backend": backend,
        "on_unknown": on_unknown,
        "accelerate": accelerate,
        "stage": stage,
        "controlnet": controlnet,
    }
    existing = find(pipe)
    if existing is not None:
        existing.update(policy, **settings)
        return existing
    made = Patch(pipe, policy, **settings)
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
def patched(pipe: Any, policy: Policy | str = "swap-pad-zero-eot", **settings: Any) -> Iterator[Patch]:
    """`patch` for the length of a `with` block; what was in force before is restored in any case.

    Args:
        pipe, policy, settings: as those of `patch`.
    """
    before = find(pipe)
    former = None if before is None else before.settings
    made = patch(pipe, policy, **settings)
    try:
        yield made
    finally:
        if former is None:
            made.remove()
        else:
            made.update(**former)

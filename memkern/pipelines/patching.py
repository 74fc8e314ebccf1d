"""Patching a diffusers pipeline, settings of one request, and the way back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ..policy import Policy
from .family import refusals
from .holders import LOCK
from .instance import Family, family_of, find
from .patch import Patch, in_force
from .session import Settings
from .status import Status

Function = TypeVar("Function", bound=Callable[..., Any])


def _takes_settings(function: Function) -> Function:
    """Show `**settings` in the signature by name and default, which are written only once, in `Settings`."""
    signature = inspect.signature(function)
    named = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    known = {one.name for one in named}
    settings = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for one in inspect.signature(Settings).parameters.values()
        if one.name not in known
    ]
    function.__signature__ = signature.replace(parameters=[*named, *settings])  # type: ignore[attr-defined]
    return function


@_takes_settings
def patch(pipe: Any, policy: Policy | str = "swap-pad-zero-eot", **settings: Any) -> Patch:
    """Protect a diffusers pipeline: from now on its prompts are edited as `policy` says.

    Args:
        pipe: a pipeline whose context comes from CLIP (see `memkern.support`). Patching it again replaces the
            settings and returns the same `Patch`.
        policy: a `Policy` or a preset's name; the default is method 1 of Kim & No (arXiv 2605.02908).
        backend: the backend of the operators, one of `memkern.ops.BACKENDS`. Default "auto".
        on_unknown: the action when rows would go unedited, such as raw `prompt_embeds`: "raise" an
            `UnmitigatedError` (the default), "warn" with an `UnmitigatedWarning`, or "pass".
        accelerate: whether memkern computes the UNet's cross-attention layers where that is faster, and equal rows
            of its first self-attention only once. "attention" does only the former. False leaves the UNet's own
            computation as it is, at the embeds stage. Default True.
        memory: the most that may be kept of the contexts of one call of the pipeline: bytes as an int, or a share of
            the device's whole memory as a float. The rest is computed again at each step. By default 1/32 of the
            device's memory, at most 256 MiB.
        stage: the stage at which the policy is applied. "embeds": once, on the text encoder's output. "kv": on the
            keys and values of the UNet's cross-attention layers, which actions on logits and windows of layers and
            steps need. "auto": on the embeddings where they can express the policy. Both give the same image.
            Default "auto".
        controlnet: whether the cross-attention of the pipeline's ControlNets is treated like the UNet's. Edited
            embeddings reach it in any case; False leaves its keys, values and speed alone. Default True.
        report: a function that is called with a `Record` of each call of the pipeline. Default None.

    Returns:
        The `Patch`.

    Raises:
        TypeError: `pipe` is not a pipeline, or `policy` is no policy.
        ValueError: the pipeline is not supported, or not at the stage the policy needs (with the reasons), or an
            argument is out of range.
    """
    refusals.require_pipeline(pipe)
    wanted = Settings().changed(policy, **settings)
    with LOCK:
        existing = find(pipe)
        if existing is None:
            refusals.require(pipe)
            return Family(pipe, wanted).install(pipe)
        existing.update(**vars(wanted))
        existing.family.blocks = None
        return existing


def unpatch(pipe: object) -> None:
    """Restore `pipe`. A pipeline that is not patched is left as it is."""
    existing = find(pipe)
    if existing is not None:
        existing.remove()


def status(pipe: object) -> Status:
    """The status of `pipe`: its settings, its sites and its last prompts, as a value to print."""
    found = find(pipe)
    return Status(patched=False) if found is None else found.status()


@_takes_settings
@contextmanager
def using(pipe: Any, policy: Policy | str | None = None, **settings: Any) -> Iterator[Patch]:
    """Use other settings for the calls of a patched pipeline that are made in this context, and for no others.

    A context is a thread or an asyncio task (`contextvars`): other requests at the same time do not see the settings,
    and `asyncio.to_thread` takes them along. Blocks nest; settings that are not named stay as they are around the
    block. "none" leaves prompts unprotected by choice.

        with memkern.using(pipe, "zero-pad:0.4"):
            pipe("a cat")

    Args:
        pipe: the pipeline, or a copy of it.
        policy, settings: as those of `patch`.

    Yields:
        The `Patch`.

    Raises:
        ValueError: `pipe` is not patched, or the settings cannot be in force on it.
    """
    found = find(pipe)
    if found is None:
        raise ValueError(f"using: this {type(pipe).__name__} is not patched; call memkern.patch(pipe) first")
    chosen = found.in_force.changed(policy, **settings)
    found.check(chosen)
    with in_force(found, chosen, whole_family=found.family.is_first(found)):
        yield found


@_takes_settings
@contextmanager
def patched(pipe: Any, policy: Policy | str = "swap-pad-zero-eot", **settings: Any) -> Iterator[Patch]:
    """`patch` for the length of a `with` block.

    On a patched pipeline it acts as `using`. Any other pipeline is patched, and restored in any case when the last
    block that needs the patch has ended.

    Args:
        pipe, policy, settings: as those of `patch`.
    """
    with LOCK:
        family = family_of(pipe)
        found = find(pipe) if family is not None else patch(pipe, policy, **settings)
        assert found is not None
        if family is None:
            found.family.blocks = 0
        counted = found.family.blocks is not None
        if found.family.blocks is not None:
            found.family.blocks += 1
    try:
        if family is None:
            yield found
        else:
            with using(pipe, policy, **settings):
                yield found
    finally:
        with LOCK:
            if counted and found.family.blocks is not None:
                found.family.blocks -= 1
                if found.family.blocks == 0:
                    found.remove()

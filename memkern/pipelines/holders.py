"""The hooks that pipelines hold on a shared module: the first puts them in, the last takes them out."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

LOCK = threading.RLock()
"""The lock that is held while anything is put into modules or taken out."""

Hook = TypeVar("Hook")


class Holders:
    """The holders of something, by weak references: one that is gone holds nothing."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, holder: Any) -> None:
        """Add `holder` to those that hold it."""
        with LOCK:
            self._references[id(holder)] = weakref.ref(holder)

    def drop(self, holder: Any) -> None:
        """Remove `holder` from those that hold it."""
        with LOCK:
            self._references.pop(id(holder), None)

    def all(self) -> list[Any]:
        """The present holders, in the order in which they came."""
        found = (reference() for reference in tuple(self._references.values()))
        return [holder for holder in found if holder is not None]

    def __contains__(self, holder: Any) -> bool:
        reference = self._references.get(id(holder))
        return reference is not None and reference() is holder

    def __bool__(self) -> bool:
        return any(reference() is not None for reference in tuple(self._references.values()))


def hook_on(module: Any, kind: type[Hook]) -> Hook | None:
    """The forward pre-hook of a kind that is on `module`; None if there is none."""
    # Copied in one go: other threads may put hooks in meanwhile.
    hooks = tuple(getattr(module, "_forward_pre_hooks", {}).values())
    return next((hook for hook in hooks if type(hook) is kind), None)


def inert() -> Callable[..., Any]:
    """A hook that does nothing, in place of memkern's in a module that is copied or pickled alone.

    It is the standard library's own, so that the pickle loads without memkern.
    """
    return contextlib.nullcontext().__exit__


def inert_reduced() -> tuple[Any, ...]:
    """The form of `inert` in a pickle."""
    return getattr, (contextlib.nullcontext(), "__exit__")

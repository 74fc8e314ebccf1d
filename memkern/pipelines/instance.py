"""The class of a pipeline while it is patched, and the state that a pipeline shares with its copies.

A method of the instance would not know which copy it is called on: `copy.copy` hands attributes on as they are. A
method of a class does, and it sees when a call of the pipeline begins and ends. The class is made for one pipeline;
nothing global changes, and `unpatch` gives the pipeline its former class back.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from .attention.measured import Chooser
from .family import outputs
from .holders import LOCK
from .patch import Patch
from .requests import encode_prompt, request
from .session import Settings, Tally


class Family:
    """A patched pipeline and its copies.

    Attributes:
        base: their class, without memkern.
        method: the function that encodes prompts without memkern; its first argument is the pipeline.
        tally: the counts of the rows of all of them.
        chooser: gives the times of their layers' paths, within one budget of time.
        blocks: the number of `patched` blocks that keep it patched; None where it stays patched until it is unpatched.
    """

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self.base, self.tally, self.chooser = type(pipe), Tally(), Chooser.from_environment()
        self.name = outputs.method(pipe)
        self.own = vars(pipe).get(self.name)
        self.method = getattr(self.base, self.name) if self.own is None else _unbound(self.own)
        self.blocks: int | None = None
        self._settings, self._first = settings, weakref.ref(pipe)
        self._patches: weakref.WeakKeyDictionary[Any, Patch] = weakref.WeakKeyDictionary()

    def of(self, pipe: Any) -> Patch:
        """The patch of one of them; a copy gets its own, with the settings of the pipeline that was patched."""
        with LOCK:
            found = self._patches.get(pipe)
            if found is None:
                found = self._patches[pipe] = Patch(pipe, self, self._settings)
                found.attach()
            return found

    def install(self, pipe: Any) -> Patch:
        """Patch the pipeline that this family is of; if anything fails, nothing stays."""
        made = Patch(pipe, self, self._settings)
        made.check(self._settings)
        with LOCK:
            self._patches[pipe] = made
            try:
                made.attach()
                vars(pipe).pop(self.name, None)
                pipe.__class__ = patched_class(self)
            except BaseException:
                made.detach()
                if self.own is not None:
                    vars(pipe)[self.name] = self.own
                raise
        return made

    def is_first(self, patch: Patch) -> bool:
        """True if it is the patch of the pipeline that was patched, and not of a copy."""
        return patch.pipe is self._first()

    def settings_changed(self, patch: Patch) -> None:
        """Store the settings of the pipeline that was patched: copies of it begin with them."""
        if self.is_first(patch):
            self._settings = patch.settings

    def restore(self, patch: Patch) -> None:
        """Take a patch out of its pipeline."""
        pipe = patch.pipe
        if patch.replaced_by is not None:
            raise RuntimeError(
                f"unpatch: {patch.replaced_by!r} was put in place of memkern's pipe.{self.name}; undo that first"
            )
        with LOCK:
            vars(pipe).pop(self.name, None)
            pipe.__class__ = self.base
            if self.own is not None:
                vars(pipe)[self.name] = self.own
            self._patches.pop(pipe, None)
            patch.detach()


def family_of(pipe: object) -> Family | None:
    """The family of a patched pipeline; None for one that is not patched."""
    found = getattr(type(pipe), "_memkern", None)
    return found if isinstance(found, Family) else None


def find(pipe: object) -> Patch | None:
    """The patch that is on `pipe`, even if something else wraps its `encode_prompt` by now; or None."""
    family = family_of(pipe)
    return None if family is None else family.of(pipe)


def patched_class(family: Family) -> type:
    """A class for pipelines of `family`: a subclass of theirs whose calls are requests and whose prompts are edited."""
    base: Any = family.base

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if family_of(self) is not family:
            # A bound method that was kept from before `unpatch`.
            return base.__call__(self, *args, **kwargs)
        with request(family.of(self), self):
            return base.__call__(self, *args, **kwargs)

    @functools.wraps(family.method)
    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        if family_of(self) is not family:
            return family.method(self, *args, **kwargs)
        return encode_prompt(family.of(self), self, args, kwargs)

    # A new pipeline of the same class, as `type(pipe).from_pipe` makes it, is not patched.
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)

    def shallow(self: Any) -> Any:
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        return made

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _rebuilt, (base, family.of(self).settings), vars(self)

    def deep(self: Any, memo: dict[int, Any]) -> Any:
        made = _rebuilt(base, family.of(self).settings)
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    members = {
        "__call__": call,
        family.name: encode,
        "__new__": new,
        "__copy__": shallow,
        "__deepcopy__": deep,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_memkern": family,
    }
    made: type = type(base)(base.__name__, (base,), members)
    return made


def _rebuilt(base: type, settings: Settings) -> Any:
    """An empty pipeline of a class, patched with a family of its own; its attributes follow."""
    made: Any = object.__new__(base)
    made.__class__ = patched_class(Family(made, settings))
    return made


def _unbound(own: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline's own attribute as a function of the pipeline."""

    def method(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.signature(own)
    method.__signature__ = signature.replace(parameters=[self, *signature.parameters.values()])  # type: ignore[attr-defined]
    return method

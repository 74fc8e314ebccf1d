"""Requests: the settings of one, the rows that it encoded, the rows that reached the UNet, and its reports.

The state of a request is on its `Session`, never on the pipeline: requests in threads and tasks, shallow copies and
pipelines that share parts do not mix. A session is found through the current context (`contextvars`).
"""

from __future__ import annotations

import itertools
import logging
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, get_args

import torch

from ..errors import UnmitigatedError, UnmitigatedWarning
from ..ledger import KnownRow, RowTable, Stage
from ..ops import backends
from ..policy import Branch, Policy
from .attention.budget import Memory, bytes_of, check_memory
from .attention.measured import Chooser
from .family.encoders import EncoderCall, Slot

OnUnknown = Literal["raise", "warn", "pass"]
StageChoice = Literal["auto", "embeds", "kv"]
Accelerate = Literal[True, False, "attention"]
Outcome = Literal["protected", "exempt", "unedited"]

_NUMBERS = itertools.count(1)

log = logging.getLogger("memkern")


@dataclass(frozen=True)
class Settings:
    """The settings in force; see `memkern.patch` for each.

    Raises:
        TypeError, ValueError: a value that is not one of those allowed, or a stage that cannot express the policy.
    """

    policy: Policy = field(default_factory=lambda: Policy.parse("swap-pad-zero-eot"))
    backend: str = "auto"
    on_unknown: OnUnknown = "raise"
    accelerate: Accelerate = True
    stage: StageChoice = "auto"
    controlnet: bool = True
    memory: Memory = None
    report: Callable[[Record], None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", Policy.of(self.policy))
        for name, allowed in (
            ("on_unknown", get_args(OnUnknown)),
            ("stage", get_args(StageChoice)),
            ("accelerate", get_args(Accelerate)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                *most, last = map(repr, allowed)
                raise ValueError(f"{name}: expected {', '.join(most)} or {last}, got {value!r}")
        check_memory(self.memory)
        if self.report is not None and not callable(self.report):
            raise TypeError(f"report: expected a callable that takes a Record, got {self.report!r}")
        backends.require_installed(self.backend)
        reasons = self.policy.kv_reasons()
        if self.stage == "embeds" and reasons:
            raise ValueError(f"stage: policy '{self.policy}' needs the kv stage, not 'embeds': {'; '.join(reasons)}")

    @classmethod
    def names(cls) -> set[str]:
        """The names of the settings."""
        return {setting.name for setting in fields(cls)}

    @property
    def applied(self) -> Stage:
        """The stage at which the policy is applied: "embeds" if that can express it, unless asked otherwise."""
        if self.stage == "auto":
            return "kv" if self.policy.kv_reasons() else "embeds"
        return self.stage

    @property
    def needs_processors(self) -> bool:
        """True if memkern computes the UNet's cross-attention layers."""
        return bool(self.accelerate) or self.applied == "kv"

    @property
    def edits(self) -> bool:
        """True if any row is changed."""
        return self.policy.touches("cond") or self.policy.touches("uncond")

    def changed(self, policy: Policy | str | None = None, **changes: Any) -> Settings:
        """The settings with other values for those that are named and not None."""
        unknown = sorted(changes.keys() - self.names())
        if unknown:
            raise TypeError(f"unknown setting {unknown[0]!r}; there are {', '.join(sorted(self.names()))}")
        # None is a value of `report`: it takes the report out.
        changes = {name: value for name, value in changes.items() if value is not None or name == "report"}
        if policy is not None:
            changes["policy"] = policy
        return replace(self, **changes) if changes else self

    def serves(self, row: KnownRow) -> bool:
        """True if a request with these settings makes such a row, or leaves it alone."""
        return row.serves(self.policy, self.applied) or not (row.unedited or self.policy.touches(row.branch))


@dataclass(frozen=True)
class Counts:
    """Rows since a pipeline was patched.

    Attributes:
        protected: rows of prompts, one per image, that reached the UNet edited.
        exempt: rows of prompts whose policy leaves them alone, such as "none".
        unedited: rows of prompts and negative prompts that should have been edited, and reached the UNet unedited.
        refused: requests that raised for a row that would have been unedited.
    """

    protected: int = 0
    exempt: int = 0
    unedited: int = 0
    refused: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def __str__(self) -> str:
        return ", ".join(f"{getattr(self, one.name)} {one.name}" for one in fields(self))


@dataclass(frozen=True)
class Record:
    """One call of a patched pipeline, as `patch(..., report=…)` gets it.

    Attributes:
        policy, stage: those that were in force.
        rows: branch → the number of rows that were encoded.
        edits: for each encoded row its roles and the number of positions of each edit (`PromptStatus`).
        protected, exempt, unedited, refused: as in `Counts`.
        reasons: why rows went through unedited, or were refused.
        kept: the most bytes that the call kept of its contexts.
    """

    policy: Policy
    stage: Stage
    rows: dict[Branch, int]
    edits: tuple[Any, ...]
    protected: int
    exempt: int
    unedited: int
    refused: int
    reasons: tuple[str, ...]
    kept: int = 0

    def __str__(self) -> str:
        rows = ", ".join(f"{count} {branch}" for branch, count in self.rows.items()) or "none"
        edits = "; ".join(str(edit) for edit in self.edits)
        counts = Counts(self.protected, self.exempt, self.unedited, self.refused)
        return f"policy {self.policy}, stage {self.stage}, rows {rows}: {counts}{f' ({edits})' if edits else ''}"


class Tally:
    """The counts of a pipeline and its copies."""

    def __init__(self) -> None:
        self._total, self._lock = Counts(), threading.Lock()

    def add(self, counts: Counts) -> None:
        """Add the counts of a request."""
        with self._lock:
            self._total += counts

    @property
    def total(self) -> Counts:
        """The counts since patching."""
        return self._total

    def __deepcopy__(self, memo: dict[int, Any]) -> Tally:
        return Tally()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tally, ()


class Shared(Protocol):
    """The state that a pipeline shares with its copies, as far as a session needs it."""

    chooser: Chooser


class Owner(Protocol):
    """The parts of its patch that a session knows."""

    @property
    def family(self) -> Shared:
        """The state that the pipeline shares with its copies."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The text encoders that the pipeline had when it was patched."""

    @property
    def context_length(self) -> int:
        """Tokens in a window."""

    @property
    def base(self) -> type:
        """The pipeline's class, without memkern."""

    @property
    def tally(self) -> Tally:
        """The counts of its rows."""

    def called_outside(self) -> None:
        """Handle a text-encoder call that no patched `encode_prompt` made."""


class Session:
    """One request's view of a patched pipeline.

    Args:
        settings: those in force for all of it.
        pipe: the pipeline that is called, which may be a copy of the one that was patched.
        patch: the `Patch` it is counted for.

    Attributes:
        number: a running number.
        rows: those that it encoded or was given, by value.
        calls: the last calls of the text encoders, by branch.
        encoded: the number of rows that it encoded, by branch.
        kept: the contexts, by the site of the UNet that reads them.
        layers: cross-attention layer → its choice of a path.
        shared: self-attention → the number of rows that it computed, where others were equal.
        unreached: layers that should have been edited and were not, and why.
        left_alone: why layers were left to their own processors where acceleration was asked for.
        reasons: why rows went through unedited, or were refused.
        size: the most bytes that it kept of contexts.
    """

    def __init__(self, settings: Settings, pipe: Any, patch: Owner) -> None:
        self.settings = settings
        # Weakly: a patch keeps its last session, and dies with its pipeline at once, not when garbage is collected.
        self._patch = weakref.ref(patch)
        self.number = next(_NUMBERS)
        self._pipe = weakref.ref(pipe)
        self.rows = RowTable()
        self.calls: dict[Branch, tuple[EncoderCall, ...]] = {}
        self.encoded: Counter[Branch] = Counter()
        self.kept: dict[Any, Any] = {}
        self.layers: dict[str, Any] = {}
        self.shared: dict[str, str] = {}
        self.unreached: dict[str, str] = {}
        self.left_alone: dict[str, None] = {}
        self.reasons: dict[str, None] = {}
        self._outcomes: dict[int, tuple[Outcome, KnownRow | None]] = {}
        self._refused = 0
        self.size = 0

    @property
    def pipe(self) -> Any:
        """The pipeline that is called; None once it is gone."""
        return self._pipe()

    @property
    def patch(self) -> Owner:
        """The `Patch` it is counted for."""
        patch = self._patch()
        assert patch is not None, "a session has outlived its patch"
        return patch

    def rank(self, row: KnownRow) -> int:
        """The rank of a row for this request, among rows of the same values that were made for different purposes."""
        own = row.maker is not None and row.maker() is self.patch.family
        if row.is_plain and not own:
            # Values that any encoder makes are not taken for another pipeline's.
            return -1
        if row.serves(self.settings.policy, self.settings.applied):
            return 3
        return 2 if self.settings.serves(row) else int(own)

    def unmitigated(self, reason: str) -> None:
        """Report rows that go through unedited: raise, warn or pass, as `on_unknown` says; a reason is logged once.

        Raises:
            UnmitigatedError: `on_unknown` is "raise".
        """
        chosen, logged = self.settings.on_unknown, reason in self.reasons
        self.reasons[reason] = None
        message = f"memkern: this prompt would not be protected: {reason} (on_unknown={chosen!r})"
        if chosen == "raise":
            self._refused = 1
            raise UnmitigatedError(message)
        if not logged:
            log.warning("%s", message)
            if chosen == "warn":
                warnings.warn(message, UnmitigatedWarning, stacklevel=3)

    def outcome(self, row: KnownRow, outcome: Outcome) -> None:
        """Note that a known row reached the UNet; once unedited it stays so."""
        if self._outcomes.get(id(row), ("", None))[0] != "unedited":
            self._outcomes[id(row)] = outcome, row

    def strangers(self, count: int) -> None:
        """Note that `count` unknown rows reached the UNet."""
        for _ in range(count):
            self._outcomes[-len(self._outcomes) - 1] = "unedited", None

    @property
    def counts(self) -> Counts:
        """The counts up to now."""
        if self._refused:
            # Rows that reached the UNet before the refusal make no image.
            return Counts(refused=self._refused)
        found = Counter(outcome for outcome, _ in self._outcomes.values())
        return Counts(found["protected"], found["exempt"], found["unedited"])

    def room(self, device: torch.device) -> int:
        """The bytes of contexts that may still be kept."""
        return max(0, bytes_of(self.settings.memory, device) - self._kept_now)

    @property
    def _kept_now(self) -> int:
        return sum(contexts.size for contexts in tuple(self.kept.values()))

    def keeps(self) -> None:
        """Note that more is kept of a context than before."""
        self.size = max(self.size, self._kept_now)

    def close(self) -> None:
        """End the request: free what it kept; `status` still shows its results."""
        self.kept.clear()
        self.rows = RowTable()

    def settle(self) -> Counts:
        """The counts since the last time."""
        counts = self.counts
        self._outcomes.clear()
        self._refused = 0
        return counts


_SESSION: ContextVar[Session | None] = ContextVar("memkern_session", default=None)


@dataclass(eq=False)
class _Binding:
    """The settings that one block has bound, and whether it is still open."""

    owner: object
    settings: Settings
    holds: bool = True


_BOUND: ContextVar[tuple[_Binding, ...]] = ContextVar("memkern_bound", default=())


def current() -> Session | None:
    """The session of the pipeline call that this context is in."""
    return _SESSION.get()


@contextmanager
def entered(session: Session) -> Iterator[Session]:
    """Make `session` the current one."""
    token = _SESSION.set(session)
    try:
        yield session
    finally:
        _SESSION.reset(token)


@contextmanager
def bound(owner: object, settings: Settings) -> Iterator[None]:
    """Put `settings` in force for `owner` in this context."""
    own = _Binding(owner, settings)
    _BOUND.set((*(one for one in _BOUND.get() if one.holds), own))
    try:
        yield
    finally:
        # Blocks of generators need not end in the order in which they began, nor in the same thread.
        own.holds = False


def binding(owner: object) -> Settings | None:
    """The innermost settings bound to `owner` in this context; None if there are none."""
    return next((one.settings for one in reversed(_BOUND.get()) if one.holds and one.owner is owner), None)

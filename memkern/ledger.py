"""The rows that memkern has made, how, and for which branch, so that it recognises them later.

Embeddings carry no token ids, so a patched pipeline cannot classify those that it is given; it can recognise its own:
the same tensor, or else rows of the same values.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .policy import BRANCHES, Branch, Policy
from .roles import CONTEXT_LENGTH
from .seen import Seen, fingerprints

Stage = Literal["embeds", "kv"]

LIMIT = 4096
"""The number of different values whose rows are remembered beyond the life of their tensors."""

UNEDITED_RANK = 8
"""The rank of a row that a request let through unedited, above any rank that a caller gives."""

ENCODINGS = 8
"""The number of encodings whose equal rows are kept apart."""

UNRESOLVED = 64
"""The number of batches that may wait on their device until a caller asks for a row."""


@dataclass(frozen=True, eq=False)
class KnownRow:
    """The facts about one row of embeddings `[L, D]` that memkern made.

    Attributes:
        policy: the policy that it was made under.
        branch: its branch.
        roles: for each text encoder, uint8 `[L]` on the host.
        stage: "embeds": the row is edited; "kv": only its pads are re-embedded, keys and values will be edited.
        columns: for each text encoder, the columns it made; all of them if empty.
        paired: the roles of the prompt it belongs to, as `roles`, for a row of a negative prompt; None if not known.
        reembedded: `[L, D]`, the same prompt encoded with "!" for its pads, where the policy reads that.
        window: tokens in a window.
        unedited: True if the policy should have edited it and could not.
        maker: a weak reference to the pipeline's family that made it, if one did.
        call: the number of the encoding in the process; rows of one prompt and its negative have the same.
    """

    policy: Policy
    branch: Branch
    roles: tuple[torch.Tensor, ...]
    stage: Stage = "embeds"
    columns: tuple[slice, ...] = ()
    paired: tuple[torch.Tensor, ...] | None = None
    reembedded: torch.Tensor | None = None
    window: int = CONTEXT_LENGTH
    unedited: bool = False
    maker: weakref.ref[Any] | None = field(default=None, repr=False)
    call: int = 0

    @property
    def is_plain(self) -> bool:
        """True if its values are those of an encoder, without an edit."""
        return self.stage == "kv" or not self.policy.touches(self.branch)

    def serves(self, policy: Policy, stage: Stage) -> bool:
        """True if a pipeline with this policy and stage makes such rows; rows edited already serve at both stages."""
        return not self.unedited and self.policy == policy and self.stage in ("embeds", stage)


KnownRows = tuple[KnownRow | None, ...]
"""The known row for each row of a batch; None for one that memkern did not make."""


def row_keys(rows: torch.Tensor) -> Iterator[Hashable]:
    """The key that finds each of `rows` `[B, L, D]`; one device sync."""
    return _keys(fingerprints(rows), rows.shape[1:], rows.dtype)


def _keys(numbers: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> Iterator[Hashable]:
    return ((number, shape, dtype) for number in numbers.tolist())


class RowTable:
    """Known rows by their values.

    Args:
        limit: how many different values are kept, the oldest removed first; None for all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._rows: OrderedDict[Hashable, list[KnownRow]] = OrderedDict()
        self._limit = limit

    @property
    def calls(self) -> set[int]:
        """The encodings that made its rows."""
        return {row.call for rows in self._rows.values() for row in rows}

    def add(self, keys: Iterable[Hashable], rows: Sequence[KnownRow]) -> None:
        """Add the rows of one batch; rows of the same values from the last few encodings are kept."""
        found: dict[Hashable, list[KnownRow]] = {}
        for key, row in zip(keys, rows, strict=True):
            found.setdefault(key, []).append(row)
        for key, new in found.items():
            all_rows = [*self._rows.pop(key, ()), *new]
            calls = sorted({row.call for row in all_rows})[-ENCODINGS:]
            self._rows[key] = [row for row in all_rows if row.call in calls]
        while self._limit is not None and len(self._rows) > self._limit:
            self._rows.popitem(last=False)

    def get(self, key: Hashable) -> Sequence[KnownRow]:
        """The rows of these values, those of negative prompts first, in the order of their batches."""
        return sorted(self._rows.get(key, ()), key=lambda row: -BRANCHES.index(row.branch))


class Ledger:
    """The rows of a process."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, tuple[Seen, torch.Tensor, tuple[KnownRow, ...]]] = {}
        self._table = RowTable(LIMIT)
        self._unresolved: deque[tuple[torch.Tensor, torch.Size, torch.dtype, tuple[KnownRow, ...]]] = deque()
        self._lock = threading.RLock()

    def remember(self, tensor: torch.Tensor, rows: Sequence[KnownRow]) -> None:
        """Record the known rows of `tensor` `[B, L, D]` with its present values; no device sync on most calls."""
        if tensor.device.type == "meta":
            return
        key, rows = Seen.key(tensor), tuple(rows)

        def forget(reference: Any) -> None:
            kept = self._tensors.get(key)
            if kept is not None and kept[0].reference is reference:
                self._tensors.pop(key, None)

        numbers = fingerprints(tensor)
        self._tensors[key] = Seen(tensor, forget), numbers, rows
        # Rows that hold tensors of a device live as long as their session.
        if any(row.reembedded is not None or row.unedited for row in rows):
            return
        with self._lock:
            self._unresolved.append((numbers, tensor.shape[1:], tensor.dtype, rows))
            if len(self._unresolved) > UNRESOLVED:
                self._resolve()

    def recall(
        self,
        tensor: torch.Tensor,
        first: RowTable | None = None,
        rank: Callable[[KnownRow], int] = bool,
        order: Sequence[Branch] = (),
    ) -> KnownRows:
        """The known rows of `tensor` `[B, L, D]`: by identity, else by value, which needs a device sync.

        Where several are equal, as for images of a prompt, each is taken as often as the others.

        Args:
            first: rows that are searched before the process's own.
            rank: orders rows that were made for different purposes: the highest are taken; below 0, none.
            order: the branches of the equal parts of a batch, if known.
        """
        same = self.recall_same(tensor)
        if same is not None:
            return same
        if tensor.dim() != 3 or tensor.device.type == "meta":
            return (None,) * len(tensor)
        return self._find(row_keys(tensor), first, rank, order)

    def recall_same(self, tensor: torch.Tensor) -> tuple[KnownRow, ...] | None:
        """The known rows of this same tensor; None if it was not remembered, or was written to since.

        Its values are compared as well, for writes that no version counts (`tensor.data`, numpy): a device sync.
        """
        entry = self._tensors.get(Seen.key(tensor))
        if entry is None or not entry[0].is_here(tensor):
            return None
        return entry[2] if torch.equal(entry[1], fingerprints(tensor)) else None

    def _find(
        self,
        keys: Iterable[Hashable],
        first: RowTable | None,
        rank: Callable[[KnownRow], int],
        order: Sequence[Branch],
    ) -> KnownRows:
        with self._lock:
            self._resolve()
            keys = list(keys)
            candidates = [self._candidates(key, first, rank) for key in keys]
        # A prompt and its negative come from one encoding: where several made the same values, it is one that made all
        # rows of the batch; the caller's own come before others, and later ones before earlier ones.
        calls = [{row.call for row in rows} for rows in candidates]
        made_all = set.intersection(*filter(None, calls)) if any(calls) else set()
        certain = {call for found in calls if len(found) == 1 for call in found}
        mine = set() if first is None else first.calls
        found: list[KnownRow | None] = []
        total, met = Counter(keys), Counter[Hashable]()
        for number, (key, rows, own) in enumerate(zip(keys, candidates, calls, strict=True)):
            likely = own & made_all & mine or own & made_all or own & mine or own & certain or own
            same = [row for row in rows if row.call == max(likely)]
            expected = order[number * len(order) // len(keys)] if order and len(keys) % len(order) == 0 else None
            found.append(_share(same, met[key], total[key], expected) if same else None)
            met[key] += 1
        return tuple(found)

    def _candidates(self, key: Hashable, first: RowTable | None, rank: Callable[[KnownRow], int]) -> Sequence[KnownRow]:
        """The rows of these values that fit the caller best."""
        own = () if first is None else first.get(key)
        # A row that a request let through unedited stays unedited, even if others made the same values.
        ranked = [(UNEDITED_RANK if row.unedited else max(0, rank(row)), row) for row in own]
        known = {id(row) for row in own}
        ranked += [(rank(row), row) for row in self._table.get(key) if id(row) not in known]
        best = max((number for number, _ in ranked), default=-1)
        return [row for number, row in ranked if number == best and number >= 0]

    def _resolve(self) -> None:
        while self._unresolved:
            numbers, shape, dtype, rows = self._unresolved.popleft()
            self._table.add(_keys(numbers, shape, dtype), rows)


def _share(same: Sequence[KnownRow], place: int, total: int, expected: Branch | None) -> KnownRow:
    """The one of `same`, equal rows of one encoding, for the row at `place` among `total` equal ones of a batch.

    If the negative prompt equals the prompt, its rows come first, as pipelines put them, unless `expected` says
    otherwise. If there are more rows than were made, each was repeated; if that does not divide evenly, or if there are
    fewer, the rest are the prompt's, which edits protect.
    """
    if expected is not None:
        same = [row for row in same if row.branch == expected] or same
        return same[place % len(same)]
    if total % len(same) == 0:
        return same[place * len(same) // total]
    cond = [row for row in same if row.branch == "cond"] or same
    first = [row for row in same if row.branch == "uncond"] if total > len(same) else []
    return first[place] if place < len(first) else cond[(place - len(first)) % len(cond)]


LEDGER = Ledger()
"""The rows that `apply_policy` and every patched pipeline of this process made."""
